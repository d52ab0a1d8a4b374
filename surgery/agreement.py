"""Which cells have the same label: the semantic feedback of ResCLIP (yvhangyang/ResCLIP), in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.features import similarity
from surgery.refine import Affinities

_SCALE = 40.0
_STD = 5.0
_LONGEST = 31
_NUMBERS_AT_ONCE = 1 << 24  # 64 MiB of float32: similarities at pixel resolution held at a time


def label_agreement(
    patch_tokens: Tensor, images: Tensor, text: Tensor, grid: tuple[int, int], threshold: float
) -> Tensor:
    """How much two cells are of one label, by the tokens of a first pass.

    Args:
        patch_tokens: [B, N, C], of that pass.
        images: [B, 3, H, W], as the network is given them.
        text: [T, C].
        grid: (h, w), N = h*w.
        threshold: as of `cell_labels`.

    Returns:
        [B, N, N] in [0, 1]; see `label_affinities`.
    """
    return label_affinities(cell_labels(patch_tokens, images, text, grid, threshold), grid)


def cell_labels(
    patch_tokens: Tensor, images: Tensor, text: Tensor, grid: tuple[int, int], threshold: float
) -> Tensor:
    """The commonest text of each cell's pixels, [B, N] int64; the first of equals.

    Cosines are enlarged to the image bilinearly and refined by PAMR; a pixel's text is the likeliest by a
    softmax over texts of 40 x cosine, or text 0 where that is less than `threshold`.
    """
    scores = similarity(patch_tokens, text).transpose(1, 2).unflatten(2, grid)
    size = (images.shape[2], images.shape[3])
    alike = Affinities.of(images)
    step = max(1, _NUMBERS_AT_ONCE // (len(images) * size[0] * size[1]))
    best = scores.new_full((len(images), *size), -torch.inf)
    total, label = best.clone(), torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, len(text), step):
        part = scores[:, start : start + step]
        maps = alike.refine(F.interpolate(part, size=size, mode="bilinear", align_corners=False))
        top, winner = maps.max(dim=1)
        label = torch.where(top > best, winner + start, label)
        best = torch.maximum(top, best)
        total = torch.logaddexp(total, (_SCALE * maps).logsumexp(dim=1))
    label = label.where((_SCALE * best - total).exp() >= threshold, 0)
    height, width = (pixels // cells for pixels, cells in zip(size, grid, strict=True))
    pixels = label.unflatten(2, (grid[1], width)).unflatten(1, (grid[0], height))
    pixels = pixels.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)  # [B, N, pixels of a cell]
    counts = torch.zeros(*pixels.shape[:2], len(text), dtype=torch.int32, device=label.device)
    return counts.scatter_add_(2, pixels, torch.ones_like(pixels, dtype=torch.int32)).argmax(dim=2)


def label_affinities(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cells of equal labels, as attention wants them.

    1 where the labels of i and j are equal, else 0; times exp(-steps / most steps) where the straight way
    from i to j meets another label, steps being the larger of its rows and columns. Then each row is
    blurred along j, as cells are numbered (so over the ends of the grid's rows, too), by a Gaussian of a
    standard deviation of 5 cells, and divided by its sum; in the end all by the largest.

    As released, every way is cut into as many steps as the grid's longer side has, and only the first of
    them are taken, as many as there are from i to j: a short way is tested over its first part.

    Args:
        labels: [B, N] int64.
        grid: (h, w), N = h*w.

    Returns:
        [B, N, N] in [0, 1].
    """
    rows, columns = torch.meshgrid(
        *(torch.arange(side, device=labels.device) for side in grid), indexing="ij"
    )
    row, column = rows.flatten(), columns.flatten()
    steps = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
    most = max(grid) - 1
    crosses = torch.zeros_like(labels[:, :, None] == labels[:, None])
    for step in range(most + 1):
        t = step / max(most, 1)
        y, x = (((1 - t) * a[:, None] + t * a).round().long() for a in (row, column))
        met = labels[:, y * grid[1] + x] != labels[:, :, None]
        crosses |= met & (steps >= step)
    equal = (labels[:, :, None] == labels[:, None]).float()
    found = torch.where(crosses, equal * torch.exp(-steps / max(most, 1)), equal)
    length = min(_LONGEST, labels.shape[1])
    length -= 1 - length % 2  # odd, so that it has a middle
    places = torch.arange(length, device=labels.device) - length // 2
    kernel = torch.exp(-places.square() / (2 * _STD**2))
    flat = F.conv1d(found.flatten(0, 1)[:, None], kernel[None, None], padding=length // 2)
    blurred = flat[:, 0].unflatten(0, labels.shape)
    blurred = blurred / blurred.sum(dim=-1, keepdim=True)
    return blurred / blurred.amax(dim=(-2, -1), keepdim=True)
