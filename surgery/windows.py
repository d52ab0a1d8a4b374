"""Labels for every pixel: whole images, tiles or sliding windows, and the best text at each place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.backbone import Backbone
from surgery.features import similarity

_WINDOWS_AT_ONCE = 8
_NUMBERS_IN_CACHE = 1 << 20
_NUMBERS_AT_ONCE = 1 << 24  # 64 MiB of float32: similarities at pixel resolution held at a time


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
    backbone: Backbone, images: Sequence[Tensor], windows: Sequence[Sequence[Window]], text: Tensor
) -> list[list[Tensor]]:
    """Cosine of the patches of each window of each image with texts.

    Windows of equal size are encoded together; one that the patches don't divide is filled up with
    the mean colour at its lower and right border.

    Args:
        backbone: that encodes them.
        images: uint8 [3, H, W], of any sizes.
        windows: of each image.
        text: [T, C].

    Returns:
        [T, h, w] of each window of each image.
    """
    similarities: list[list[Tensor]] = [[text.new_empty(0)] * len(boxes) for boxes in windows]
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, boxes in enumerate(windows):
        for j, window in enumerate(boxes):
            alike.setdefault((window.height, window.width), []).append((i, j))
    most = max(_WINDOWS_AT_ONCE, len(images))
    rows, columns = backbone.patch_size
    for (height, width), places in alike.items():
        for start in range(0, len(places), most):
            chosen = places[start : start + most]
            pixels = backbone.preprocess(
                torch.stack([windows[i][j].of(images[i]) for i, j in chosen])
            )
            tokens = backbone.encode_image(F.pad(pixels, (0, -width % columns, 0, -height % rows)))
            scores = similarity(tokens.patch_tokens, text).transpose(1, 2).unflatten(2, tokens.grid)
            for (i, j), values in zip(chosen, scores, strict=True):
                similarities[i][j] = values
    return similarities


def best_texts(
    scores: Sequence[Sequence[Tensor]],
    windows: Sequence[Sequence[Window]],
    image_sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`best_text` of several images; all at once, where each was seen as a whole.

    Args:
        scores: [T, h, w] of each window of each image.
        windows: where they are.
        image_sizes: of what the windows were cut from.
        size: (H, W) of the answers.
        patch_size: of the network.
        scale: as of `best_text`.

    Returns:
        The indices [B, H, W] int64, and, with a `scale`, the probabilities [B, H, W].
    """
    firsts = [of[0] for of in scores]
    alike = all(len(of) == 1 and of[0].shape == firsts[0].shape for of in scores)
    if len(scores) > 1 and alike and _whole(firsts[0], windows[0], image_sizes[0], patch_size):
        with torch.autocast(firsts[0].device.type, enabled=False):
            return _best_of_grid(torch.stack(firsts), size, scale)
    found = [
        best_text(*image, size, patch_size, scale=scale)
        for image in zip(scores, windows, image_sizes, strict=True)
    ]
    index = torch.stack([words for words, _ in found])
    likely = [probability for _, probability in found if probability is not None]
    return index, torch.stack(likely) if likely else None


def _whole(
    scores: Tensor,
    windows: Sequence[Window],
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
) -> bool:
    """Whether one window, which its patches divide, is all of an image."""
    covered = tuple(step * n for step, n in zip(patch_size, scores.shape[1:], strict=True))
    return len(windows) == 1 and covered == tuple(image_size)


