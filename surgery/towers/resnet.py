"""CLIP's ResNets: open_clip's `ModifiedResNet`, with every token as a query of the attention pool."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.attend import attend, neighbour_bias
from surgery.precision import widen
from surgery.recipe import Recipe
from surgery.towers._tower import (
    ImageTokens,
    Plan,
    Step,
    Tower,
    Visitor,
    merge_heads,
    split_heads,
    temperature,
)


class ResNet(Tower):
    """The attention pool is its one block; a `Visitor` enters with the cells of `layer4`."""

    kind = "ResNet"

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self.patch_size = (32, 32)
        self.depth = 1

    @property
    def positions(self) -> Tensor:
        """The pool's."""
        positions: Tensor = self.visual.attnpool.positional_embedding
        return positions

    def last_blocks(self, blocks: int | str) -> int:
        """The attention pool is the last block of all, whichever the first one is."""
        return super().last_blocks("from 1" if str(blocks).startswith("from ") else blocks)

    def plan(self, recipe: Recipe, blocks: int | str, released: bool) -> Plan:
        """The released code of CLIP Surgery reforms the class token too (against the paper)."""
        if recipe.blocks_read(self.depth) or "kk_all" in recipe.pairs:
            raise InvalidSetting("this recipe reads blocks before the last one: a ResNet has none")
        settled = super().plan(recipe, blocks, released)
        return Plan(recipe, settled.blocks, new_class_token=released)

    def run(
        self,
        images: Tensor,
        positions: Tensor,
        visitor: Visitor | None = None,
        *,
        class_only: bool = False,
    ) -> Tensor:
        """Convolutions, and the attention pool with every token as a query; see `Tower.run`.

        The visitor enters with the cells [B, h*w, D] of `layer4`; their mean, the class token, is
        put in front of them after that.
        """
        visual, visitor = self.visual, visitor or Visitor()
        pool = visual.attnpool
        x = visual.stem(images.to(visual.conv1.weight.dtype))
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))
        step = Step(0, pool, widen(x.flatten(2).transpose(1, 2)), kept=1 if class_only else None)
        visitor.enter(step)
        x = torch.cat([step.x.mean(dim=1, keepdim=True), step.x], dim=1) + positions
        step.normed = x.to(pool.q_proj.weight.dtype)
        step.q, step.k, step.v = (
            split_heads(projection(step.normed), pool.num_heads)
            for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
        )
        step.x = merge_heads(visitor.attend(step))
        visitor.leave(step)
        return step.x

    def project(self, x: Tensor, *, norm: bool = True) -> Tensor:
        """The pool's output projection; see `Tower.project`."""
        projection = self.visual.attnpool.c_proj
        with torch.autocast(x.device.type, enabled=False):
            x = widen(x)
            return F.linear(x, projection.weight.to(x.dtype), projection.bias.to(x.dtype))

    def encode(
        self, images: Tensor, positions: Tensor, plan: Plan, texts: Tensor | None = None
    ) -> ImageTokens:
        """Tokens by a plan: every token goes through `c_proj`; see `Tower.encode`."""
        grid = self.grid((images.shape[2], images.shape[3]))
        if not plan.blocks:
            tokens = self.project(self.run(images, positions))
            return ImageTokens(tokens[:, 0], tokens[:, 1:], grid)
        path = _NewPath(plan, grid)
        own = self.run(images, positions, path, class_only=True)
        tokens = self.project(path.y)
        class_token = tokens[:, 0] if plan.new_class_token else self.project(own)[:, 0]
        return ImageTokens(class_token, tokens[:, 1:], grid)


class _NewPath(Visitor):
    """The reformed attention of every token, beside that of CLIP's own class token."""

    y: Tensor

    def __init__(self, plan: Plan, grid: tuple[int, int]) -> None:
        self.recipe, self.grid = plan.recipe, grid

    def attend(self, step: Step) -> Tensor:
        recipe, bias, warmth = self.recipe, None, None
        if recipe.neighbour_std is not None:
            bias = neighbour_bias(self.grid, recipe.neighbour_std, step.normed.device)
        if recipe.iterations:
            warmth = temperature(step.normed, step.q.shape[-1])
        output = attend(recipe, step.q, step.k, step.v, bias=bias, temperature=warmth)
        self.y = merge_heads(output)
        return super().attend(step)
