"""Which of open_clip's models can be explained here, by their configs alone, and why others can't."""

import re
from typing import Any

_RESNET_STRIDE = 32
_TIMM_STRIDE = 16

_TIMM_FILES = {"vision_transformer", "vision_transformer_hybrid", "vitamin", "eva"}
"""timm's files whose models are of the classes in `towers.TOWERS`."""

_TIMM_REASONS = {
    "convnext": "it is made of convolutions: there is no attention to be reformed",
    "fastvit": "it is made of convolutions: there is no attention to be reformed, or in one stage only",
    "swin_transformer": "it attends within shifted windows, between which v-v attention can't look",
    "vision_transformer_relpos": "its attention has biases that belong to pairs of queries and keys of "
    "one grid: v-v attention with them is not defined",
}


def why_not(config: dict[str, Any]) -> str | None:
    """Why a model of open_clip can't be explained here; None if it can.

    Args:
        config: open_clip's model config.

    Returns:
        The reason, to be read after the model's name.
    """
    vision = config["vision_cfg"]
    if "multimodal_cfg" in config:
        return (
            "it is a CoCa, a captioning model of another class of open_clip's, whose image features come "
            "of what its attention pooler asks for, not of patches"
        )
    if vision.get("timm_model_name"):
        return _why_not_timm(vision)
    if vision.get("attentional_pool"):
        return (
            "its image tower answers with tokens of an attention pooler, not with tokens of patches"
        )
    if vision.get("pool_type", "tok") not in ("tok", "avg"):
        return f"its image tower pools by {vision['pool_type']!r}; expected 'tok' or 'avg'"
    if vision.get("scaled_cosine_attn"):
        return "its attention is by scaled cosines, which open_clip's own code of it fails at"
    return None


def patch_size(vision: dict[str, Any]) -> int:
    """What sides of images must be multiples of, in pixels, by open_clip's `vision_cfg`."""
    name = vision.get("timm_model_name")
    if "timm_kwargs" in vision:
        return vision["timm_kwargs"]["patch_size"]
    if name:
        found = re.search(r"patch(\d+)", name)
        return int(found[1]) if found else _TIMM_STRIDE  # convolutions before the blocks
    return vision.get("patch_size", 16) if isinstance(vision["layers"], int) else _RESNET_STRIDE


def _why_not_timm(vision: dict[str, Any]) -> str | None:
    import timm

    name = vision["timm_model_name"]
    if not timm.is_model(name):
        return f"its image tower {name} is not known to timm {timm.__version__}"
    file = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
    if file not in _TIMM_FILES:
        reason = _TIMM_REASONS.get(file, "its attention is none that is known here")
        return f"its image tower is timm's {name}, and {reason}"
    pool = vision.get("timm_pool", "avg")
    if pool not in ("", "avg", "token", "map"):
        return f"its image tower {name} pools by {pool!r}; expected 'token', 'avg' or 'map'"
    if vision.get("timm_proj", "linear") == "mlp":
        return f"its image tower {name} ends in an MLP over pooled features, none over patch tokens"
    return None
