"""How images are resized: Pillow's bicubic with antialiasing, or as OpenCV does it, without."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_LONG_SIDE = 2048
"""Longer sides than that are not made where the aspect ratio is kept."""

_ONE = 2048
"""What OpenCV's weights are whole numbers of."""


def opencv_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) as mmcv's ``Resize(scale=(2048, short_side), keep_ratio=True)`` has them.

    Example:
        >>> opencv_size((375, 500), 336), opencv_size((100, 3000), 336)
        ((336, 448), (68, 2048))
    """
    scale = min(MAX_LONG_SIDE / max(size), short_side / min(size))
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width


def opencv_bilinear(image: Tensor, size: tuple[int, int]) -> Tensor:
    """What OpenCV's ``resize`` with ``INTER_LINEAR`` makes of bytes, bit by bit, on any device.

    There is no antialiasing: where an image gets smaller, pixels between those that are asked for don't
    count. Weights are rounded to 1/2048 and sums cut off, so that the answer is not that of
    interpolation in floats.

    Args:
        image: uint8 [C, H, W].
        size: (height, width) of the answer.

    Returns:
        uint8 [C, height, width].

    Example:
        >>> opencv_bilinear(torch.tensor([[[0, 255]]], dtype=torch.uint8), (1, 4))
        tensor([[[  0,  64, 191, 255]]], dtype=torch.uint8)
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    (top, bottom, up, down), (left, right, near, far) = (
        (torch.from_numpy(values).to(image.device) for values in _weights(has, wants, inside))
        for has, wants, inside in zip(image.shape[1:], size, (False, True), strict=True)
    )
    pixels = image.to(torch.int32)
    wide = (pixels[:, :, left] * near + pixels[:, :, right] * far) >> 4
    up, down = up[:, None], down[:, None]
    tall = ((wide[:, top] * up) >> 16) + ((wide[:, bottom] * down) >> 16)
    return ((tall + 2) >> 2).clamp_(0, 255).to(torch.uint8)


def _weights(
    has: int, wants: int, inside: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of which two places each new one is made, and how much each counts, along one side.

    Args:
        has: pixels of the image.
        wants: pixels of the answer.
        inside: at the borders, all is taken from one place (OpenCV's columns); otherwise the two are
            the same one, and both are rounded (its rows).
    """
    place = ((np.arange(wants) + 0.5) * (has / wants) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    if inside:
        share[(first < 0) | (first >= has - 1)] = 0
    second = np.clip(first + 1, 0, has - 1)
    first = np.clip(first, 0, has - 1)
    near, far = (np.rint(part * np.float32(_ONE)).astype(np.int32) for part in (1 - share, share))
    return first, second, near, far
