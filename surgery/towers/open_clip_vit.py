"""open_clip's own `VisionTransformer`: OpenAI's, LAION's, DataComp's, MetaCLIP's, DFN's, CLIPA's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.precision import wide_norm, widen
from surgery.towers import _blocks
from surgery.towers._blocks import add, norm_tokens
from surgery.towers._tower import merge_heads
from surgery.towers.vit import ViT


class OpenClipViT(ViT):
    """Blocks before a last norm and one projection; the image's feature is a class token's, or a mean.

    CLIPA's (`pool_type="avg"`) have a class token too, which sees and is seen, but ends in nothing.
    """

    kind = "ViT of open_clip's own"

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.patch_size = (visual.patch_size[0], visual.patch_size[1])
        self.blocks = visual.transformer.resblocks
        self.depth = len(self.blocks)
        self.pooling = "class" if visual.pool_type == "tok" else "mean"

    @property
    def positions(self) -> Tensor:
        """The tower's."""
        positions: Tensor = self.visual.positional_embedding
        return positions

    def project(self, x: Tensor, *, norm: bool = True) -> Tensor:
        """`ln_post` and projection; see `Tower.project`."""
        with torch.autocast(x.device.type, enabled=False):
            x = wide_norm(self.visual.ln_post, x) if norm else widen(x)
            return x @ self.visual.proj.to(x.dtype)

    def pool(self, x: Tensor) -> Tensor:
        """That of the class token, or the mean over patches before or after the last norm."""
        if self.pooling == "class":
            return super().pool(x)
        if self.visual.final_ln_after_pool:
            return self.project(widen(x[:, 1:]).mean(dim=1, keepdim=True))[:, 0]
        return self.project(x[:, 1:]).mean(dim=1)

    def embed(self, images: Tensor, positions: Tensor) -> Tensor:
        """Class token and patches through ln_pre, [B, 1 + h*w, D]."""
        visual = self.visual
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + positions.to(x.dtype)
        x = visual.ln_pre(x)
        # Under autocast too, what all blocks add up is kept in float32: it halves their rounding.
        return widen(x) if torch.is_autocast_enabled(x.device.type) else x

    def read(self, block: Any, x: Tensor) -> Tensor:
        """`ln_1`."""
        return norm_tokens(block.ln_1, x)

    def heads(
        self, block: Any, normed: Tensor, which: str = "qkv", rotary: Tensor | None = None
    ) -> list[Tensor]:
        """Of one matrix; see `ViT.heads`."""
        parts = _blocks.heads(block.attn, normed, which)
        if _is_plain(block):
            return parts
        norms = {"q": block.attn.ln_q, "k": block.attn.ln_k, "v": nn.Identity()}
        return [norms[name](part) for name, part in zip(which, parts, strict=True)]

    def attended(self, block: Any, output: Tensor) -> Tensor:
        """Output projection and layer scale; of custom blocks with the norms around it."""
        attn = block.attn
        if _is_plain(block):
            seen = merge_heads(output)
            return block.ls_1(F.linear(seen, attn.out_proj.weight, attn.out_proj.bias))
        seen = merge_heads(output if attn.head_scale is None else output * attn.head_scale)
        return block.ls_1(block.ln_attn(attn.out_proj(attn.ln_inner(seen))))

    def fed(self, block: Any, x: Tensor) -> Tensor:
        """Norm, MLP and layer scale."""
        return block.ls_2(block.mlp(norm_tokens(block.ln_2, x)))

    def workspace(self, x: Tensor) -> Tensor | None:
        """Of the first block's MLP, as those of all are alike."""
        return _blocks.workspace(self.blocks[0].mlp, x)

    def add_attention(self, block: Any, x: Tensor, output: Tensor) -> Tensor:
        """x [B, L, D] plus `attended`; see `ViT.add_attention`."""
        if _is_plain(block):
            return _blocks.add_attention(block, x, output)
        return add(x, self.attended(block, output))

    def add_mlp(self, block: Any, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """x [B, L, D] plus `fed`; see `ViT.add_mlp`."""
        if _is_plain(block):
            return _blocks.add_mlp(block, x, hidden)
        return add(x, self.fed(block, x))


def _is_plain(block: Any) -> bool:
    """Whether a block is CLIP's, and none of open_clip's custom ones with norms in between."""
    return isinstance(block.attn, nn.MultiheadAttention)
