"""What all image towers have in common: tokens in the end, and one way to look inside."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from common.errors import InvalidSetting
from surgery.recipe import Recipe
from surgery.softmax_attention import softmax_attention

_POOLED_BY = {
    "class": "makes its image feature of the class token",
    "mean": "makes its image feature of the mean of its patch tokens, and not of a class token",
    "attention": "makes its image feature by attention over its tokens, and not of a class token",
}


@dataclass(frozen=True)
class ImageTokens:
    """What an image tower says of B images: projected to the joint space, NOT normalised.

    Attributes:
        class_token: [B, C], the image's feature; of a tower without a class token what it pools from
            its patch tokens.
        patch_tokens: [B, h*w, C], row by row.
        grid: (h, w).
    """

    class_token: Tensor
    patch_tokens: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """A recipe settled for one tower.

    Attributes:
        recipe: how the new path is computed.
        blocks: how many of the last blocks are reformed; 0 is plain CLIP.
        new_class_token: the class token is the new path's, and not CLIP's own.
        prefix: how many tokens the tower has before the patches' own.
    """

    recipe: Recipe
    blocks: int
    new_class_token: bool
    prefix: int = 1


@dataclass
class Step:
    """One block while it runs, as a `Visitor` finds it. L tokens, the tower's `prefix` first.

    Attributes:
        index: of the block, from 0.
        block: open_clip's module.
        x: [B, L, D] tokens that enter the block, and later those that leave it. Without gradients
            the tower writes into it: what is to be kept is to be cloned.
        kept: only this many first tokens are wanted of the block; None: all.
        normed: [B, L, D] what the projections read; from `Visitor.attend` on.
        q, k, v: [B, heads, L, d_head]; q of the first `kept` tokens only, unless the visitor
            `reads_queries`.
        attended, fed: [B, L, D] what attention and feed-forward part add to x, in `Visitor.leave`,
            for a visitor that wants them `apart`.
        hidden: room for the inner features of a feed-forward part, or None.
        tower: whose block it is.
        rotary: what turns queries and keys of the cells, or None.
    """

    index: int
    block: Any
    x: Tensor
    kept: int | None = None
    normed: Tensor = field(init=False)
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    attended: Tensor | None = None
    fed: Tensor | None = None
    hidden: Tensor | None = None
    tower: Any = None
    rotary: Tensor | None = None

    def weights(self) -> Tensor:
        """CLIP's own attention: [B, heads, L, L], rows of the first `kept` tokens only."""
        asks = self.q[:, :, : self.kept] * self.q.shape[-1] ** -0.5
        return (asks @ self.k.transpose(-2, -1)).softmax(dim=-1)


class Visitor:
    """Looks at what passes through the blocks of a tower, or changes it; this one does neither.

    A method that needs another layer's tokens, or gradients at some place, overrides the three
    calls below; see `Tower.run`.
    """

    apart: bool = False
    """Whether `Step.attended` and `Step.fed` are wanted: two more tensors a block."""

    reads_queries: bool = True
    """Whether all queries are wanted, also in a block of which only the class token goes on."""

    def enter(self, step: Step) -> None:
        """Before a block: `step.x` are the tokens that enter it, and may be replaced."""

    def attend(self, step: Step) -> Tensor:
        """The block's attention, before its output projection.

        Returns:
            [B, heads, L, d_head] for the first `step.kept` tokens; here CLIP's own attention.
        """
        return softmax_attention(step.q[:, :, : step.kept], step.k, step.v)

    def leave(self, step: Step) -> None:
        """After a block: `step.x` are the tokens that leave it, and may be replaced."""


