"""Captions as tokens: readable, cut where the model stops reading, ranked."""

import open_clip
import pytest
import torch

from surgery.metrics import TokenRanks
from surgery.sources import load_tokenizer
from surgery.tokens import rank_tokens, readable, token_similarity, tokenise


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=77)


def test_pieces_of_a_word_are_marked(tokenizer):
    texts = tokenise(tokenizer, ["A dog, unbelievablest Lapphund"], 77)
    words = readable(tokenizer, texts.ids[0].tolist())
    assert words[:4] == ["[start]", "a", "dog", ","]
    assert words[-1] == "[end]"
    joined = "".join(word[:-1] if word.endswith("-") else f"{word} " for word in words[4:-1])
    assert joined == "unbelievablest lapphund "


def test_a_part_of_a_character_is_readable(tokenizer):
    texts = tokenise(tokenizer, ["\U0001f9ff"], 77)
    words = readable(tokenizer, texts.ids[0].tolist())
    assert words[0] == "[start]"
    assert words[-1] == "[end]"
    assert any("�" in word for word in words)


def test_texts_are_cropped_and_cuts_are_told(tokenizer):
    texts = ["one two three four five six", "one two three four five six seven", "", "one"]
    found = tokenise(tokenizer, texts, 8)
    assert found.ids.shape == (4, 8)
    assert found.lengths == (8, 8, 2, 3)
    assert found.truncated == (False, True, False, False)
    assert readable(tokenizer, found.ids[1].tolist())[-2:] == ["six", "[end]"]
    assert tokenise(tokenizer, texts[2:], 8).ids.shape == (2, 3)
    with pytest.raises(ValueError, match="one or more texts"):
        tokenise(tokenizer, [], 8)


def test_a_gigantic_word_is_not_read_to_its_end(tokenizer):
    word = "qzxjv" * 200_000  # byte-pair encoding of all of it would take hours
    found = tokenise(tokenizer, ["a  dog\n" + word], 77)
    assert found.truncated == (True,)
    assert torch.equal(found.ids, tokenise(tokenizer, ["a dog " + word[:2000]], 77).ids)


def test_a_tokenizer_without_its_network(tokenizer):
    found = load_tokenizer("ViT-B/16")
    assert torch.equal(found(["a dog"]), tokenizer(["a dog"]))
    with pytest.raises(ValueError, match="no such model"):
        load_tokenizer("ViT-B-17")


def test_similarity_and_rank():
    image = torch.tensor([[3.0, 0.0]])
    features = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [1.0, 1.0], [5.0, 0.0]]])
    scores = token_similarity(image, features)
    torch.testing.assert_close(scores, torch.tensor([[0.0, 1.0, 0.5**0.5, 1.0]]))
    assert rank_tokens(scores[0]).tolist() == [1, 3, 2, 0]
    with pytest.raises(ValueError, match=r"\[B, L, C\]"):
        token_similarity(image, features[0])


def test_counts_of_ranks_merge():
    whole, first, second = TokenRanks(), TokenRanks(), TokenRanks()
    texts = [[3, 1, 2, 0], [3, 2], [1], [9, 9, 9]]
    for i, ranked in enumerate(texts):
        for metric in (whole, second if i % 2 else first):
            padded = torch.tensor([[*ranked, *[0] * (4 - len(ranked))]])
            metric.update(padded, torch.tensor([len(ranked)]), vocabulary=10)
    empty = TokenRanks()
    for part in (first, second, TokenRanks()):
        empty.merge_state(part.metric_state)
    assert torch.equal(empty.counts, whole.counts)
    assert int(empty.texts) == 4
    assert whole.share(3).tolist() == [0.5, 0.0, 0.0]
    assert whole.counted() == [
        (3, (2, 0, 0)),
        (9, (1, 1, 1)),
        (1, (1, 1, 0)),
        (2, (0, 1, 1)),
    ]
