"""Models of the Hugging Face hub, against transformers' own code."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InvalidSetting, UserError
from surgery import Recipe, load_backbone
from surgery.hugging_face._config import DEFAULTS, read_config
from surgery.sources import input_sizes

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "intermediate_size": 51, "vocab_size": 60, "max_position_embeddings": 9}
VISION = {**SIZES, "intermediate_size": 75, "image_size": 48, "patch_size": 16}
KINDS = {
    "clip": {"projection_dim": 24, "text_config": {"eos_token_id": 59}},
    "clip_gelu": {
        "projection_dim": 24,
        "text_config": {"eos_token_id": 2, "hidden_act": "gelu"},
        "vision_config": {"hidden_act": "gelu", "layer_norm_eps": 1e-4},
    },
    "clip_own_end": {"projection_dim": 24, "text_config": {"eos_token_id": 40}},
    "siglip": {"text_config": {}},
    "siglip_gelu": {"text_config": {}, "vision_config": {"hidden_act": "gelu"}},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("clip")`: transformers' model with random weights, and the folder it is in."""
    found = {}

    def save(kind):
        if kind not in found:
            given, name = KINDS[kind], "CLIP" if kind.startswith("clip") else "Siglip"
            config = getattr(transformers, f"{name}Config")(
                **{
                    **given,
                    "text_config": {**TEXT, **given["text_config"]},
                    "vision_config": {**VISION, **given.get("vision_config", {})},
                }
            )
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}Model")(config).eval()
            with torch.no_grad():
                for value in model.parameters():
                    value.add_(0.2 * torch.randn_like(value))
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            found[kind] = model, folder
        return found[kind]

    return save


def token_ids():
    ids = torch.randint(3, 39, (4, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 5], ids[:, 7] = 40, 59
    return ids


def close(given, expected):
    size = float(expected.abs().max())
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=2e-5 * size)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_transformers(kind, saved):
    model, folder = saved(kind)
    backbone = load_backbone(folder, attention="raw")
    images, ids = torch.randn(2, 3, 48, 48), token_ids()
    theirs = model(input_ids=ids, pixel_values=images)
    tokens, text = backbone.encode_image(images), backbone.encode_text(ids)
    image, text = (torch.nn.functional.normalize(x, dim=-1) for x in (tokens.class_token, text))
    close(image, torch.nn.functional.normalize(theirs.image_embeds, dim=-1))
    close(text, torch.nn.functional.normalize(theirs.text_embeds, dim=-1))
    logits = backbone.logit_scale * image @ text.T + (backbone.logit_bias or 0)
    close(logits, theirs.logits_per_image)
    hidden = model.vision_model(pixel_values=images).last_hidden_state
    if kind.startswith("clip"):
        normed = model.vision_model.post_layernorm(hidden[:, 1:])
        close(tokens.patch_tokens, model.visual_projection(normed))
    else:  # each token through the pooling by itself
        alone = model.vision_model.head(hidden.flatten(0, 1)[:, None])
        close(tokens.patch_tokens, alone.unflatten(0, hidden.shape[:2]))
    qk = backbone.with_attention(Recipe(pairs=("qk",), ffn=True, blocks=2))
    close(qk.encode_image(images).patch_tokens, tokens.patch_tokens)
    assert backbone.mean == ((0.5,) * 3 if "siglip" in kind else pytest.approx(backbone.mean))
    assert input_sizes(str(folder)) == (48, 16)
    assert backbone.checkpoint.sha256


def test_what_configs_leave_out_is_as_transformers_has_it():
    for kind, name in (("clip", "CLIP"), ("siglip", "Siglip")):
        for part, tower in (("text_config", "Text"), ("vision_config", "Vision")):
            theirs = getattr(transformers, f"{name}{tower}Config")()
            for key, value in DEFAULTS[kind][part].items():
                if key != "projection_size":  # of SigLIP: the width
                    assert getattr(theirs, key) == value, (kind, part, key)


