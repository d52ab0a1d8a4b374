"""Whole images, tiles or sliding windows: what the network sees at once, and its similarities there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.backbone import Backbone
from surgery.features import similarity
from surgery.towers import ImageTokens

_WINDOWS_AT_ONCE = 8

Compare = Callable[[ImageTokens, list[int]], Tensor]
"""Tokens of b windows, and which images these are of -> [b, N, T]."""


@dataclass(frozen=True)
class Window:
    """A rectangle of an image that the network sees at once.

    Attributes:
        top, left: its first row and column of pixels.
        height, width: in pixels.
    """

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor) -> Tensor:
        """That part of an image [..., H, W]."""
        bottom, right = self.top + self.height, self.left + self.width
        return image[..., self.top : bottom, self.left : right]


def cut_windows(
    size: tuple[int, int], window: int | None = None, stride: int | None = None
) -> list[Window]:
    """Square windows that cover an image, row by row; without a window, all of it.

    Where windows would reach over the lower or right border, the last ones are moved back inside,
    as published evaluations do. In a direction in which the image is smaller, the window is as
    long as the image.

    Args:
        size: (height, width) of the image in pixels.
        window: side of a window in pixels.
        stride: pixels from one window to the next; the window's side, for tiles, by default.

    Returns:
        The windows.

    Raises:
        InvalidSetting: a stride that leaves gaps.

    Example:
        >>> [(w.top, w.left) for w in cut_windows((4, 10), window=4, stride=4)]
        [(0, 0), (0, 4), (0, 6)]
    """
    if window is None:
        return [Window(0, 0, *size)]
    step = stride or window
    if not 0 < step <= window:
        raise InvalidSetting(f"expected a stride of 1 to {window} pixels, given {step}")
    (tops, height), (lefts, width) = (_starts(side, window, step) for side in size)
    return [Window(top, left, height, width) for top in tops for left in lefts]


def window_similarities(
    backbone: Backbone,
    images: Sequence[Tensor],
    windows: Sequence[Sequence[Window]],
    text: Tensor,
    *,
    rest: Literal["pad", "drop"] = "pad",
    compare: Compare | None = None,
) -> list[list[Tensor]]:
    """Cosine of the patches of each window of each image with texts, or what else compares them.

    Windows of equal size are encoded together.

    Args:
        backbone: that encodes them.
        images: uint8 [3, H, W], of any sizes.
        windows: of each image.
        text: [T, C].
        rest: what becomes of the lower and right border of a window that patches don't divide: "pad"
            fills the last patches up with the mean colour, "drop" leaves out what is no whole patch.
        compare: in place of the cosine.

    Returns:
        [T, h, w] of each window of each image.
    """
    similarities: list[list[Tensor]] = [[text.new_empty(0)] * len(boxes) for boxes in windows]
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, boxes in enumerate(windows):
        for j, window in enumerate(boxes):
            alike.setdefault((window.height, window.width), []).append((i, j))
    most = max(_WINDOWS_AT_ONCE, len(images))
    for places in alike.values():
        for start in range(0, len(places), most):
            chosen = places[start : start + most]
            pixels = backbone.preprocess(
                torch.stack([windows[i][j].of(images[i]) for i, j in chosen])
            )
            tokens = backbone.encode_image(whole_patches(pixels, backbone.patch_size, rest), text)
            if compare is None:
                values = similarity(tokens.patch_tokens, text)
            else:
                values = compare(tokens, [i for i, _ in chosen])
            scores = values.transpose(1, 2).unflatten(2, tokens.grid)
            for (i, j), values in zip(chosen, scores, strict=True):
                similarities[i][j] = values
    return similarities


def class_similarities(
    backbone: Backbone,
    images: Sequence[Tensor],
    text: Tensor,
    *,
    rest: Literal["pad", "drop"] = "pad",
) -> Tensor:
    """Cosine of the class token of each image, seen as a whole, with texts: [B, T].

    Args:
        backbone: that encodes them.
        images: uint8 [3, H, W], of any sizes.
        text: [T, C].
        rest: as of `window_similarities`.
    """
    found = [text.new_empty(0, len(text))]
    for image in images:
        pixels = whole_patches(backbone.preprocess(image[None]), backbone.patch_size, rest)
        found.append(
            similarity(backbone.encode_image(pixels, text).class_token[:, None], text)[:, 0]
        )
    return torch.cat(found)


def whole_patches(pixels: Tensor, patch_size: tuple[int, int], rest: str) -> Tensor:
    """Images [B, 3, H, W] with sides that patches divide."""
    (height, width), (rows, columns) = pixels.shape[2:], patch_size
    if rest == "drop":
        pixels = pixels[..., : max(height // rows, 1) * rows, : max(width // columns, 1) * columns]
    return F.pad(pixels, (0, -pixels.shape[3] % columns, 0, -pixels.shape[2] % rows))


def _starts(side: int, window: int, stride: int) -> tuple[list[int], int]:
    """Where windows start along one side, and how long they are."""
    length = min(window, side)
    count = -(-max(side - window, 0) // stride) + 1
    return [min(i * stride, side - length) for i in range(count)], length
