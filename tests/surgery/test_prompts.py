"""The text tower, cropped, and the prompt ensemble with its cache."""

import copy
import os
import time

import pytest
import torch
import torch.nn.functional as F

from surgery import TEMPLATES, encode_prompts, load_backbone
from surgery import prompts as module


class Words:
    """A tokenizer for the tiny networks: one id a letter; counts how many texts it was given."""

    def __init__(self, shift=1):
        self.shift = shift
        self.texts = 0

    def __call__(self, texts):
        self.texts += len(texts)
        ids = torch.zeros(len(texts), 77, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            letters = [self.shift + ord(letter) for letter in text][:75]
            row[: len(letters) + 2] = torch.tensor([598, *letters, 599])
        return ids


NAMES = ["cat", "potted plant", "x"]
SOME = ("a {}.", "the photograph of the {}, in which it rains.", "{}")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["vit", "rn"])
def test_text_as_released(kind, reference, network):
    backbone, inputs, expected = network(kind), reference("inputs"), reference(kind)
    for ids, name in (("token_ids", "text_features"), ("token_ids_empty", "text_features_empty")):
        given = backbone.encode_text(inputs[ids])
        torch.testing.assert_close(given, expected[name], rtol=0, atol=1e-5)


def test_cropping_is_exact(reference, network):
    backbone, ids = network("vit"), reference("inputs")["token_ids"]
    lengths = []
    hook = backbone.model.transformer.register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    whole = backbone.encode_text(ids)
    for row, expected in zip(ids, whole, strict=True):
        end = int(row.argmax())
        for length in {end + 1, 77}:
            given = backbone.encode_text(row[None, :length])
            torch.testing.assert_close(given[0], expected, rtol=0, atol=1e-5)
            assert lengths[-1] == end + 1
    hook.remove()


def test_features_of_every_token(reference, network):
    backbone, ids = network("vit"), reference("inputs")["token_ids"]
    tokens = backbone.encode_text_tokens(ids)
    assert tokens.shape == (9, 77, 64)
    ends = tokens[torch.arange(9), ids.argmax(-1)]
    torch.testing.assert_close(ends, reference("vit")["text_features"], rtol=0, atol=1e-5)


def test_other_poolings_see_what_they_were_trained_on(folder, tmp_path):
    import json

    config = json.loads((folder / "vit.json").read_text())
    config["text_cfg"]["pool_type"] = "last"
    path = tmp_path / "last.json"
    path.write_text(json.dumps(config))
    backbone = load_backbone(str(path))
    ids = Words()(["cat", "a dog"])
    with torch.no_grad():
        expected = backbone.model.encode_text(ids)
        given = backbone.encode_text(ids[:, :9])
    torch.testing.assert_close(given, expected)
    with pytest.raises(ValueError, match="no feature for each token"):
        backbone.encode_text_tokens(ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 78, dtype=torch.long), "1 to 77 positions, given 78"),
        (torch.zeros(77, dtype=torch.long), r"integers \[T, L\]"),
        (torch.zeros(2, 77), r"integers \[T, L\]"),
        (torch.zeros(0, 77, dtype=torch.long), "one or more texts"),
        (torch.full((1, 3), 49407), "ids from 0 to 599, given 49407 to 49407"),
    ],
)
def test_token_ids_it_refuses(ids, message, network):
    with pytest.raises(ValueError, match=message):
        network("vit").encode_text(ids)


def test_templates():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 85
    assert sum("in the scene" in template for template in TEMPLATES) == 5
    assert all(template.count("{}") == 1 for template in TEMPLATES)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_ensemble(batch_size, network):
    backbone = network("vit")
    given = encode_prompts(backbone, Words(), NAMES, SOME, batch_size=batch_size, cache_dir=False)
    for name, row in zip(NAMES, given, strict=True):
        ids = Words()([template.format(name) for template in SOME])
        with torch.no_grad():
            each = F.normalize(backbone.model.encode_text(ids), dim=-1)  # all 77 positions
        expected = F.normalize(each.mean(0), dim=-1)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)