def best_text(
    scores: Sequence[Tensor],
    windows: Sequence[Window],
    image_size: tuple[int, int],
    size: tuple[int, int],
    patch_size: tuple[int, int],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The text of highest similarity at every pixel of an image.

    The window of a whole image is enlarged to `size` at once, bilinearly and without corner
    alignment; several are enlarged to their pixels, averaged where they overlap, and then brought
    to `size`. Texts are handled a few at a time, so that memory does not grow with T.

    Args:
        scores: [T, h, w] of each window.
        windows: where they are.
        image_size: (height, width) of what the windows were cut from.
        size: (H, W) of the answer.
        patch_size: of the network.
        scale: what similarities are multiplied with in the softmax, if probabilities are wanted.

    Returns:
        The index [H, W] int64 (the first of equals), and, with a `scale`, the probability [H, W]
        that a softmax over all T texts of scale x similarity gives it.

    Raises:
        ValueError: no texts.
    """
    if not len(scores[0]):
        raise ValueError("expected one or more texts to choose from, given none")
    if _whole(scores[0], windows, image_size, patch_size):
        with torch.autocast(scores[0].device.type, enabled=False):
            index, probability = _best_of_grid(scores[0][None], size, scale)
        return index[0], None if probability is None else probability[0]
    count = len(scores[0])
    cells = max(size[0] * size[1], image_size[0] * image_size[1])
    step = max(1, _NUMBERS_AT_ONCE // cells)
    best = scores[0].new_full(size, -torch.inf)
    total = best.clone()
    index = torch.zeros(size, dtype=torch.int64, device=best.device)
    for start in range(0, count, step):
        part = _enlarge(
            [s[start : start + step] for s in scores], windows, image_size, size, patch_size
        )
        top, winner = part.max(dim=0)
        index = torch.where(top > best, winner + start, index)
        best = torch.maximum(top, best)
        if scale is not None:
            total = torch.logaddexp(total, (scale * part).logsumexp(dim=0))
    return index, None if scale is None else (scale * best - total).exp()


def _best_of_grid(
    scores: Tensor, size: tuple[int, int], scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """`best_texts` of the windows of whole images, [B, T, h, w].

    A few rows of pixels at a time, by two products with the weights of the interpolation, texts
    last: what is compared stays in the processor's cache.
    """
    images, count, height, width = *scores.shape[:2], *size
    down, across = (
        F.interpolate(
            torch.eye(cells, dtype=scores.dtype, device=scores.device)[None],
            size=pixels,
            mode="linear",
            align_corners=False,
        )[0].T
        for cells, pixels in zip(scores.shape[2:], size, strict=True)
    )
    wide = torch.einsum("xw,bthw->bhxt", across, scores).flatten(2)
    numbers = _NUMBERS_IN_CACHE if scores.device.type == "cpu" else _NUMBERS_AT_ONCE
    rows = max(1, numbers // (images * width * count))
    index = torch.empty((images, *size), dtype=torch.int64, device=scores.device)
    best = scores.new_empty(images, *size)
    total = torch.empty_like(best)
    for start in range(0, height, rows):
        here = slice(start, start + rows)
        part = (down[here] @ wide).unflatten(2, (width, count))
        best[:, here], index[:, here] = part.max(dim=3)
        if scale is not None:
            total[:, here] = (scale * part).logsumexp(dim=3)
    return index, None if scale is None else (scale * best - total).exp()


def _enlarge(
    parts: Sequence[Tensor],
    windows: Sequence[Window],
    image_size: tuple[int, int],
    size: tuple[int, int],
    patch_size: tuple[int, int],
) -> Tensor:
    """Similarities [c, h, w] of each window as one map of the image, [c, H, W]."""
    full = [step * cells for step, cells in zip(patch_size, parts[0].shape[1:], strict=True)]
    canvas = parts[0].new_zeros(len(parts[0]), *image_size)
    counts = parts[0].new_zeros(image_size)
    for part, window in zip(parts, windows, strict=True):
        pixels = _resize(part, (full[0], full[1]))[:, : window.height, : window.width]
        window.of(canvas).add_(pixels)
        window.of(counts).add_(1)
    return _resize(canvas.div_(counts), size)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def _starts(side: int, window: int, stride: int) -> tuple[list[int], int]:
    """Where windows start along one side, and how long they are."""
    length = min(window, side)
    count = -(-max(side - window, 0) // stride) + 1
    return [min(i * stride, side - length) for i in range(count)], length
