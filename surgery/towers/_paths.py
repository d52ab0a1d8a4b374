"""New paths of tokens through a Vision Transformer, beside the original one, as recipes say."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from surgery.attend import attend, balanced, neighbour_bias
from surgery.precision import widen
from surgery.recipe import Pair, Recipe
from surgery.smoothing import (
    aggregate,
    attention,
    floor,
    mend,
    outliers,
    refocus,
    similarities,
    tone_down,
)
from surgery.towers._tower import Plan, Step, Visitor, temperature


class NewPath(Visitor):
    """The second path of a recipe, beside the original one, from block `first` on.

    `reads_all` says that all tokens of the last block are of use, and not the class token alone.
    """

    y: Tensor
    agree: Callable[[Tensor], Tensor]
    """From the tokens of a first pass to `agreement.label_agreement`, for recipes that need texts."""

    def __init__(self, plan: Plan, first: int, grid: tuple[int, int]) -> None:
        self.recipe, self.first, self.grid = plan.recipe, first, grid
        self.last = first + plan.blocks - 1
        self.reads_queries = plan.recipe.asks_with_queries
        self.apart = plan.recipe.ffn == "only"
        self.prefix = plan.prefix
        self.reads_all = self.apart
        # Nobody reads the new path's class token, unless the new path attends over itself.
        whole = plan.new_class_token or plan.recipe.reads == "itself"
        self.start = 0 if whole else plan.prefix
        self.bias: Tensor | None = None
        read = plan.recipe.blocks_read(self.last + 1)
        self.attentions = read.get("attention_blocks", range(0))
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
        see = partial(
            attend,
            recipe,
            *(q, k, v),
            start=self.start,
            prefix=self.prefix,
            bias=self.bias,
            temperature=warmth,
            earlier=self._earlier(step),
        )
        if recipe.needs_texts and step.index == self.last:
            first_pass = self._add(step, y.clone(), see())
            self.y = self._add(step, y, see(agreement=self.agree(first_pass)))
        else:
            self.y = self._add(step, y, see())

    def _earlier(self, step: Step) -> Tensor | None:
        """What the blocks before saw, [B, heads, L, L], where the recipe asks for it."""
        if self.earlier is None:
            return None
        if self.recipe.balanced:
            return balanced(self.earlier, step.index + 1)
        return self.earlier / len(self.attentions)

    def _add(self, step: Step, y: Tensor, output: Tensor) -> Tensor:
        """What comes of the path's tokens y [B, L, D], where they saw `output` [B, heads, L, d_head]."""
        y = y if self.recipe.residual else torch.zeros_like(y)
        y = step.tower.add_attention(step.block, y, output)
        return step.tower.add_mlp(step.block, y, step.hidden) if self.recipe.ffn else y


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


class AllBlocksPath(NewPath):
    """The last block by k-k attention of all blocks, in a tower whose sink cells are mended (RF-CLIP).

    Each block runs as usual (with `smoothing.refocus`, if the recipe asks for it), and then its cells are
    toned down. With h the cells that enter the last block, m the mean of those that leave each, M the
    similarities of m above 0.4, and A(z) the mean over blocks of softmax(k . k / sqrt(d_head)), the last
    block's by ln_1(z), the class token's column left out after the softmax:
        y = out_proj(A(M h) v(M h) + A(M m) v(M m)) / 2
    """

    def __init__(self, plan: Plan, first: int, grid: tuple[int, int]) -> None:
        super().__init__(plan, first, grid)
        self.start, self.reads_all = self.prefix, True
        self.seen: Tensor | None = None
        self.mean: Tensor | None = None

    def enter(self, step: Step) -> None:
        if step.index == self.last:
            self.entering = widen(step.x).clone()

    def attend(self, step: Step) -> Tensor:
        if step.index == self.last:
            return super(NewPath, self).attend(step)
        seen = _among_keys(step.k, self.prefix)
        self.seen = seen if self.seen is None else self.seen + seen
        if not self.recipe.refocused:
            return super(NewPath, self).attend(step)
        return refocus(widen(step.weights()), self.prefix).to(step.v.dtype) @ step.v

    def leave(self, step: Step) -> None:
        channels, prefix, x = self.recipe.sink_channels, self.prefix, widen(step.x)
        if channels:
            cells = tone_down(x[:, prefix:], channels, self.recipe.sink_factor, self.grid)
            x = torch.cat([x[:, :prefix], cells], dim=1)
            step.x = x.to(step.x.dtype)
        part = x / (self.last + 1)
        self.mean = part if self.mean is None else self.mean + part
        if step.index == self.last:
            self.y = self._last(step, self.mean)

    def _last(self, step: Step, mean: Tensor) -> Tensor:
        """The path's cells [B, N, D]."""
        tower, block = step.tower, step.block
        matrix = floor(similarities(mean[:, self.prefix :]))
        total: Tensor | None = None
        for x in (self.entering, mean):
            z = torch.cat([x[:, : self.prefix], matrix @ x[:, self.prefix :]], dim=1)
            k, v = tower.heads(block, tower.read(block, z), "kv", step.rotary)
            seen = _among_keys(k, self.prefix)
            seen = seen if self.seen is None else self.seen + seen
            output = (seen / (2 * (self.last + 1))).to(v.dtype) @ v[:, :, self.prefix :]
            total = output if total is None else total + output
        assert total is not None
        return tower.add_attention(block, torch.zeros_like(mean[:, self.prefix :]), total)


def path_of(recipe: Recipe) -> type[NewPath]:
    """Which of these a recipe takes."""
    if "kk_all" in recipe.pairs:
        return AllBlocksPath
    return NewPath if recipe.similarity_block is None else SmoothedPath


def _among_keys(k: Tensor, prefix: int) -> Tensor:
    """Attention of keys [B, heads, prefix + N, d_head] to keys, of cells to cells: [B, heads, N, N]."""
    k = widen(k)
    asks = k[:, :, prefix:] * k.shape[-1] ** -0.5
    return (asks @ k.transpose(-2, -1)).softmax(dim=-1)[..., prefix:]
