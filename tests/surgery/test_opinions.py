"""Gradient ascent on soft tokens: it rises, repeats itself, and never leaves the vocabulary."""

import json

import pytest
import torch
import torch.nn.functional as F

from surgery import load_backbone
from surgery.metrics import WordCounts
from surgery.opinions import (
    ascend,
    fresh_features,
    mean_feature,
    seed_from,
    views,
    word_frequencies,
)

TINY = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return load_backbone(str(path))


@pytest.fixture(scope="module")
def target(backbone):
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(backbone.embed_dim, generator=generator), dim=0)


def climb(backbone, target, **options):
    defaults = {
        "sequences": 3,
        "length": 4,
        "steps": 24,
        "seed": 1,
        "micro_batch": 3,
    }
    return ascend(backbone, backbone.tokenizer, target, **{**defaults, **options})


@pytest.mark.parametrize("optimiser", ["momentum", "adam"])
def test_the_cosine_rises_for_every_sequence(optimiser, backbone, target):
    found = climb(backbone, target, optimiser=optimiser)
    assert found.ids.shape == (24, 3, 4)
    assert (found.scores[-6:].mean(0) > found.scores[:3].mean(0) + 0.2).all()
    assert int(found.ids.max()) < 49406  # neither start nor end
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


def test_scores_are_those_of_the_texts(backbone, target):
    found = climb(backbone, target, steps=3)
    for ids, score in zip(found.ids[-1], found.scores[-1], strict=True):
        text = torch.tensor([[49406, *ids.tolist(), 49407]])
        feature = F.normalize(backbone.encode_text(text)[0], dim=0)
        assert float(feature @ target) == pytest.approx(float(score), abs=1e-5)


def test_a_prompt_stands_before_the_tokens_and_stays(backbone, target):
    found = climb(backbone, target, steps=3, prompt="a photo of")
    assert found.ids.shape == (3, 3, 4)
    prompt = backbone.tokenizer(["a photo of"])[0, 1:4].tolist()
    for ids, score in zip(found.ids[-1], found.scores[-1], strict=True):
        text = torch.tensor([[49406, *prompt, *ids.tolist(), 49407]])
        feature = F.normalize(backbone.encode_text(text)[0], dim=0)
        assert float(feature @ target) == pytest.approx(float(score), abs=1e-5)
    with pytest.raises(ValueError, match="1 to 11 tokens after the prompt"):
        climb(backbone, target, length=12, prompt="a photo of")
    with pytest.raises(ValueError, match="1 to 0 tokens"):
        climb(backbone, target, prompt="word " * 90)


def test_every_step_may_have_views_of_its_own(backbone, target):
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    features = fresh_features(backbone, image, 3, 4, seed=1, micro_batch=2)
    assert features.shape == (4, backbone.embed_dim)
    assert len(features.unique(dim=0)) == 4
    again = fresh_features(backbone, image, 3, 2, seed=1, micro_batch=2)
    assert torch.equal(again, features[:2])
    # The same target in every step is one target; each step follows its own, all are judged alike.
    same = climb(backbone, target.expand(6, -1), steps=6)
    assert torch.equal(same.ids, climb(backbone, target, steps=6).ids)
    turned = torch.stack([target, -target])
    found = climb(backbone, turned, steps=2)
    assert torch.equal(found.ids[1], climb(backbone, target, steps=2).ids[1])
    assert found.scores.abs().max() < 1e-6


def test_only_tokens_that_the_weights_know_are_chosen():
    demo = load_backbone("demo", "demo")
    known = demo.text_tower.taught()
    assert 2 < int(known.sum()) < len(known)
    target = torch.ones(demo.embed_dim)
    found = climb(demo, target, steps=2)
    assert known[found.ids].all()
    assert int(found.ids.max()) < 49406


def test_a_sequence_depends_on_its_seed_and_number_alone(backbone, target):
    whole = climb(backbone, target, steps=6)
    assert torch.equal(climb(backbone, target, steps=6).ids, whole.ids)
    assert torch.equal(climb(backbone, target, steps=6, micro_batch=1).ids, whole.ids)
    assert torch.equal(climb(backbone, target, steps=6, sequences=2).ids, whole.ids[:, :2])
    assert not torch.equal(climb(backbone, target, steps=6, seed=2).ids, whole.ids)
    torch.set_default_dtype(torch.bfloat16)  # as under --trainer.precision bf16-true
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(climb(backbone, target.clone(), steps=6).ids, whole.ids)
    finally:
        torch.set_default_dtype(torch.float32)
    with pytest.raises(ValueError, match="length"):
        climb(backbone, target, length=15)


def test_views_begin_with_the_image():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 24, 40), dtype=torch.uint8, generator=generator)
    found = views(image, 12, seed=3)
    assert found.shape == (12, 3, 24, 40)
    assert found.dtype == torch.uint8
    assert torch.equal(found[0], image)
    assert torch.equal(found, views(image, 12, seed=3))
    same = [bool((view == image).all()) for view in found[1:]]
    assert not all(same)
    flat = torch.full((3, 8, 8), 77, dtype=torch.uint8)
    assert (views(flat, 6, seed=0) == 77).all()  # the edge goes on, no black corners
    with pytest.raises(ValueError, match="uint8"):
        views(image.float(), 2, seed=0)


def test_mean_feature_does_not_depend_on_the_micro_batch(backbone):
    images = views(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), 5, seed=0)
    tokens = backbone.encode_image(backbone.preprocess(images)).class_token
    expected = F.normalize(tokens, dim=-1).mean(0)
    for size in (1, 2, 5, 9):
        torch.testing.assert_close(mean_feature(backbone, images, size), expected)


def test_words_join_their_pieces(backbone):
    ids = backbone.tokenizer(["a dog, the dogs unbelievablest dog!"])[0]
    content = ids[1 : int(ids.argmax())]
    assert word_frequencies(backbone.tokenizer, content[None]) == {
        "dog": 2,
        "a": 1,
        "dogs": 1,
        "the": 1,
        "unbelievablest": 1,
    }
    assert word_frequencies(backbone.tokenizer, content.repeat(2, 3, 1))["dog"] == 12


def test_word_counts_merge():
    first, second = WordCounts(), WordCounts()
    first.update({"dog": 3, "naïve": 1})
    first.update({})
    second.update({"dog": 1, "x…y": 2})
    states = [torch.cat(m.metric_state["lines"]) for m in (first, second)]
    merged = WordCounts()
    for state in states:
        merged.merge_state({"lines": [state]})
    assert merged.found() == {"dog": (2, 4), "naïve": (1, 1), "x…y": (1, 2)}


def test_seeds_are_the_same_everywhere():
    assert seed_from(0, "a") == seed_from(0, "a") != seed_from(0, "b")
    assert 0 <= seed_from("x") < 2**63
    assert seed_from(3, "photo") == 2324308857373778882
