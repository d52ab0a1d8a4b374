"""From the config of a `CLIPModel` or a `SiglipModel` to open_clip's."""

import json
from pathlib import Path
from typing import Any

from common.errors import InvalidSetting

HERE = "."
"""Name of the tokenizer that is among a model's files."""

_OWN_TOKENIZER = {"hf_tokenizer_name": HERE}
_OPENAI_VOCABULARY = 49408

# What configs leave out, as transformers has it.
_TOWER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_CLIP_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
_SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_SIGLIP_TEXT = {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None}
_IMAGES = {"num_channels": 3, "image_size": 224}
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "text_config": {**_TOWER, **_SMALL, **_CLIP, **_CLIP_TEXT},
        "vision_config": {**_TOWER, **_CLIP, **_IMAGES, "patch_size": 32},
    },
    "siglip": {
        "text_config": {**_TOWER, **_SIGLIP, **_SIGLIP_TEXT},
        "vision_config": {
            **_TOWER,
            **_SIGLIP,
            **_IMAGES,
            "patch_size": 16,
            "vision_use_head": True,
        },
    },
}
"""Kind of model -> its two towers' settings where a config does not name them."""

_REASONS = {
    "siglip2": "it reads images of any shape (NaFlex); those of one size are of type siglip",
    "chinese_clip": "its text tower is a BERT",
    "align": "its image tower is an EfficientNet",
    "blip": "it is a captioning model",
}


def read_config(path: Path) -> dict[str, Any]:
    """open_clip's model config of a `config.json`.

    Args:
        path: the file.

    Returns:
        A config as open_clip's JSON files have; of an image tower of timm `timm_kwargs` says the sizes.

    Raises:
        InvalidSetting: it is of another kind of model, or not understood; names the file and the reason.
    """
    given = read_json(path)
    kind = given.get("model_type")
    if kind not in DEFAULTS:
        reason = _REASONS.get(str(kind), f"expected one of {', '.join(DEFAULTS)}")
        raise InvalidSetting(f"{path}: models of type {kind!r} can't be explained: {reason}")
    try:
        text, vision = (_settings(given, kind, part) for part in ("text_config", "vision_config"))
        _check(text, vision)
        return (_clip if kind == "clip" else _siglip)(given, text, vision)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, InvalidSetting):
            raise InvalidSetting(f"{path}: {error}") from None
        raise InvalidSetting(f"{path}: not a config of a {kind} model ({error})") from error


def _settings(given: dict[str, Any], kind: str, part: str) -> dict[str, Any]:
    """Of one tower, as transformers settles them: old configs say them twice, and the second counts."""
    defaults = DEFAULTS[kind][part]
    settled = {**defaults, **(given.get(part) or {})}
    again = given.get(f"{part}_dict")
    return settled if again is None else {**settled, **defaults, **again}


def _check(text: dict[str, Any], vision: dict[str, Any]) -> None:
    if vision["num_channels"] != 3:
        raise InvalidSetting(f"images of {vision['num_channels']} channels; expected 3")
    for name in ("image_size", "patch_size"):
        if not isinstance(vision[name], int):
            raise InvalidSetting(f"{name}={vision[name]}: expected one number")
    if not vision.get("vision_use_head", True):
        raise InvalidSetting("an image tower without a pooling head: it has no image feature")
    known = ("quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new")
    for settings in (text, vision):
        if settings["hidden_act"] not in known:
            raise InvalidSetting(
                f"activation {settings['hidden_act']!r}; expected one of {', '.join(known)}"
            )


def _clip(given: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    quick = {settings["hidden_act"] == "quick_gelu" for settings in (text, vision)}
    if len(quick) > 1:
        raise InvalidSetting(
            "quick GELU in one tower only, which open_clip's models can't have "
            f"({vision['hidden_act']} and {text['hidden_act']})"
        )
    end = text["eos_token_id"]
    largest = end in (2, text["vocab_size"] - 1)  # 2 is what old configs of OpenAI's models say
    pooling = {"pool_type": "argmax"} if largest else {"pool_type": "eos", "eos_id": end}
    own = {} if text["vocab_size"] == _OPENAI_VOCABULARY else _OWN_TOKENIZER
    return {
        "embed_dim": given.get("projection_dim", 512),
        "quick_gelu": quick == {True},
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            **_sizes(vision),
        },
        "text_cfg": {"heads": text["num_attention_heads"], **_text(text), **pooling, **own},
    }


def _siglip(given: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    acts = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
    return {
        "embed_dim": text["projection_size"] or text["hidden_size"],
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
            "timm_kwargs": {
                "img_size": vision["image_size"],
                "patch_size": vision["patch_size"],
                "embed_dim": vision["hidden_size"],
                "depth": vision["num_hidden_layers"],
                "num_heads": vision["num_attention_heads"],
                "mlp_ratio": _ratio(vision),
                "act_layer": acts.get(vision["hidden_act"], "gelu_tanh"),
                "norm_eps": vision["layer_norm_eps"],
            },
        },
        "text_cfg": {
            "heads": text["num_attention_heads"],
            **_text(text),
            **_OWN_TOKENIZER,
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    }


def _text(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        **_sizes(text),
    }


def _sizes(settings: dict[str, Any]) -> dict[str, Any]:
    approximate = {"approximate": "tanh"}
    tanh = settings["hidden_act"] in ("gelu_pytorch_tanh", "gelu_new")
    return {
        "width": settings["hidden_size"],
        "layers": settings["num_hidden_layers"],
        "mlp_ratio": _ratio(settings),
        "norm_kwargs": {"eps": settings["layer_norm_eps"]},
        **({"act_kwargs": approximate} if tanh else {}),
    }


def _ratio(settings: dict[str, Any]) -> float:
    """Such that its product with the width, rounded down, is the MLP's width."""
    return (settings["intermediate_size"] + 0.5) / settings["hidden_size"]


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidSetting(f"{path}: not a JSON file ({error})") from error
    if not isinstance(found, dict):
        raise InvalidSetting(f"{path}: expected names with values, given {type(found).__name__}")
    return found
