"""What all Vision Transformers have in common: one loop over the blocks, and the recipes' new paths.

Whose blocks they are, and what they are made of, is said by `open_clip_vit.py`, `timm_vit.py` and
`eva.py`; the recipes' paths of tokens are in `_paths.py`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.agreement import label_agreement
from surgery.attention import for_depth
from surgery.recipe import SINK_CHANNELS, Recipe
from surgery.towers._blocks import add
from surgery.towers._paths import NewPath, path_of
from surgery.towers._tower import ImageTokens, Plan, Step, Tower, Visitor


class ViT(Tower):
    """A stack of blocks, each an attention and a feed-forward part beside a residual connection.

    A subclass says of what: how images become tokens, the parts of a block, and the way from the last
    block to the joint space.

    Attributes:
        blocks: the library's modules, from the first one on.
    """

    kind = "ViT"
    blocks: Sequence[Any]

    @property
    def has_modules(self) -> bool:
        """Where a class token gathers what the modules add."""
        return self.has_class_token

    def plan(self, recipe: Recipe, blocks: int | str, released: bool) -> Plan:
        """Settle a recipe; see `Tower.plan`.

        Raises:
            InvalidSetting: also where it names a block that isn't before the last one, or reads a class
                token that the tower has not.
        """
        recipe = for_depth(recipe, self.depth)
        if recipe.similarity_block is not None and not self.has_class_token:
            raise InvalidSetting(
                "this recipe reads the class token of the blocks before the last one; this image tower "
                f"{self.pooled_by}. Recipes without `similarity_block` can be had of it."
            )
        for field, read in recipe.blocks_read(self.depth).items():
            if read and (read[0] < 0 or read[-1] >= self.depth - 1):
                raise InvalidSetting(
                    f"{field}: this recipe reads blocks {read[0]} to {read[-1]} (from 0) before the last "
                    f"one, and the tower has {self.depth} blocks: give it others, with "
                    f"dataclasses.replace(recipe, {field}=...) or --model.backbone.attention.{field}"
                )
        if "kk_all" in recipe.pairs:
            recipe = replace(recipe, sink_channels=self._sink_channels(recipe))
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
        class_only = class_only and self.pooling == "class"
        x = self.embed(images, positions)
        rotary = self.rotary(self.grid((images.shape[2], images.shape[3])))
        hidden = None if visitor.apart else self.workspace(x)
        for index, block in enumerate(self.blocks):
            kept = 1 if class_only and index == len(self.blocks) - 1 else None
            step = Step(index, block, x, kept, hidden=hidden, tower=self, rotary=rotary)
            visitor.enter(step)
            step.normed = self.read(block, step.x)
            if kept is None or visitor.reads_queries:
                step.q, step.k, step.v = self.heads(block, step.normed, rotary=rotary)
            else:
                (step.q,) = self.heads(block, step.normed[:, :kept], "q")
                step.k, step.v = self.heads(block, step.normed, "kv", rotary)
            output = visitor.attend(step)
            x = step.x if kept is None else step.x[:, :kept].contiguous()
            if visitor.apart:
                step.attended = self.attended(block, output)
                x = x + step.attended
                step.fed = self.fed(block, x)
                x = x + step.fed
            else:
                x = self.add_attention(block, x, output)
                x = self.add_mlp(block, x, hidden)
            step.x = x
            visitor.leave(step)
            x = step.x
        return x

    def _sink_channels(self, recipe: Recipe) -> tuple[int, ...]:
        """The recipe's, or those that RF-CLIP names for this width."""
        width = self.positions.shape[1]
        known = SINK_CHANNELS.get(width)
        channels = known if recipe.sink_channels is None else recipe.sink_channels
        if channels is None or not all(0 <= channel < width for channel in channels):
            widths = " and ".join(str(width) for width in SINK_CHANNELS)
            wrong = f"RF-CLIP names them for networks of width {widths} only"
            wrong = wrong if channels is None else f"there is none of {list(channels)} that fits"
            raise InvalidSetting(
                f"sink_channels: {wrong}, and this tower has width {width}: give channels from 0 to "
                f"{width - 1}, and the sink_factor that goes with them, by dataclasses.replace(recipe, "
                f"sink_channels=...) or --model.backbone.attention.sink_channels; an empty list leaves "
                f"all cells as they are"
            )
        return tuple(channels)

    def encode(
        self, images: Tensor, positions: Tensor, plan: Plan, texts: Tensor | None = None
    ) -> ImageTokens:
        """Tokens by a plan; see `Tower.encode`.

        With x the original path and y the new one, each reformed block l does
            y <- y + out_proj(attention(ln_1(x)))           (recipe "surgery", Eq. 6-7 of the paper)
            x <- the block as it always was
        and at the end patches come from y and the class token from x, both through ln_post and
        projection. In the last block only x's class token is still of use, so only it is computed
        (all of x, where the class token is made of the patches).
        """
        grid = self.grid((images.shape[2], images.shape[3]))
        if not plan.blocks:
            x = self.run(images, positions)
            return ImageTokens(self.pool(x), self.project(x[:, self.prefix :]), grid)
        path = path_of(plan.recipe)(plan, self.depth - plan.blocks, grid)
        if plan.recipe.needs_texts:
            path.agree = partial(self._agreement, images=images, texts=texts, path=path)
        x = self.run(images, positions, path, class_only=not path.reads_all)
        class_token = self.pool(path.y if plan.new_class_token else x)
        return ImageTokens(class_token, self.project(path.y[:, self.prefix - path.start :]), grid)

    def _agreement(self, y: Tensor, images: Tensor, texts: Tensor | None, path: NewPath) -> Tensor:
        """`agreement.label_agreement` of the tokens y [B, L, D] of a first pass."""
        assert texts is not None  # Backbone.encode_image asks for them
        tokens = self.project(y[:, self.prefix - path.start :])
        found = label_agreement(tokens, images, texts, path.grid, path.recipe.label_threshold)
        return F.pad(found, (self.prefix, 0, self.prefix, 0))

    @abstractmethod
    def embed(self, images: Tensor, positions: Tensor) -> Tensor:
        """Tokens [B, prefix + h*w, D] that enter the first block."""

    def rotary(self, grid: tuple[int, int]) -> Tensor | None:
        """What turns queries and keys of the cells of a grid, for `heads`; None where nothing does."""
        return None

    @abstractmethod
    def read(self, block: Any, x: Tensor) -> Tensor:
        """What a block's projections read of tokens x [B, L, D]; x may be wider than the weights."""

    @abstractmethod
    def heads(
        self, block: Any, normed: Tensor, which: str = "qkv", rotary: Tensor | None = None
    ) -> list[Tensor]:
        """Projections as the block's attention takes them: normed and turned where it does that.

        Args:
            block: of `blocks`.
            normed: [B, L, D], of `read`; the cells are the last of them.
            which: neighbours in "qkv".
            rotary: of the cells' grid.

        Returns:
            As many as asked for, [B, heads, L, d_head] each.
        """

    @abstractmethod
    def attended(self, block: Any, output: Tensor) -> Tensor:
        """What a block adds to its tokens for what they saw [B, heads, L, d_head]: [B, L, D]."""

    @abstractmethod
    def fed(self, block: Any, x: Tensor) -> Tensor:
        """What the feed-forward part of a block adds to tokens x [B, L, D]."""

    def workspace(self, x: Tensor) -> Tensor | None:
        """Room for the inner features of tokens x [B, L, D] in every block, where that is of use."""
        return None

    def add_attention(self, block: Any, x: Tensor, output: Tensor) -> Tensor:
        """x [B, L, D] plus `attended`, written into x unless gradients are recorded."""
        return add(x, self.attended(block, output))

    def add_mlp(self, block: Any, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """x [B, L, D] plus `fed`, as `add_attention` does it; `hidden` is a `workspace`."""
        return add(x, self.fed(block, x))
