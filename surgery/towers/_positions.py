"""Position embeddings for another grid than the weights' own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.precision import widen


def resize_positions(
    positions: Tensor, native: tuple[int, int], grid: tuple[int, int], mode: str
) -> Tensor:
    """Position embeddings of the native grid, resized to another.

    Args:
        positions: [P + h0*w0, D], those of P tokens before the cells first: 1, the class token, or 0.
        native: (h0, w0).
        grid: (h, w).
        mode: "bilinear" (CLIP Surgery; no corner alignment, no antialias); "bicubic" (GEM, with
            antialias); "bicubic_scaled" (SCLIP and its descendants: bicubic, no antialias, where
            output cell i reads position (i + 0.5) g / (G + 0.1) - 0.5, since their code passes a
            scale factor); "none": zeros.

    Returns:
        [P + h*w, D] in float32 (or float64).
    """
    positions = widen(positions.detach())
    prefix = len(positions) - native[0] * native[1]
    if mode == "none":
        return positions.new_zeros(prefix + grid[0] * grid[1], positions.shape[1])
    if grid == native:
        return positions
    cells = positions[prefix:].reshape(1, *native, -1).permute(0, 3, 1, 2)
    if mode == "bilinear":
        cells = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
    elif mode == "bicubic":
        cells = F.interpolate(cells, size=grid, mode="bicubic", antialias=True)
    elif mode == "bicubic_scaled":
        factors = [(new + 0.1) / old for new, old in zip(grid, native, strict=True)]
        cells = F.interpolate(cells, scale_factor=factors, mode="bicubic", align_corners=False)
    else:
        raise InvalidSetting(f"unknown position embedding resize {mode!r}")
    return torch.cat([positions[:prefix], cells.flatten(2)[0].T])
