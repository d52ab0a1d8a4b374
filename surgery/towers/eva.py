"""timm's `Eva` behind open_clip: EVA-01, EVA-02 and the Perception Encoder (PE-Core)."""

import copy
from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from surgery.towers._blocks import norm_tokens
from surgery.towers.timm_vit import TimmViT


class Eva(TimmViT):
    """Blocks with rotary positions, gates in the MLP, and norms in places of their own.

    Queries and keys of patches are turned by their place on the grid, values are not: v-v attention is
    that of any ViT, q-q and k-k know how far apart two patches are.
    """

    kind = "EVA ViT"
    _block_names = ("EvaBlock", "EvaBlockPostNorm")
    _pools_prefix = True

    def rotary(self, grid: tuple[int, int]) -> Tensor | None:
        """Sines and cosines [h*w, 2 d_head], scaled to the grid that the weights were trained on."""
        rope = self.trunk.rope
        if rope is None:
            return None
        if rope.feat_shape is None:
            found: Tensor = rope.get_embed(shape=grid)
        elif tuple(rope.feat_shape) == grid:
            found = rope.get_embed()
        else:
            rope = copy.deepcopy(rope)
            rope.update_feat_shape(grid)
            found = rope.get_embed()
        return found

    def read(self, block: Any, x: Tensor) -> Tensor:
        """`norm1`, or, where that comes after the attention, the tokens as they are."""
        return x.to(block.norm1.weight.dtype) if _is_post(block) else super().read(block, x)

    def heads(
        self, block: Any, normed: Tensor, which: str = "qkv", rotary: Tensor | None = None
    ) -> list[Tensor]:
        """See `TimmViT.heads`; queries and keys of the cells are turned."""
        parts = super().heads(block, normed, which, rotary)
        if rotary is None:
            return parts
        first = normed.shape[1] - len(rotary)
        half = getattr(block.attn, "rotate_half", False)
        return [
            part if name == "v" else _turned(part, first, rotary, half)
            for name, part in zip(which, parts, strict=True)
        ]

    def attended(self, block: Any, output: Tensor) -> Tensor:
        """Output projection, and the norm or the scale after it."""
        x = self._seen(block.attn, output)
        if _is_post(block):
            return norm_tokens(block.norm1, x)
        return x if block.gamma_1 is None else block.gamma_1 * x

    def fed(self, block: Any, x: Tensor) -> Tensor:
        """MLP, and the norm or the scale after it."""
        if _is_post(block):
            return norm_tokens(block.norm2, block.mlp(x.to(block.norm2.weight.dtype)))
        x = block.mlp(norm_tokens(block.norm2, x))
        return x if block.gamma_2 is None else block.gamma_2 * x


def _is_post(block: Any) -> bool:
    return not hasattr(block, "gamma_1")


def _turned(x: Tensor, first: int, rotary: Tensor, half: bool) -> Tensor:
    """Heads [B, heads, L, d_head], turned from token `first` on."""
    cells = apply_rot_embed_cat(x[:, :, first:], rotary, half=half).to(x.dtype)
    return torch.cat([x[:, :, :first], cells], dim=2)
