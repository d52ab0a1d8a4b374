"""CLIP's Vision Transformer: open_clip's `VisionTransformer` with a class token.

Where no gradients are recorded, sums and activations are written in place: new tensors for them
would cost about a tenth of the whole forward on a CPU, most of it for fresh pages.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InvalidSetting
from surgery.attention import Pair, Recipe, attend, balanced, neighbour_bias
from surgery.precision import wide_norm, widen
from surgery.smoothing import aggregate, attention, floor, mend, outliers, similarities
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
        hidden = None if visitor.apart else _workspace(blocks[0].mlp, x)
        for index, block in enumerate(blocks):
            kept = 1 if class_only and index == len(blocks) - 1 else None
            step = Step(index, block, x, kept, hidden=hidden)
            visitor.enter(step)
            step.normed = block.ln_1(step.x)
            if kept is None or visitor.reads_queries:
                step.q, step.k, step.v = _heads(block.attn, step.normed)
            else:
                (step.q,) = _heads(block.attn, step.normed[:, :kept], "q")
                step.k, step.v = _heads(block.attn, step.normed, "kv")
            output = visitor.attend(step)
            x = step.x if kept is None else step.x[:, :kept].contiguous()
            if visitor.apart:
                out = block.attn.out_proj
                step.attended = block.ls_1(F.linear(merge_heads(output), out.weight, out.bias))
                x = x + step.attended
                step.fed = block.ls_2(block.mlp(block.ln_2(x)))
                x = x + step.fed
            else:
                x = _add_attention(block, x, output)
                x = _add_mlp(block, x, hidden)
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
        kind = _NewPath if plan.recipe.similarity_block is None else _SmoothedPath
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


class _NewPath(Visitor):
    """The second path of a recipe, beside the original one, from block `first` on."""

    y: Tensor

    def __init__(self, plan: Plan, first: int, grid: tuple[int, int]) -> None:
        self.recipe, self.first, self.grid = plan.recipe, first, grid
        self.reads_queries = plan.recipe.asks_with_queries
        self.apart = plan.recipe.ffn == "only"
        # Nobody reads the new path's class token, unless the new path attends over itself.
        self.start = 0 if plan.new_class_token or plan.recipe.reads == "itself" else 1
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
            self.bias = neighbour_bias(self.grid, self.recipe.neighbour_std, step.x.device)

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
        recipe, block, y = self.recipe, step.block, self.y
        read, q, k, v = step.normed, step.q, step.k, step.v
        if recipe.reads == "itself":
            read = _norm(block.ln_1, y)
            q, k, v = _heads(block.attn, read)
        warmth = temperature(read, q.shape[-1]) if recipe.iterations else None
        earlier = None if self.earlier is None else balanced(self.earlier, step.index + 1)
        output = attend(
            recipe, q, k, v, start=self.start, bias=self.bias, temperature=warmth, earlier=earlier
        )
        if not recipe.residual:
            y = torch.zeros_like(y)
        y = _add_attention(block, y, output)
        self.y = _add_mlp(block, y, step.hidden) if recipe.ffn else y


class _SmoothedPath(_NewPath):
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
        block = step.block
        q, k, v = _heads(block.attn, _norm(block.ln_1, x))
        others = tuple(pair for pair in pairs if pair != "similarity")
        output = seen[:, None].to(v.dtype) @ v
        if others:
            own = replace(self.recipe, pairs=others, combine="sum")
            output = (output + attend(own, q, k, v)) / len(pairs)
        zero = torch.zeros_like(x)
        x = _add_attention(block, zero, output) + self.recipe.class_share * class_token
        return aggregate(self.smoothing, x)


def _workspace(mlp: Any, x: Tensor) -> Tensor | None:
    """Room for the inner features of tokens x [B, L, D] in every block's MLP, [B*L, 4D].

    The largest tensor of the forward: with a new one for every block, a CPU spends as long on
    mapping its pages as on the GELU. GPUs have an allocator that keeps memory.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return None
    weight = mlp.c_fc.weight
    room: Tensor = weight.new_empty(x.shape[0] * x.shape[1], weight.shape[0])
    return room


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """A block's norm, also of tokens that are kept in more bits than its weights have."""
    same = x.dtype == norm.weight.dtype
    return norm(x) if same else wide_norm(norm, x).to(norm.weight.dtype)


def _add_attention(block: Any, x: Tensor, output: Tensor) -> Tensor:
    """x [B, L, D] plus the output projection of what its tokens saw, [B, heads, L, d_head]."""
    out = block.attn.out_proj
    return _add_linear(x, merge_heads(output), out.weight, out.bias, block.ls_1)


def _add_mlp(block: Any, x: Tensor, hidden: Tensor | None = None) -> Tensor:
    """x [B, L, D] plus the feed-forward part of a block; `hidden` is a `_workspace`."""
    mlp, normed = block.mlp, _norm(block.ln_2, x)
    if hidden is None:
        inner = mlp.c_fc(normed)
    else:
        rows = normed.flatten(0, 1).to(hidden.dtype)
        inner = hidden[: len(rows)]
        torch.addmm(mlp.c_fc.bias, rows, mlp.c_fc.weight.T, out=inner)
        inner = inner.view(*x.shape[:2], inner.shape[-1])
    inner = _activate(mlp.gelu, inner)
    return _add_linear(x, inner, mlp.c_proj.weight, mlp.c_proj.bias, block.ls_2)


def _add_linear(
    x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, scale: nn.Module
) -> Tensor:
    """x + scale(inputs @ weight.T + bias), written into x unless gradients are recorded."""
    if torch.is_grad_enabled():
        return x + scale(F.linear(inputs, weight, bias))
    if isinstance(scale, nn.Identity) and x.dtype == inputs.dtype == weight.dtype:
        rows = x.view(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            rows.addmm_(inputs.reshape(-1, inputs.shape[-1]), weight.T).add_(bias)
        return x
    return x.add_(scale(F.linear(inputs, weight, bias)))


def _activate(activation: nn.Module, x: Tensor) -> Tensor:
    """GELU or OpenAI's quick one, written into x unless gradients are recorded."""
    if torch.is_grad_enabled():
        return activation(x)
    if type(activation) is nn.GELU and activation.approximate == "none":
        return torch.ops.aten.gelu_(x)
    if type(activation).__name__ == "QuickGELU":
        return F.silu(x.mul_(1.702), inplace=True).div_(1.702)
    return activation(x)


def _heads(attention: nn.MultiheadAttention, x: Tensor, which: str = "qkv") -> list[Tensor]:
    """Those of q, k and v of tokens [B, L, D] (neighbours in "qkv"), each [B, heads, L, d_head]."""
    first, count = "qkv".index(which), len(which)
    width = x.shape[-1]
    rows = slice(first * width, (first + count) * width)
    out = F.linear(x, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    return [split_heads(part, attention.num_heads) for part in out.chunk(count, dim=-1)]
