"""Enlarging by matrix products: maps of many images at once, each to a size of its own.

Bilinear interpolation is a product with a matrix along either side. A batch of products brings all maps
of a batch onto one canvas, as large as the largest of their sizes, where a GPU would be asked for an
operation an image otherwise. Its numbers are those of `torch.nn.functional.interpolate` up to rounding.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.devices import send
from surgery.features import min_max
from surgery.precision import widen

_KEPT = 1024  # matrices, of some 30 kB each


@lru_cache(_KEPT)
def interpolation(cells: int, pixels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [pixels, cells] that enlarges a line bilinearly, without corner alignment.

    Args:
        cells: numbers along the line.
        pixels: how many they become; also fewer.
        dtype: of the matrix.

    Returns:
        It, on the CPU; its rows sum to 1.

    Example:
        >>> interpolation(2, 4)
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.2500, 0.7500],
                [0.0000, 1.0000]])
    """
    with torch.inference_mode(False):
        line = torch.eye(cells, dtype=dtype)[None]
        return F.interpolate(line, size=pixels, mode="linear", align_corners=False)[0].T


@lru_cache(_KEPT)
def window_interpolation(
    starts: tuple[int, ...],
    length: int,
    side: int,
    cells: int,
    step: int,
    pixels: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The matrix that enlarges the cells of windows along a side, and averages them where they overlap.

    Args:
        starts: where the windows begin.
        length: of each; cells that reach over it are cut off, those that end before are stretched.
        side: of what the windows were cut from.
        cells: of each window.
        step: pixels a cell.
        pixels: that the side becomes.
        dtype: of the matrix.

    Returns:
        [pixels, windows * cells], on the CPU.
    """
    with torch.inference_mode(False):
        part = interpolation(cells, max(length, cells * step), dtype)[:length]
        line = torch.zeros(side, len(starts), cells, dtype=dtype)
        counts = torch.zeros(side, 1, 1, dtype=dtype)
        for number, start in enumerate(starts):
            line[start : start + length, number] += part
            counts[start : start + length] += 1
        line = (line / counts).flatten(1)
        return line if side == pixels else interpolation(side, pixels, dtype) @ line


def stack_padded(matrices: Sequence[Tensor], device: torch.device) -> Tensor:
    """Matrices [n, m] of the CPU as one [G, N, M] on a device, with zeros below and beside each.

    Those that are one object stay one, [n, m].
    """
    if all(matrix is matrices[0] for matrix in matrices):
        return send(matrices[0], device)
    rows, columns = largest([(matrix.shape[0], matrix.shape[1]) for matrix in matrices])
    canvas = torch.zeros(len(matrices), rows, columns, dtype=matrices[0].dtype)
    for place, matrix in zip(canvas, matrices, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    return send(canvas, device)


def on_canvas(maps: Sequence[Tensor]) -> Tensor:
    """Maps [H, W] as one tensor [G, H, W] as large as the largest, with zeros below and beside each."""
    sizes = [(one.shape[0], one.shape[1]) for one in maps]
    if len({*sizes}) == 1:
        return torch.stack([*maps])
    canvas = maps[0].new_zeros(len(maps), *largest(sizes))
    for place, one in zip(canvas, maps, strict=True):
        place[: one.shape[0], : one.shape[1]] = one
    return canvas


def largest(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas (height, width) that all sizes fit on."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def inside(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Which pixels of the canvas are each image's own: bool [G, H, W]."""
    ends = send(torch.tensor(sizes), device)[:, :, None]
    rows, columns = (torch.arange(side, device=device) for side in largest(sizes))
    return (rows < ends[:, 0])[:, :, None] & (columns < ends[:, 1])[:, None]


def padded_maps(similarity: Tensor, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """`similarity_map` of several images, each at its own size on a common canvas, as released.

    Args:
        similarity: [P, h, w], of all texts of all images.
        images: int64 [P], whose similarity each is.
        sizes: (height, width) of each image's maps.

    Returns:
        [P, H, W] in [0, 1], H and W the largest of the sizes; 0 below and beside each map.
    """
    device = similarity.device
    with torch.autocast(device.type, enabled=False):
        down, across = (
            stack_padded([interpolation(cells, size[side]) for size in sizes], device)
            for side, cells in enumerate(similarity.shape[1:])
        )
        down, across = (m if m.ndim == 2 else m[images] for m in (down, across))
        return down @ min_max(widen(similarity)) @ across.mT


def min_max_inside(maps: Tensor, own: Tensor) -> Tensor:
    """`min_max` of maps on a common canvas, which looks at each one's own pixels alone.

    Args:
        maps: [P, H, W], not negative, and 0 elsewhere.
        own: bool [P, H, W], see `inside`.

    Returns:
        [P, H, W] in [0, 1], 0 below and beside each map.
    """
    low = maps.masked_fill(~own, torch.inf).amin((1, 2), keepdim=True)
    maps = (maps - low) * own  # what is beside is 0, no more than the smallest number now
    high = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(high > 0, high, torch.ones_like(high))