def test_old_configs_say_it_twice(tmp_path):
    given = {
        "model_type": "clip",
        "text_config": {"hidden_size": 1},
        "text_config_dict": {"hidden_size": 640, "num_attention_heads": 10},
        "vision_config": {"hidden_size": 1024, "num_attention_heads": 16},
    }
    (tmp_path / "config.json").write_text(json.dumps(given))
    config = read_config(tmp_path / "config.json")
    assert (config["text_cfg"]["width"], config["text_cfg"]["heads"]) == (640, 10)
    assert (config["vision_cfg"]["width"], config["vision_cfg"]["head_width"]) == (1024, 64)
    assert config["quick_gelu"]
    assert "hf_tokenizer_name" not in config["text_cfg"]  # OpenAI's, which open_clip has


def test_its_own_tokenizer_is_taken(saved):
    from tokenizers import Tokenizer, models, pre_tokenizers

    _, folder = saved("siglip")
    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "cat": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **options).save_pretrained(folder)
    backbone = load_backbone(folder)
    ids = backbone.tokenizer(["A, cat.", "dog"])
    assert ids.tolist() == [[2, 3, *[0] * 7], [1, *[0] * 8]]
    assert backbone.encode_text(ids).shape == (2, 32)


def test_weights_in_several_files(saved, tmp_path):
    _, folder = saved("clip")
    weights = load_file(folder / "model.safetensors")
    names = list(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, keys in parts.items():
        save_file({key: weights[key] for key in keys}, tmp_path / name)
    index = {"weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    preprocessing = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    backbone = load_backbone(tmp_path)
    assert backbone.fingerprint() == load_backbone(folder).fingerprint()
    assert backbone.mean == (0.1, 0.2, 0.3)
    index["weight_map"][names[0]] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of its folder"):
        load_backbone(tmp_path)


def change(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_folders_that_are_refused(saved, tmp_path):
    _, folder = saved("clip")
    with pytest.raises(InvalidSetting, match=r"no config\.json there"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"neither model.safetensors nor.*Pickled weights are not read"
    ):
        load_backbone(tmp_path)
    trap = tmp_path / "trap"
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Touch(trap)))
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file"):
        load_backbone(tmp_path)
    assert not trap.exists()
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lora.a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 keys unexpected \(lora\.a\)"):
        load_backbone(tmp_path)
    del weights["logit_scale"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"not the weights of a CLIPModel.*logit_scale"):
        load_backbone(tmp_path)
    with pytest.raises(InvalidSetting, match="brings its own weights: pretrained has to be null"):
        load_backbone(tmp_path, "openai")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "siglip2"}, "'siglip2' can't be explained: .*NaFlex"),
        (
            {"model_type": "bert", "auto_map": {"AutoModel": "evil.Model"}},
            "'bert'.*expected one of",
        ),
        ({"vision_config": {"num_channels": 4}}, "images of 4 channels"),
        ({"vision_config": {"hidden_act": "relu"}}, "activation 'relu'"),
        ({"vision_config": {"hidden_act": "gelu"}}, "quick GELU in one tower only"),
        ({"vision_config": {"patch_size": [16, 8]}}, "patch_size=.*one number"),
        ({"vision_config": {"num_attention_heads": 0}}, "not a config of a clip model"),
        ({"text_config": 3}, "not a config of a clip model"),
    ],
)
def test_configs_that_are_refused(fields, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **fields}))
    with pytest.raises(InvalidSetting, match=rf"config\.json: .*{reason}"):
        load_backbone(tmp_path)


def test_the_hub_is_asked_for_what_is_needed(saved, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    _, folder = saved("siglip")
    asked = []

    def fetch(repository, name, revision):
        asked.append((repository, name, revision))
        if not (folder / name).exists():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    backbone = load_backbone("hf:google/siglip@abc")
    assert {(repository, revision) for repository, _, revision in asked} == {
        ("google/siglip", "abc")
    }
    assert not any(name.endswith((".bin", ".py")) for _, name, _ in asked)
    assert backbone.fingerprint() == load_backbone(folder).fingerprint()

    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"config\.json of hf:a/b failed.*no route.*folder"):
        load_backbone("hf:a/b")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"the tokenizer of hf:google/siglip.*failed.*no route"):
        _ = backbone.tokenizer
