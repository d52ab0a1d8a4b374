"""Cells made alike where CLIP's middle layers see the same: what SC-CLIP and SFP share.

All are formulas on the cells of a grid, [B, N, D] with N = h*w, row by row, in float32.
"""

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


def outliers(how: Literal["density", "class"], x: Tensor, weights: Tensor, factor: float) -> Tensor:
    """Which cells say something of the whole image, and nothing of their place: [B, N].

    Args:
        how: "density" (SC-CLIP): those above the 0.95 quantile of (mean density of the 30 nearest cells /
            own density), the density being 30 / squared distance to the 30th. (Its code calls this
            LOF, which it isn't.) "class" (SFP): those that the class token sees more of than
            they see of themselves, times `factor`; at most 10, those it sees most of.
        x: [B, N, D].
        weights: [B, 1 + N, 1 + N] attention of the block before, mean over heads.
        factor: of "class".
    """
    if how == "class":
        seen, own = weights[:, 0, 1:], weights.diagonal(dim1=1, dim2=2)[:, 1:]
        found = factor * seen > own
        most = torch.where(found, seen, -torch.inf).topk(min(_MOST, seen.shape[1])).indices
        return found & torch.zeros_like(found).scatter(1, most, True)
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
    cells = torch.cat([x * clean, clean], dim=-1).transpose(1, 2).unflatten(2, grid)
    sums = 9 * F.avg_pool2d(cells, 3, stride=1, padding=1).flatten(2).transpose(1, 2)
    count = sums[..., -1:].round()
    mean = sums[..., :-1] / count.clamp(min=1)
    if lost == "kept":
        wrong = wrong & (count[..., 0] > 0)
    return torch.where(wrong[..., None], mean, x)
