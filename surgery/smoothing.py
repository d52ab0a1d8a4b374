"""Cells mended, and made alike where other blocks see the same: what SC-CLIP, SFP and RF-CLIP share.

All are formulas on the cells of a grid, [B, N, D] with N = h*w, row by row, in float32.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = 0.4
"""Similarities below it count for nothing."""

_NEIGHBOURS = 30
_MOST = 10


def similarities(x: Tensor) -> Tensor:
    """Cosines of all pairs of cells [B, N, D]: [B, N, N]."""
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x, dim=-1)
        return unit @ unit.transpose(-2, -1)


def floor(matrix: Tensor) -> Tensor:
    """Similarities with those below 0.4 set to 0."""
    return matrix * (matrix >= _FLOOR)


def aggregate(matrix: Tensor, x: Tensor) -> Tensor:
    """Each cell as the mean of all cells [B, N, D], weighted by the similarities [B, N, N]."""
    floored = floor(matrix)
    with torch.autocast(x.device.type, enabled=False):
        return floored / (floored.sum(dim=-1, keepdim=True) + 1e-6) @ x


def attention(matrix: Tensor) -> Tensor:
    """Similarities as attention: softmax(3 (M - mean M)) over what is not below the mean.

    A cell to which nothing is similar (SFP makes some 0) sees nothing. There the released code of SFP
    divides 0 by 0, and all of the image's tokens are NaN.
    """
    logits = 3 * (matrix - matrix.mean(dim=(-2, -1), keepdim=True))
    return logits.masked_fill(logits < 0, -torch.inf).softmax(dim=-1).nan_to_num(nan=0.0)


def outliers(
    how: Literal["density", "class", "length"], x: Tensor, weights: Tensor, factor: float
) -> Tensor:
    """Which cells say something of the whole image, and nothing of their place: [B, N].

    Args:
        how: "density" (SC-CLIP): those above the 0.95 quantile of (mean density of the 30 nearest cells /
            own density), the density being 30 / squared distance to the 30th. (Its code calls this
            LOF, which it isn't.) "class" (SFP): those that the class token sees more of than
            they see of themselves, times `factor`; at most 10, those it sees most of. "length" (SFP's
            L2): the 10 longest.
        x: [B, N, D].
        weights: [B, 1 + N, 1 + N] attention of the block before, mean over heads.
        factor: of "class".
    """
    if how == "class":
        seen, own = weights[:, 0, 1:], weights.diagonal(dim1=1, dim2=2)[:, 1:]
        found = factor * seen > own
        most = torch.where(found, seen, -torch.inf).topk(min(_MOST, seen.shape[1])).indices
        return found & torch.zeros_like(found).scatter(1, most, True)
    if how == "length":
        longest = x.norm(dim=-1).topk(min(_MOST, x.shape[1])).indices
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, longest, True)
    count = min(_NEIGHBOURS, x.shape[1] - 1)
    if count < 1:
        return x.new_zeros(x.shape[:2], dtype=torch.bool)
    squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = squared.topk(count + 1, dim=-1, largest=False)
    density = count / nearest.values[..., -1]
    around = density[:, None].expand_as(squared).gather(2, nearest.indices[..., 1:])
    score = around.mean(dim=-1) / density
    return score > score.quantile(0.95, dim=1, keepdim=True)


def mend(
    x: Tensor, wrong: Tensor, grid: tuple[int, int], *, lost: Literal["kept", "zero"]
) -> Tensor:
    """Cells [B, N, D] with wrong ones [B, N] replaced by the mean of their clean neighbours.

    Args:
        x: the cells.
        wrong: which.
        grid: (h, w).
        lost: a wrong cell without a clean neighbour (of at most 8) stays, or becomes 0.
    """
    clean = (~wrong)[..., None].to(x.dtype)
    sums = 9 * _around(torch.cat([x * clean, clean], dim=-1), grid)
    count = sums[..., -1:].round()
    mean = sums[..., :-1] / count.clamp(min=1)
    if lost == "kept":
        wrong = wrong & (count[..., 0] > 0)
    return torch.where(wrong[..., None], mean, x)


def tone_down(
    x: Tensor, channels: Sequence[int], factor: float, grid: tuple[int, int], share: float = 0.4
) -> Tensor:
    """Cells with a channel too large, moved towards the mean around them (RF-CLIP).

    With f = cell - its smallest channel, divided by its sum over channels: a cell is over-active where
    the largest f of `channels` is more than factor / number of channels. It becomes (1 - share) of itself
    and `share` of the mean of 3x3 cells around it, of which those outside of the grid are 0.

    Args:
        x: [B, N, D].
        channels: which are looked at.
        factor: how many times the mean of f is too much.
        grid: (h, w).
        share: of the mean around.

    Returns:
        [B, N, D].
    """
    raised = x - x.amin(dim=-1, keepdim=True)
    largest = raised[..., list(channels)].amax(dim=-1) / raised.sum(dim=-1)
    over = largest > factor / x.shape[-1]
    return torch.where(over[..., None], (1 - share) * x + share * _around(x, grid), x)


def refocus(weights: Tensor, prefix: int = 1, limit: float = 0.1, share: float = 0.4) -> Tensor:
    """Attention in which cells that get too much of it give some back (RF-CLIP's title).

    A cell gets too much where the sum over the cells that ask, divided by the number of tokens, is over
    `limit`. It loses `share` of what each cell gives it, which goes to that cell's others in proportion.
    What other tokens ask, and are asked, stays.

    Args:
        weights: [B, heads, L, L].
        prefix: how many of the L tokens are before the cells: the class token, or none.
        limit: in [0, 1].
        share: in [0, 1].

    Returns:
        The same shape; rows sum to what they did.
    """
    cells = weights[..., prefix:, prefix:]
    much = (cells.sum(dim=-2, keepdim=True) / weights.shape[-1]) > limit
    lost, kept = share * cells * much, cells * ~much
    total = kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(cells.dtype).tiny)
    # Where nobody is left to take it, it stays where it was.
    lost = lost * (kept.sum(dim=-1, keepdim=True) > 0)
    changed = weights.clone()
    changed[..., prefix:, prefix:] = cells - lost + kept / total * lost.sum(dim=-1, keepdim=True)
    return changed


def _around(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean of 3x3 cells around each [B, N, D]; those outside of the grid are 0."""
    cells = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), 3, stride=1, padding=1)
    return cells.flatten(2).transpose(1, 2)
