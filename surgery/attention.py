"""What each training-free method changes in CLIP's image tower, as data.

All of them share one shape. The last blocks of a ViT get a second, *new* path of tokens that
starts as a copy of their input; its patch tokens, after the last norm and projection, are what
is compared with texts. Only the fields of a `Recipe` say how a method walks that path. The
attention pool of CLIP's ResNets follows the same `pairs`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.precision import widen

Pair = Literal["qk", "qq", "kk", "vv", "identity", "similarity", "earlier"]


@dataclass(frozen=True)
class Recipe:
    """How the new path of the reformed blocks is computed.

    Attributes:
        pairs: which projections attend to which, one softmax(a . b / sqrt(d_head)) each; "identity"
            lets every token see itself only, "similarity" is made of another block's cells (see
            `similarity_block`), "earlier" of earlier attention (see `attention_blocks`). No pairs: no
            new path, plain CLIP.
        combine: several softmaxes are averaged or summed (SCLIP's rows sum to 2).
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
            see `_aligned`; 0: they are not turned. The centred keys' own products are added to the
            logits, times `alpha`.
        alpha: of the above.
        similarity_block: M are the cosines of the cells that leave this block, counted from 0. The cells
            of the new path are averaged by M before the last block's attention, and "similarity" is
            softmax(3 (M - mean M)) over what is above the mean (SC-CLIP, SFP). It has to be a ViT.
        floored: similarities below 0.4 are 0 in "similarity" too, and not only in the averages.
        smoothing_block: the cells of this one are what the averages after the attention are taken by.
        summed_blocks: first and past the last block, the sum of whose tokens takes the same way
            (without the first average, and with `summed_pairs`), and is added.
        summed_pairs: of that sum; None: `pairs`.
        outliers: which cells are replaced by their neighbours' mean first, see `smoothing.outliers`.
        outlier_factor: see there.
        class_share: how much of the class token is added to each cell after the attention.
        attention_blocks: first and past the last block, as in a slice, the sum of whose attentions is,
            balanced, the attention "earlier" (CLIPer); see `balanced`.
        large: what stands in its place on a network of 24 blocks (ViT-L); None: it itself.
        position: how position embeddings are resized to another grid, see `towers.resize_positions`;
            "none": there are none.
        released_class_token: which path's class token the released code returns. Ours is CLIP's own
            unless `load_backbone(class_token="released")` asks for this one.
    """

    pairs: tuple[Pair, ...]
    combine: Literal["mean", "sum"] = "mean"
    blocks: int | None = None
    reads: Literal["original", "itself"] = "original"
    residual: bool = True
    ffn: bool | Literal["only"] = False
    cosine_scale: float | None = None
    iterations: int = 0
    neighbour_std: float | None = None
    alignment_rounds: int = 0
    alpha: float = 0.08
    similarity_block: int | None = None
    floored: bool = False
    smoothing_block: int = 0
    summed_blocks: tuple[int, int] = (0, 0)
    summed_pairs: tuple[Pair, ...] | None = None
    outliers: Literal["density", "class"] = "density"
    outlier_factor: float = 1.5
    class_share: float = 0.3
    attention_blocks: tuple[int, int] | None = None
    large: "Recipe | None" = None
    position: Literal["bilinear", "bicubic", "bicubic_scaled", "none"] = "bilinear"
    released_class_token: Literal["original", "new"] = "new"

    @property
    def last_block_read(self) -> int | None:
        """The last of the blocks, from 0, whose tokens it names; None where it names none."""
        if self.similarity_block is None:
            return None
        return max(self.similarity_block, self.smoothing_block, self.summed_blocks[1] - 1)

    @property
    def asks_with_queries(self) -> bool:
        """Whether the new path needs the queries of CLIP's own attention."""
        return self.reads == "original" and any("q" in pair for pair in self.pairs)


_SURGERY = Recipe(pairs=("vv",), released_class_token="original")
_LAST_BLOCK = Recipe(pairs=("qk",), blocks=1, ffn=True, position="bicubic_scaled")
_SC_CLIP = replace(
    _LAST_BLOCK,
    pairs=("similarity", "kk"),
    residual=False,
    ffn=False,
    similarity_block=8,
    smoothing_block=3,
    summed_blocks=(3, 10),
)
# What the author of SC-CLIP names for ViT-L/14 (an issue of its repository)
_SC_CLIP_LARGE = replace(
    _SC_CLIP, similarity_block=16, smoothing_block=6, summed_blocks=(8, 19), class_share=0.1
)

RECIPES: dict[str, Recipe] = {
    # plain CLIP, every token projected
    "raw": Recipe(pairs=()),
    # Li et al. 2023, arXiv 2304.05653 (xmed-lab/CLIP_Surgery): v-v, dual path, no FFN
    "surgery": _SURGERY,
    # Bousselham et al. 2024 (WalBouss/GEM): q-q, k-k and v-v, clustered once
    "gem": replace(
        _SURGERY,
        pairs=("vv", "kk", "qq"),
        iterations=1,
        position="bicubic",
        released_class_token="new",
    ),
    # Zhou et al. 2022 (chongzhou96/MaskCLIP): the last block's values, else unchanged
    "maskclip": replace(_LAST_BLOCK, pairs=("identity",)),
    # Wang et al. 2024 (wangf3014/SCLIP): last block q-q plus k-k
    "sclip": replace(_LAST_BLOCK, pairs=("qq", "kk"), combine="sum"),
    # Lan et al. 2024 (mc-lan/ClearCLIP): last block q-q, neither residual nor FFN
    "clearclip": replace(_LAST_BLOCK, pairs=("qq",), residual=False, ffn=False),
    # Hajimiri et al. 2025 (sinahmr/NACLIP): last block k-k near the token, neither residual nor FFN
    "naclip": replace(_LAST_BLOCK, pairs=("kk",), neighbour_std=5.0, residual=False, ffn=False),
    # Shao et al. 2024 (leaves162/CLIPtrase): last block q-q plus k-k plus v-v
    "cliptrase": replace(_LAST_BLOCK, pairs=("qq", "kk", "vv"), combine="sum"),
    # PEARL (PGSmall/PEARL): last block q-k with aligned keys, neither residual nor FFN
    "pearl": replace(_LAST_BLOCK, alignment_rounds=5, residual=False, ffn=False),
    # SC-CLIP (SuleBai/SC-CLIP): last block k-k and similarity, smoothed by layers before
    "sc_clip": replace(_SC_CLIP, large=_SC_CLIP_LARGE),
    # SFP (Kimsure/SFP, for 12 blocks): the same with other outliers and pairs
    "sfp": replace(
        _SC_CLIP,
        pairs=("similarity", "qq", "kk"),
        floored=True,
        summed_pairs=("similarity",),
        outliers="class",
    ),
    # CLIPer (linsun449/cliper.code): last block by the balanced attention of all before it, neither
    # residual nor FFN
    "cliper": replace(
        _LAST_BLOCK,
        pairs=("earlier",),
        attention_blocks=(0, -1),
        residual=False,
        ffn=False,
        position="bilinear",
    ),
    # The paper's MaskCLIP (Table 5), by comments in its code: the values of the last block, as surgery
    "maskclip_authors": replace(_SURGERY, pairs=("identity",), blocks=1),
    # Table 4, rows 2 to 5 (row 1 is "raw", row 6 "surgery"); what a row means is our reading
    "surgery_last": replace(_SURGERY, blocks=1, ffn=True),
    "surgery_single_path_ffn": replace(_SURGERY, reads="itself", ffn=True),
    "surgery_ffn": replace(_SURGERY, ffn=True),
    "surgery_ffn_only": replace(_SURGERY, ffn="only"),
    # Not in the paper: other pairs, and a single path without FFN
    "surgery_qq": replace(_SURGERY, pairs=("qq",)),
    "surgery_kk": replace(_SURGERY, pairs=("kk",)),
    "surgery_qk": replace(_SURGERY, pairs=("qk",)),
    "surgery_single_path": replace(_SURGERY, reads="itself"),
    # The released code's setting "resnet", which that code itself never turns on
    "surgery_resnet": replace(_SURGERY, cosine_scale=8.0),
    # Guo et al. 2023 (guozix/TaI-DPT, for ResNets): each place's value, no position embeddings
    "tai_dpt": Recipe(pairs=("identity",), position="none"),
}


def attend(
    recipe: Recipe,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int = 0,
    prefix: int = 1,
    bias: Tensor | None = None,
    temperature: Tensor | None = None,
    earlier: Tensor | None = None,
) -> Tensor:
    """The new path's attention.

    Args:
        recipe: how.
        q: [B, heads, L, d_head].
        k: as ``q``.
        v: as ``q``.
        start: the first token that is a query (1 leaves the class token out; it is always a key).
        prefix: how many tokens are before the cells: the class token, or none.
        bias: [L, L], added to the logits.
        temperature: [B, 1, 1, 1], what unit-length logits are multiplied with; needed when
            `recipe.iterations` > 0.
        earlier: [B, heads, L, L], `balanced` attention of earlier blocks, of the pair "earlier".

    Returns:
        [B, heads, L - start, d_head].
    """
    projections = {"q": q, "k": k, "v": v}
    mask = None if bias is None else bias[start:].to(q.dtype)
    total: Tensor | None = None
    for pair in recipe.pairs:
        if pair == "identity":
            output = v[:, :, start:]
        elif pair == "earlier":
            if earlier is None:
                raise ValueError('the pair "earlier" needs the attention of earlier blocks')
            output = earlier[:, :, start:].to(v.dtype) @ v
        else:
            queries, keys = projections[pair[0]], projections[pair[1]]
            scale = None
            if recipe.cosine_scale is not None:
                queries, keys = _unit(queries), _unit(keys)
                scale = recipe.cosine_scale * queries.shape[-1] ** -0.5
            if recipe.iterations:
                if temperature is None or pair[0] != pair[1]:
                    raise ValueError("iterations need a temperature and self-self pairs")
                queries, keys = _cluster(queries, temperature, recipe.iterations)
                scale = 1.0
            own = mask
            if recipe.alignment_rounds:
                keys, centred = _aligned(queries, keys, recipe.alignment_rounds, prefix)
                more = recipe.alpha * centred[:, :, start:] @ centred.transpose(-2, -1)
                more = (more * queries.shape[-1] ** -0.5).to(q.dtype)
                own = more if mask is None else mask + more
            output = F.scaled_dot_product_attention(
                queries[:, :, start:], keys, v, attn_mask=own, scale=scale
            )
        total = output if total is None else total + output
    if total is None:
        raise ValueError("a recipe without pairs has no new path")
    many = len(recipe.pairs) > 1 and recipe.combine == "mean"
    return total / len(recipe.pairs) if many else total


def _unit(x: Tensor) -> Tensor:
    """Unit vectors, with the released code's guard against zeros."""
    x32 = x.float()
    return (x32 / (x32.norm(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def _cluster(x: Tensor, temperature: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """GEM's self-self attention on unit vectors; returns queries (times temperature) and keys."""
    x = F.normalize(x.float(), dim=-1).to(x.dtype)
    for _ in range(iterations):
        x = F.scaled_dot_product_attention(x * temperature.to(x.dtype), x, x, scale=1.0)
        x = F.normalize(x.float(), dim=-1).to(x.dtype)
    return x * temperature.to(x.dtype), x


def _aligned(q: Tensor, k: Tensor, rounds: int, prefix: int) -> tuple[Tensor, Tensor]:
    """PEARL's alignment of keys with queries, per head, in float32.

    With w = lengths of q, 0 for the class token, divided by their sum, and q', k' without their weighted
    mean: M = k'^T q' (d_head x d_head) and R = M (M^T M)^(-1/2), of which the inverse root is found by
    Newton-Schulz rounds. The released 5 are far from converged, and part of the method.

    Args:
        q: [B, heads, L, d_head].
        k: of the same shape.
        rounds: of Newton-Schulz.
        prefix: how many tokens are before the cells.

    Returns:
        k R in their precision, and k' in float32; [B, heads, L, d_head] each.
    """
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = widen(q), widen(k)
        weights = queries.norm(dim=-1, keepdim=True)
        weights[:, :, :prefix] = 0
        weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-6)
        queries, centred = (x - (weights * x).sum(dim=2, keepdim=True) for x in (queries, keys))
        turn = centred.transpose(-2, -1) @ queries
        square = turn.transpose(-2, -1) @ turn
        size = square.norm(dim=(-2, -1), keepdim=True)
        one = torch.eye(q.shape[-1], dtype=square.dtype, device=square.device)
        root, inverse = square / size + 1e-6 * one, one
        for _ in range(rounds):
            step = (3 * one - inverse @ root) / 2
            root, inverse = root @ step, step @ inverse
        return (keys @ (turn @ inverse / size.sqrt())).to(k.dtype), centred


def balanced(weights: Tensor, rounds: int) -> Tensor:
    """CLIPer's attention, from the sum of that of earlier blocks, in float32.

    Columns and rows are divided by their sums, in turns; R of the last round gives C = (R + R^T) / 2, of
    which each column loses its mean, what is negative, and each row is divided by its sum.

    Args:
        weights: [B, heads, L, L].
        rounds: as many as blocks: the released code divides in place, once more for each of the layers
            whose tokens it makes, and the last layer's are those that count.

    Returns:
        [B, heads, L, L], rows sum to 1.
    """
    for _ in range(rounds):
        weights = weights / weights.sum(dim=-2, keepdim=True)
        weights = weights / weights.sum(dim=-1, keepdim=True)
    found = (weights + weights.transpose(-2, -1)) / 2
    found = (found - found.mean(dim=-2, keepdim=True)).clamp(min=0)
    return found / found.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


def neighbour_bias(
    grid: tuple[int, int], std: float, device: torch.device, *, prefix: int = 1
) -> Tensor:
    """NACLIP's omega [prefix + h*w, prefix + h*w] in float32: exp(-distance^2 / (2 std^2)) between cells.

    Distances are in cells; rows and columns of the tokens before the cells (the class token) are 0.
    """
    rows, columns = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float32, device=device) for n in grid), indexing="ij"
    )
    cells = torch.stack([rows.flatten(), columns.flatten()], dim=1)
    squared = (cells[:, None] - cells[None]).square().sum(-1)
    return F.pad(torch.exp(-squared / (2 * std**2)), (prefix, 0, prefix, 0))
