"""One row of `surgery.attention.RECIPES`: which way the new path of tokens goes, as fields."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from common.errors import InvalidSetting
from common.nearest import did_you_mean

Pair = Literal["qk", "qq", "kk", "vv", "identity", "similarity", "earlier", "near", "kk_all"]

SINK_CHANNELS = {
    768: (4, 162, 189, 326, 429, 474, 633, 713),
    1024: (250, 261, 437, 650, 720, 779, 936, 1005),
}
"""Width of a network -> channels that RF-CLIP names for it: of ViT-B/16 and ViT-L/14."""

LARGE = 24
"""Blocks of ViT-L."""


@dataclass(frozen=True)
class Recipe:
    """How the new path of the reformed blocks is computed.

    Attributes:
        pairs: which projections attend to which, one softmax(a . b / sqrt(d_head)) each; "identity"
            lets every token see itself only; "near" is the softmax of the bias of `neighbour_std` alone,
            times the mean lengths of queries and keys / sqrt(d_head); "similarity" is made of another
            block's cells (see `similarity_block`), "earlier" of earlier attention (see
            `attention_blocks`); "kk_all" is the mean of k-k over all blocks, among cells, on the way of
            RF-CLIP (`towers._paths.AllBlocksPath`). No pairs: no new path, plain CLIP.
        summary: what the method is, in a line.
        combine: several softmaxes are averaged or summed (SCLIP's rows sum to 2), or these are their
            weights.
        blocks: how many of the last blocks are reformed; None: what `load_backbone` was asked for.
        reads: the new path attends over ln_1 of the original path ("original"; dual path) or over
            its own tokens ("itself"; a single path, beside which the original one only serves the
            class token).
        residual: keep the skip connection of the attention.
        ffn: keep the feed-forward part; "only": the new path takes nothing but what the original path's
            feed-forward parts add, and pairs play no part (it has to be a ViT).
        cosine_scale: the projections are scaled to unit length, so that the logits are cosines times
            this / sqrt(d_head); None: their products as they are.
        iterations: rounds of self-clustering before the values are read (GEM, Section 3.2): the
            projections are scaled to unit length, attend among themselves, and so on; the logits
            are then cosines times the mean length of the block's input / sqrt(d_head).
        neighbour_std: a Gaussian of this standard deviation, in cells, is added to the logits
            between patches (NACLIP); None: no bias.
        alignment_rounds: Newton-Schulz rounds by which the keys are turned towards the queries (PEARL),
            see `attend.aligned`; None: exactly, by an SVD; 0: they are not turned. The centred keys' own
            products are added to the logits, times `alpha`.
        alpha: of the above.
        similarity_block: M are the cosines of the cells that leave this block, counted from 0. The cells
            of the new path are averaged by M before the last block's attention, and "similarity" is
            softmax(3 (M - mean M)) over what is above the mean (SC-CLIP, SFP). It has to be a ViT.
        floored: similarities below 0.4 are 0 in "similarity" too, and not only in the averages.
        smoothing_block: the cells of this one, from 0, are what the averages after the attention are
            taken by.
        summed_blocks: first and past the last block, the sum of whose tokens takes the same way
            (without the first average, and with `summed_pairs`), and is added.
        summed_pairs: of that sum; None: `pairs`.
        outliers: which cells are replaced by their neighbours' mean first, see `smoothing.outliers`.
        outlier_factor: see there.
        class_share: how much of the class token is added to each cell after the attention.
        attention_blocks: first and past the last block, as in a slice, of whose attention "earlier" is
            made: balanced as `attend.balanced` does it (CLIPer), or their mean.
        balanced: which of these two.
        label_share: how much of the logits says whether a first pass, without this, gives two cells the
            label of the same text (ResCLIP), see `surgery.agreement`; 0: there is no such pass. Nothing
            else here needs texts.
        label_scale: what these logits are multiplied with.
        label_threshold: probability below which a pixel gets the label of the first text.
        sink_channels: of "kk_all": cells with one of these channels too large are toned down as they
            leave a block, in the original path too; None: those that RF-CLIP names, for networks of
            width 768 and 1024.
        sink_factor: how many times the mean channel is too large.
        refocused: cells that others attend to too much give some of it back, in the original path too.
        large: what stands in its place on a network of 24 blocks (ViT-L), but for fields that were
            changed; None: it itself.
        position: how position embeddings are resized to another grid, see `towers.resize_positions`;
            "none": there are none.
        released_class_token: which path's class token the released code returns. Ours is CLIP's own
            unless `load_backbone(class_token="released")` asks for this one.
    """

    pairs: tuple[Pair, ...]
    summary: str = ""
    combine: Literal["mean", "sum"] | tuple[float, ...] = "mean"
    blocks: int | None = None
    reads: Literal["original", "itself"] = "original"
    residual: bool = True
    ffn: bool | Literal["only"] = False
    cosine_scale: float | None = None
    iterations: int = 0
    neighbour_std: float | None = None
    alignment_rounds: int | None = 0
    alpha: float = 0.08
    similarity_block: int | None = None
    floored: bool = False
    smoothing_block: int = 0
    summed_blocks: tuple[int, int] = (0, 0)
    summed_pairs: tuple[Pair, ...] | None = None
    outliers: Literal["density", "class", "length"] = "density"
    outlier_factor: float = 1.5
    class_share: float = 0.3
    attention_blocks: tuple[int, int] | None = None
    balanced: bool = True
    label_share: float = 0.0
    label_scale: float = 2.1
    label_threshold: float = 0.1
    sink_channels: tuple[int, ...] | None = None
    sink_factor: float = 5.0
    refocused: bool = False
    large: "Recipe | None" = None
    position: Literal["bilinear", "bicubic", "bicubic_scaled", "none"] = "bilinear"
    released_class_token: Literal["original", "new"] = "new"

    def blocks_read(self, depth: int) -> dict[str, range]:
        """Field -> the blocks, from 0, of a network of so many, whose tokens or attention it asks for."""
        read = {}
        if self.attention_blocks is not None:
            first, end = (n + depth if n < 0 else n for n in self.attention_blocks)
            read["attention_blocks"] = range(first, end)
        if self.similarity_block is not None:
            read["similarity_block"] = range(self.similarity_block, self.similarity_block + 1)
            read["smoothing_block"] = range(self.smoothing_block, self.smoothing_block + 1)
            read["summed_blocks"] = range(*self.summed_blocks)
        return read

    def needs(self) -> str:
        """Which towers and blocks, and whether texts: one line."""
        asked = "last block" if self.blocks == 1 else "last blocks: --model.backbone.blocks"
        parts = [asked if self.pairs else "no block"]
        if self.needs_texts:
            parts.append("texts")
        if self.blocks_read(LARGE) or self.ffn == "only" or "kk_all" in self.pairs:
            parts.append("ViT")
        parts += [f"{name}={getattr(self, name)}" for name in self.blocks_read(LARGE)]
        if "kk_all" in self.pairs and self.sink_channels is None:
            parts.append(f"sink_channels, or a width of {' or '.join(map(str, SINK_CHANNELS))}")
        return "; ".join(parts)

    @property
    def needs_texts(self) -> bool:
        """Whether the tokens depend on the texts that they will be compared with."""
        return self.label_share > 0

    @property
    def asks_with_queries(self) -> bool:
        """Whether the new path needs the queries of CLIP's own attention."""
        return self.reads == "original" and bool({"qk", "qq", "near"}.intersection(self.pairs))


def changed(row: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A row with other values in some fields, as a config has them.

    Args:
        row: the recipe to start from.
        changes: field -> value; lists stand for tuples.

    Returns:
        The recipe.

    Raises:
        InvalidSetting: no such field, or a value of another type.
    """
    types = get_type_hints(Recipe)
    settable = [field for field in types if field not in ("large", "summary")]
    values = {field: _tuples(value) for field, value in changes.items()}
    for field, value in values.items():
        if field not in settable:
            known, hint = ", ".join(settable), did_you_mean(field, settable)
            raise InvalidSetting(f"attention: recipes have no field {field!r} among {known}{hint}")
        if not _fits(value, types[field]):
            raise InvalidSetting(
                f"attention: {field}={changes[field]!r} is not of the type {types[field]}"
            )
    return replace(row, **values)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type, as the fields of `Recipe` are annotated."""
    of = get_args(kind)
    if get_origin(kind) is Literal:
        return any(type(value) is type(one) and value == one for one in of)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        each = of[:1] * len(value) if of[-1] is ... else of
        return len(each) == len(value) and all(map(_fits, value, each))
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in of)
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(
            value, bool
        )
    return isinstance(value, kind)
