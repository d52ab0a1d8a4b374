"""CLIP's Vision Transformer: open_clip's `VisionTransformer` with a class token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.attention import Recipe
from surgery.precision import wide_norm, widen
from surgery.towers._blocks import add_attention, add_mlp, heads, workspace
from surgery.towers._paths import NewPath, SmoothedPath
from surgery.towers._tower import ImageTokens, Plan, Step, Tower, Visitor, merge_heads

_LARGE = 24
"""Blocks of ViT-L."""


class ViT(Tower):
    """A stack of blocks, each an attention and an MLP beside a residual connection."""

    has_modules = True

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.patch_size = (visual.patch_size[0], visual.patch_size[1])
        self.depth = len(visual.transformer.resblocks)

    @property
    def positions(self) -> Tensor:
        """The tower's."""
        positions: Tensor = self.visual.positional_embedding
        return positions

    def plan(self, recipe: Recipe, blocks: int | str, released: bool) -> Plan:
        """Settle a recipe; see `Tower.plan`.

        Raises:
            InvalidSetting: also where it names a block that isn't before the last one.
        """
        if recipe.large is not None and self.depth == _LARGE:
            recipe = recipe.large
        last = recipe.last_block_read
        if last is not None and last >= self.depth - 1:
            raise InvalidSetting(
                f"this recipe reads blocks up to {last} (from 0) before the last one, and the tower "
                f"has {self.depth} blocks: give it others, with dataclasses.replace(recipe, "
                f"similarity_block=..., smoothing_block=..., summed_blocks=...)"
            )
        return super().plan(recipe, blocks, released)

    def run(
        self,
        images: Tensor,
        positions: Tensor,
        visitor: Visitor | None = None,
        *,
        class_only: bool = False,
    ) -> Tensor:
        """Patches through all blocks; see `Tower.run`."""
        visitor = visitor or Visitor()
        x = self._embed(images, positions)
        blocks = self.visual.transformer.resblocks
        hidden = None if visitor.apart else workspace(blocks[0].mlp, x)
        for index, block in enumerate(blocks):
            kept = 1 if class_only and index == len(blocks) - 1 else None
            step = Step(index, block, x, kept, hidden=hidden)
            visitor.enter(step)
            step.normed = block.ln_1(step.x)
            if kept is None or visitor.reads_queries:
                step.q, step.k, step.v = heads(block.attn, step.normed)
            else:
                (step.q,) = heads(block.attn, step.normed[:, :kept], "q")
                step.k, step.v = heads(block.attn, step.normed, "kv")
            output = visitor.attend(step)
            x = step.x if kept is None else step.x[:, :kept].contiguous()
            if visitor.apart:
                out = block.attn.out_proj
                step.attended = block.ls_1(F.linear(merge_heads(output), out.weight, out.bias))
                x = x + step.attended
                step.fed = block.ls_2(block.mlp(block.ln_2(x)))
                x = x + step.fed
            else:
                x = add_attention(block, x, output)
                x = add_mlp(block, x, hidden)
            step.x = x
            visitor.leave(step)
            x = step.x
        return x

    def project(self, x: Tensor, *, norm: bool = True) -> Tensor:
        """`ln_post` and projection; see `Tower.project`."""
        with torch.autocast(x.device.type, enabled=False):
            x = wide_norm(self.visual.ln_post, x) if norm else widen(x)
            return x @ self.visual.proj.to(x.dtype)

    def encode(self, images: Tensor, positions: Tensor, plan: Plan) -> ImageTokens:
        """Tokens by a plan; see `Tower.encode`.

        With x the original path and y the new one, each reformed block l does
            y <- y + out_proj(attention(ln_1(x)))           (recipe "surgery", Eq. 6-7 of the paper)
            x <- the block as it always was
        and at the end patches come from y and the class token from x, both through ln_post and
        projection. In the last block only x's class token is still of use, so only it is computed.
        """
        grid = self.grid((images.shape[2], images.shape[3]))
        if not plan.blocks:
            x = self.run(images, positions)
            return ImageTokens(self.project(x[:, :1])[:, 0], self.project(x[:, 1:]), grid)
        kind = NewPath if plan.recipe.similarity_block is None else SmoothedPath
        path = kind(plan, self.depth - plan.blocks, grid)
        x = self.run(images, positions, path, class_only=not path.apart)[:, :1]
        class_token = self.project(path.y[:, :1] if plan.new_class_token else x)[:, 0]
        return ImageTokens(class_token, self.project(path.y[:, 1 - path.start :]), grid)

    def _embed(self, images: Tensor, positions: Tensor) -> Tensor:
        """Class token and patches through ln_pre, [B, 1 + h*w, D]."""
        visual = self.visual
        x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + positions.to(x.dtype)
        x = visual.ln_pre(x)
        # Under autocast too, what all blocks add up is kept in float32: it halves their rounding.
        return widen(x) if torch.is_autocast_enabled(x.device.type) else x
