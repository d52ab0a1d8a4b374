"""New paths of tokens through a Vision Transformer, beside the original one, as recipes say."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from surgery.attention import Pair, attend, balanced, neighbour_bias
from surgery.precision import widen
from surgery.smoothing import aggregate, attention, floor, mend, outliers, similarities
from surgery.towers._tower import Plan, Step, Visitor, temperature


class NewPath(Visitor):
    """The second path of a recipe, beside the original one, from block `first` on."""

    y: Tensor

    def __init__(self, plan: Plan, first: int, grid: tuple[int, int]) -> None:
        self.recipe, self.first, self.grid = plan.recipe, first, grid
        self.reads_queries = plan.recipe.asks_with_queries
        self.apart = plan.recipe.ffn == "only"
        self.prefix = plan.prefix
        # Nobody reads the new path's class token, unless the new path attends over itself.
        whole = plan.new_class_token or plan.recipe.reads == "itself"
        self.start = 0 if whole else plan.prefix
        self.bias: Tensor | None = None
        blocks = plan.recipe.attention_blocks
        self.attentions = range(first + plan.blocks)[slice(*blocks)] if blocks else range(0)
        self.earlier: Tensor | None = None

    def enter(self, step: Step) -> None:
        if step.index != self.first:
            return
        # In the blocks' precision the few sums of the new path would lose digits; these cost
        # nothing.
        y = widen(step.x[:, self.start :])
        self.y = y.clone(memory_format=torch.contiguous_format)
        if self.recipe.neighbour_std is not None:
            std = self.recipe.neighbour_std
            self.bias = neighbour_bias(self.grid, std, step.x.device, prefix=self.prefix)

    def attend(self, step: Step) -> Tensor:
        if step.index >= self.first and not self.apart:
            self._advance(step)
        if step.index not in self.attentions:
            return super().attend(step)
        weights = step.weights()
        wide = widen(weights)
        self.earlier = wide if self.earlier is None else self.earlier + wide
        return weights @ step.v

    def leave(self, step: Step) -> None:
        if step.index >= self.first and self.apart:
            assert step.fed is not None  # wanted apart
            self.y = self.y + step.fed[:, self.start :]

    def _advance(self, step: Step) -> None:
        recipe, tower, block, y = self.recipe, step.tower, step.block, self.y
        read, q, k, v = step.normed, step.q, step.k, step.v
        if recipe.reads == "itself":
            read = tower.read(block, y)
            q, k, v = tower.heads(block, read, rotary=step.rotary)
        warmth = temperature(read, q.shape[-1]) if recipe.iterations else None
        earlier = None if self.earlier is None else balanced(self.earlier, step.index + 1)
        output = attend(
            recipe,
            q,
            k,
            v,
            start=self.start,
            prefix=self.prefix,
            bias=self.bias,
            temperature=warmth,
            earlier=earlier,
        )
        if not recipe.residual:
            y = torch.zeros_like(y)
        y = tower.add_attention(block, y, output)
        self.y = tower.add_mlp(block, y, step.hidden) if recipe.ffn else y


class SmoothedPath(NewPath):
    """Cells of the last block made alike where earlier blocks see the same (SC-CLIP, SFP).

    With X the cells that enter the last block, M and N the similarities of those that leave the recipe's
    `similarity_block` and `smoothing_block`, outliers of X and M mended, and avg a `smoothing.aggregate`:
        X <- avg(M, X)
        X <- out_proj(attention(ln_1(X))) + class_share * class token
        X <- avg(N, X)
    and the same, without its first step, of the sum of the tokens that leave the `summed_blocks`.
    """

    def __init__(self, plan: Plan, first: int, grid: tuple[int, int]) -> None:
        super().__init__(plan, first, grid)
        self.start = 1
        self.summed: Tensor | None = None

    def leave(self, step: Step) -> None:
        recipe, x = self.recipe, widen(step.x)
        if step.index == recipe.similarity_block:
            self.similar = x[:, 1:].clone()
        if step.index == recipe.smoothing_block:
            self.smoothing = similarities(x[:, 1:])
        if recipe.summed_blocks[0] <= step.index < recipe.summed_blocks[1]:
            self.summed = x.clone() if self.summed is None else self.summed + x

    def attend(self, step: Step) -> Tensor:
        if step.index == self.first - 1:
            self.weights = widen(step.weights()).mean(dim=1)
        return super().attend(step)

    def _advance(self, step: Step) -> None:
        recipe, summed = self.recipe, self.summed
        x, class_token = self.y, widen(step.x[:, :1])
        wrong = outliers(recipe.outliers, x, self.weights, recipe.outlier_factor)
        lost: Literal["kept", "zero"] = "kept" if recipe.outliers == "density" else "zero"
        matrix = similarities(mend(self.similar, wrong, self.grid, lost=lost))
        x = aggregate(matrix, mend(x, wrong, self.grid, lost=lost))
        seen = attention(floor(matrix) if recipe.floored else matrix)
        self.y = self._smooth(step, x, class_token, seen, recipe.pairs)
        if summed is not None:
            pairs = recipe.pairs if recipe.summed_pairs is None else recipe.summed_pairs
            more = self._smooth(step, summed[:, 1:], summed[:, :1], seen, pairs)
            self.y = self.y + more

    def _smooth(
        self, step: Step, x: Tensor, class_token: Tensor, seen: Tensor, pairs: tuple[Pair, ...]
    ) -> Tensor:
        """Attention over cells x [B, N, D] alone, the class token's share, and the average."""
        tower, block = step.tower, step.block
        q, k, v = tower.heads(block, tower.read(block, x), rotary=step.rotary)
        others = tuple(pair for pair in pairs if pair != "similarity")
        output = seen[:, None].to(v.dtype) @ v
        if others:
            own = replace(self.recipe, pairs=others, combine="sum")
            output = (output + attend(own, q, k, v, prefix=0)) / len(pairs)
        zero = torch.zeros_like(x)
        x = tower.add_attention(block, zero, output) + self.recipe.class_share * class_token
        return aggregate(self.smoothing, x)
