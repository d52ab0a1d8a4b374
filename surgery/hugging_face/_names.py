"""From the names of transformers' weights to open_clip's."""

import torch
from torch import Tensor


def open_clip_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `CLIPModel` or a `SiglipModel` by open_clip's names.

    Args:
        weights: by transformers' names.

    Returns:
        By open_clip's; what is none of such a model keeps its name.

    Raises:
        KeyError: one that is not there.
    """
    siglip = "vision_model.head.probe" in weights
    left = {name: value for name, value in weights.items() if not name.endswith(".position_ids")}
    out: dict[str, Tensor] = {}
    out["logit_scale"] = left.pop("logit_scale")
    text, patch = ("text.", "visual.trunk.") if siglip else ("", "visual.")
    blocks = patch + ("blocks" if siglip else "transformer.resblocks")
    _rename_blocks(left, "text_model.", f"{text}transformer.resblocks", out, _OPEN_CLIP)
    _rename_blocks(left, "vision_model.", blocks, out, _TIMM if siglip else _OPEN_CLIP)
    out[f"{text}token_embedding.weight"] = left.pop("text_model.embeddings.token_embedding.weight")
    out[f"{text}positional_embedding"] = left.pop("text_model.embeddings.position_embedding.weight")
    positions = left.pop("vision_model.embeddings.position_embedding.weight")
    norms = {"text_model.final_layer_norm": f"{text}ln_final"}
    if siglip:
        out["logit_bias"] = left.pop("logit_bias")
        out["visual.trunk.pos_embed"] = positions[None]
        pool, head = "visual.trunk.attn_pool", "vision_model.head"
        out[f"{pool}.latent"] = left.pop(f"{head}.probe")
        for kind in ("weight", "bias"):
            joint = left.pop(f"{head}.attention.in_proj_{kind}")
            out[f"{pool}.q.{kind}"], out[f"{pool}.kv.{kind}"] = joint.tensor_split(
                [len(joint) // 3]
            )
        norms |= {
            "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
            "vision_model.post_layernorm": "visual.trunk.norm",
            f"{head}.attention.out_proj": f"{pool}.proj",
            f"{head}.layernorm": f"{pool}.norm",
            f"{head}.mlp.fc1": f"{pool}.mlp.fc1",
            f"{head}.mlp.fc2": f"{pool}.mlp.fc2",
            "text_model.head": "text.text_projection",
        }
    else:
        out["visual.positional_embedding"] = positions
        out["visual.class_embedding"] = left.pop("vision_model.embeddings.class_embedding")
        out["visual.conv1.weight"] = left.pop("vision_model.embeddings.patch_embedding.weight")
        out["visual.proj"] = left.pop("visual_projection.weight").T
        out["text_projection"] = left.pop("text_projection.weight").T
        norms["vision_model.pre_layrnorm"] = "visual.ln_pre"
        norms["vision_model.post_layernorm"] = "visual.ln_post"
    for theirs, ours in norms.items():
        for kind in ("weight", "bias"):
            out[f"{ours}.{kind}"] = left.pop(f"{theirs}.{kind}")
    return out | left  # what is left belongs to nothing, and is told by its name


_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn.in_proj_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TIMM = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn": "attn.qkv.",
    "self_attn.out_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _rename_blocks(
    left: dict[str, Tensor], tower: str, blocks: str, out: dict[str, Tensor], names: dict[str, str]
) -> None:
    """Move the blocks of a tower to `out`, their three projections as one matrix."""
    start = f"{tower}encoder.layers."
    indices = {name.removeprefix(start).split(".")[0] for name in left if name.startswith(start)}
    for index in indices:
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                where = f"{start}{index}.{theirs}"
                if theirs == "self_attn":
                    parts = [left.pop(f"{where}.{p}_proj.{kind}") for p in "qkv"]
                    out[f"{blocks}.{index}.{ours}{kind}"] = torch.cat(parts)
                else:
                    out[f"{blocks}.{index}.{ours}.{kind}"] = left.pop(f"{where}.{kind}")