class Tower(ABC):
    """An image tower, on the weights of one of open_clip's modules.

    Attributes:
        kind: what it is called in messages.
        visual: open_clip's module.
        patch_size: (height, width) of a grid cell in pixels.
        native: (height, width) in pixels of the images it was made for.
        depth: how many blocks can be reformed.
        prefix: how many tokens are before the patches' own: 1, the class token, as a rule.
        pooling: what the image's feature is made of: the class token, the mean of the patch tokens, or
            an attention pooling over all tokens.
    """

    kind: ClassVar[str]
    visual: Any
    patch_size: tuple[int, int]
    depth: int
    prefix: int = 1
    pooling: Literal["class", "mean", "attention"] = "class"

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        side = visual.image_size
        self.native: tuple[int, int] = (side, side) if isinstance(side, int) else tuple(side)

    @property
    def has_class_token(self) -> bool:
        """Whether the first token, and it alone, is none of a patch, and becomes the image's feature."""
        return self.pooling == "class" and self.prefix == 1

    @property
    def pooled_by(self) -> str:
        """Where the image's feature comes from, in words."""
        return _POOLED_BY[self.pooling]

    @property
    def has_modules(self) -> bool:
        """Whether blocks have an attention and a feed-forward part, which add to a class token."""
        return False

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """The weights' own position embeddings [P + h*w, D], of the native grid.

        P is `prefix`, or 0 where the tokens before the patches' own have none.
        """

    @abstractmethod
    def run(
        self,
        images: Tensor,
        positions: Tensor,
        visitor: Visitor | None = None,
        *,
        class_only: bool = False,
    ) -> Tensor:
        """The blocks, one after the other: the one loop there is.

        Args:
            images: [B, 3, H, W], normalised; H and W multiples of `patch_size`.
            positions: position embeddings [P + h*w, D] of this grid.
            visitor: called at every block.
            class_only: the last block is only wanted for the image's feature.

        Returns:
            Tokens [B, prefix + h*w, D] for `project` and `pool` ([B, 1, D] with `class_only`, where
            there is a class token).
        """

    @abstractmethod
    def project(self, x: Tensor, *, norm: bool = True) -> Tensor:
        """Tokens [B, L, D] to the joint space [B, L, C], in float32 (or float64).

        Args:
            x: of the last block.
            norm: with the norm before the projection, where the tower has one.
        """

    def pool(self, x: Tensor) -> Tensor:
        """The image's feature [B, C] of all tokens of the last block, or of its class token alone.

        Args:
            x: [B, prefix + h*w, D], or [B, 1, D] where there is a class token.
        """
        return self.project(x[:, :1])[:, 0]

    @abstractmethod
    def encode(
        self, images: Tensor, positions: Tensor, plan: Plan, texts: Tensor | None = None
    ) -> ImageTokens:
        """Tokens of images [B, 3, H, W] by a plan, for texts [T, C] if it needs them; see `run`."""

    def plan(self, recipe: Recipe, blocks: int | str, released: bool) -> Plan:
        """Settle a recipe.

        Args:
            recipe: any of `RECIPES`, or another.
            blocks: how many last blocks are reformed where the recipe leaves it open, or the first
                one, "from 7".
            released: the class token is that of the method's released code.

        Returns:
            The plan for this tower.

        Raises:
            InvalidSetting: there is no such first block.
        """
        asked = self.last_blocks(blocks)
        if recipe.blocks is not None:
            asked = min(recipe.blocks, self.depth)
        reformed = asked if recipe.pairs else 0
        new = recipe.released_class_token == "new"
        return Plan(recipe, reformed, released and new, self.prefix)

    def last_blocks(self, blocks: int | str) -> int:
        """How many last blocks these are: at most all there are, or from the one called "from N" on.

        Raises:
            InvalidSetting: neither a number nor "from N", or there is no block N, counted from 1.
        """
        if isinstance(blocks, int):
            if blocks < 0:
                raise InvalidSetting(f"blocks={blocks}: expected a number of blocks, 0 or more")
            return min(blocks, self.depth)
        first = re.fullmatch(r"from (\d+)", blocks.strip())
        if not first:
            raise InvalidSetting(
                f"blocks={blocks!r}: expected how many last blocks are reformed, such as 6, or the "
                f"first of them, such as 'from 7'"
            )
        if not 1 <= int(first[1]) <= self.depth:
            raise InvalidSetting(
                f"blocks={blocks!r}: this image tower has {self.depth} blocks to be reformed, counted "
                f"from 1"
            )
        return self.depth + 1 - int(first[1])

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Cells (h, w) of an image of size (H, W) in pixels.

        Raises:
            InvalidSetting: the patches do not divide it.
        """
        rows, columns = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        if (rows * self.patch_size[0], columns * self.patch_size[1]) != size or not rows * columns:
            raise InvalidSetting(
                f"image size {size}: expected (height, width) in multiples of the patch size "
                f"{self.patch_size}"
            )
        return rows, columns


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, D] as [B, heads, L, D / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, L, d_head] as [B, L, heads * d_head]."""
    return x.transpose(1, 2).flatten(2)


def temperature(x: Tensor, d_head: int) -> Tensor:
    """GEM's: mean length of an image's tokens [B, L, D] / sqrt(d_head), [B, 1, 1, 1]."""
    return x.float().norm(dim=-1).mean(dim=-1)[:, None, None, None] * d_head**-0.5