def test_second_run_reads_the_cache(cache, network):
    backbone, first, second = network("vit"), Words(), Words()
    computed = encode_prompts(backbone, first, NAMES, cache_dir=cache)
    calls = []
    hook = backbone.model.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    start = time.perf_counter()
    read = encode_prompts(backbone, second, NAMES, cache_dir=cache)
    seconds = time.perf_counter() - start
    hook.remove()
    assert torch.equal(read, computed)
    assert not calls
    assert second.texts < first.texts == len(NAMES) * 85 + second.texts
    assert seconds < 0.05
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_what_the_cache_is_keyed_by(cache, network):
    backbone = copy.deepcopy(network("vit"))

    def run(names=NAMES, templates=SOME, tokenizer=None):
        encode_prompts(backbone, tokenizer or Words(), names, templates, cache_dir=cache)
        return len(list(cache.iterdir()))

    assert run() == run() == 1
    assert run(names=NAMES[::-1]) == 2
    assert run(templates=SOME[:2]) == 3
    assert run(tokenizer=Words(shift=2)) == 4
    with torch.no_grad():
        backbone.model.ln_final.bias.add_(0.1)
    assert run() == 5


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "shape"])
def test_damaged_cache_is_computed_again(damage, cache, network, caplog):
    from safetensors.torch import save_file

    backbone = network("vit")
    expected = encode_prompts(backbone, Words(), NAMES, SOME, cache_dir=cache)
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    if damage == "shape":
        save_file({"features": torch.ones(1, 64)}, path)
    else:
        content = {"empty": b"", "garbage": b"?" * 99, "truncated": whole[:-8]}
        path.write_bytes(content[damage])
    assert torch.equal(encode_prompts(backbone, Words(), NAMES, SOME, cache_dir=cache), expected)
    assert "computing again" in caplog.text
    assert path.read_bytes() == whole


def test_cache_that_cannot_be_written(tmp_path, network, caplog):
    (tmp_path / "file").write_text("not a folder")
    features = encode_prompts(
        network("vit"), Words(), NAMES, SOME, cache_dir=tmp_path / "file" / "cache"
    )
    assert features.shape == (3, 64)
    assert "not cached" in caplog.text


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CLIP_SURGERY_CACHE", raising=False)
    assert module._cache_folder(None) == tmp_path / "clip_surgery"
    monkeypatch.setenv("CLIP_SURGERY_CACHE", str(tmp_path / "mine"))
    assert module._cache_folder(None) == tmp_path / "mine"
    assert module._cache_folder(False) is None


def test_precision_of_the_run_does_not_reach_the_cache(cache, network):
    backbone = network("vit")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = encode_prompts(backbone, Words(), NAMES, SOME, cache_dir=cache)
    assert torch.equal(low, encode_prompts(backbone, Words(), NAMES, SOME, cache_dir=False))


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], SOME, "one or more names"),
        ("cat", SOME, "list of one or more names"),
        (NAMES, [], "one or more templates"),
        (NAMES, ["a photo"], "'a photo'"),
    ],
)
def test_what_it_refuses(names, templates, message, network):
    with pytest.raises(ValueError, match=message):
        encode_prompts(network("vit"), Words(), names, templates, cache_dir=False)


def test_stock_tokenizer_of_a_config(tmp_path, folder):
    import json

    config = json.loads((folder / "vit.json").read_text())
    config["text_cfg"] |= {"vocab_size": 49408, "context_length": 32}
    path = tmp_path / "full.json"
    path.write_text(json.dumps(config))
    backbone = load_backbone(str(path))
    assert backbone.tokenizer(["a photo"]).shape == (1, 32)
    assert backbone.encode_text(backbone.tokenizer(["a photo"])).shape == (1, 64)
    assert os.path.basename(backbone.name) == "full.json"
