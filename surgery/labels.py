"""From similarities to the label of every pixel: the end of all evaluations of segmentation.

In the order of the released evaluations: similarities get the size of the label, and are refined by the
image; a softmax over all words; a class has its best word's probability; small objects are left out;
unlikely pixels are background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.enlarging import (
    interpolation,
    largest,
    on_canvas,
    stack_padded,
    window_interpolation,
)
from surgery.windows import Window

_NUMBERS_IN_CACHE = 1 << 20
_NUMBERS_AT_ONCE = 1 << 24  # 64 MiB of float32: similarities at pixel resolution held at a time
_NUMBERS_KEPT = 1 << 27  # 512 MiB: those that are looked at more than once are kept up to that

_NO_TEXT = "expected one or more texts to choose from, given none"

Refine = Callable[[Tensor], Tensor]
"""Maps [c, H, W] of an image at the size of the answer -> the same, refined."""


@dataclass(frozen=True)
class Rules:
    """How the similarities of words become the label of a pixel.

    Attributes:
        values: int64 [T], label value of the class that each word stands for; of several words of a
            class the best counts. Ties go to the first.
        scale: what similarities are multiplied with in the softmax over all words.
        threshold: a pixel gets label 0 where the probability of its word is less; None for nowhere.
        area: a class other than 0 that has not more than this share of the pixels of all such classes in
            an image is left out there: its pixels get the next likely label. None for none. Some words
            must stand for 0.
        half: similarities, their softmax and its comparisons in float16, as some evaluations have
            them: then there are ties.
        by_image_size: similarities of a whole image are enlarged to the size of the image, and then to
            that of the answer, as those of windows are; otherwise to the answer's at once.
        together: refining needs the maps of all words at once.
    """

    values: Tensor
    scale: float = 40.0
    threshold: float | None = None
    area: float | None = None
    half: bool = False
    by_image_size: bool = False
    together: bool = False


def label_maps(
    scores: Sequence[Sequence[Tensor]],
    windows: Sequence[Sequence[Window]],
    image_sizes: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]],
    patch_size: tuple[int, int],
    rules: Rules,
    refine: Callable[[int], Refine] | None = None,
) -> Tensor:
    """The label of every pixel of several images.

    Args:
        scores: [T, h, w] of each window of each image, see `window_similarities`.
        windows: where they are.
        image_sizes: (height, width) of what the windows were cut from.
        sizes: (H, W) of each answer.
        patch_size: of the network.
        rules: how a label is chosen.
        refine: gives what refines the maps of image i.

    Returns:
        Label values int64 [B, H, W], H and W the largest of the sizes; what is below and beside an
        image's own answer means nothing.

    Raises:
        ValueError: no texts.

    Example:
        >>> scores = torch.tensor([[[0.2, 0.2]], [[0.3, 0.1]], [[0.1, 0.2]]])
        >>> rules = Rules(torch.tensor([1, 2, 0]), threshold=0.7)
        >>> label_maps([[scores]], [[Window(0, 0, 8, 16)]], [(8, 16)], [(1, 2)], (8, 8), rules)
        tensor([[[2, 0]]])
    """
    if rules.area is None and not rules.half and not rules.by_image_size and refine is None:
        scale = None if rules.threshold is None else rules.scale
        word, probability = best_texts(scores, windows, image_sizes, sizes, patch_size, scale=scale)
        labels = rules.values[word]
        if probability is None or rules.threshold is None:
            return labels
        return labels.where(probability >= rules.threshold, 0)
    if not len(scores[0][0]):
        raise ValueError(_NO_TEXT)
    found = []
    with torch.autocast(scores[0][0].device.type, enabled=False):
        for i, parts in enumerate(scores):
            change = None if refine is None else refine(i)
            where = (windows[i], image_sizes[i], sizes[i], patch_size)
            found.append(_choose(_Maps(parts, *where, rules, change), rules))
    return on_canvas(found)


class _Maps:
    """Similarities [c, H, W] at the pixels of the answer, some words at a time.

    Those that fit are kept for the next time; others are made anew.
    """

    def __init__(
        self,
        scores: Sequence[Tensor],
        windows: Sequence[Window],
        image_size: tuple[int, int],
        size: tuple[int, int],
        patch_size: tuple[int, int],
        rules: Rules,
        refine: Refine | None,
    ) -> None:
        self.values = rules.values
        self.size = size
        self._scores = scores
        self._enlarge = (windows, image_size, size, patch_size, rules.by_image_size)
        self._refine = refine
        cells = max(size[0] * size[1], image_size[0] * image_size[1])
        count = len(self.values)
        self._step = count if rules.together else max(1, _NUMBERS_AT_ONCE // cells)
        self._kept: list[Tensor] | None = None
        if count * cells <= _NUMBERS_KEPT:
            self._kept = list(self._made())

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """The place of the first word of some, and their maps."""
        start = 0
        for maps in self._made() if self._kept is None else self._kept:
            yield start, maps
            start += len(maps)

    def _made(self) -> Iterator[Tensor]:
        for start in range(0, len(self.values), self._step):
            chosen = slice(start, start + self._step)
            maps = _enlarge([part[chosen] for part in self._scores], *self._enlarge)
            yield maps if self._refine is None else self._refine(maps)


def _choose(maps: _Maps, rules: Rules) -> Tensor:
    """The label [H, W] of each pixel of an image."""
    values, total = maps.values, None
    if rules.half or rules.threshold is not None:
        total = torch.stack([_logits(part, rules).logsumexp(dim=0) for _, part in maps])
        total = total.logsumexp(dim=0)
    labels, best = _likeliest(maps, rules, total, torch.ones_like(values, dtype=torch.bool))
    if rules.area is not None:
        pixels = values.new_zeros(len(values) + 1)
        pixels.index_add_(0, labels.flatten(), torch.ones_like(labels.flatten()))
        pixels[0] = 0
        kept = pixels > rules.area * pixels.sum()
        kept[0] = True
        labels, best = _likeliest(maps, rules, total, kept[values])
    if rules.threshold is None or total is None:
        return labels
    likely = best if rules.half else (rules.scale * best - total).exp()
    return labels.where(likely >= torch.tensor(rules.threshold, dtype=likely.dtype), 0)


def _likeliest(
    maps: _Maps, rules: Rules, total: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """The best of the words [T] that are kept at every pixel: label value and similarity, or probability.

    It is a probability with float16, whose rounding makes ties.
    """
    first = maps.values[0]
    labels = first.expand(maps.size)
    best = torch.full(maps.size, -torch.inf, dtype=torch.float32, device=first.device)
    for start, part in maps:
        if rules.half and total is not None:
            part = (_logits(part, rules) - total).exp().half().float()
        here = slice(start, start + len(part))
        top, winner = part.masked_fill(~kept[here, None, None], -torch.inf).max(dim=0)
        labels = torch.where(top > best, maps.values[here][winner], labels)
        best = torch.maximum(top, best)
    return labels, best.half() if rules.half else best


def _logits(maps: Tensor, rules: Rules) -> Tensor:
    """What the softmax is of, in float32; with the values that it has in float16, where it is that."""
    return (rules.scale * maps.half()).float() if rules.half else rules.scale * maps


def best_texts(
    scores: Sequence[Sequence[Tensor]],
    windows: Sequence[Sequence[Window]],
    image_sizes: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]],
    patch_size: tuple[int, int],
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`best_text` of several images, each at its own size on a common canvas.

    Windows are rows and columns of a grid: to enlarge each, to average them where they overlap, and to
    bring all to a size is one product along either side. So images that were cut alike are worked on
    at once, and have the numbers of `best_text` up to rounding.

    Args:
        scores: [T, h, w] of each window of each image.
        windows: where they are, row by row as `cut_windows` makes them; the same in all images.
        image_sizes: (height, width) of what they were cut from; the same for all images.
        sizes: (H, W) of each answer.
        patch_size: of the network.
        scale: as of `best_text`.

    Returns:
        The indices [B, H, W] int64, H and W the largest of the sizes, and, with a `scale`, the
        probabilities [B, H, W]. What is below and beside an image's own answer means nothing.
    """
    if len(scores) == 1:
        alone = (scores[0], windows[0], image_sizes[0], sizes[0], patch_size)
        index, probability = best_text(*alone, scale=scale)
        return index[None], None if probability is None else probability[None]
    if not len(scores[0][0]):
        raise ValueError(_NO_TEXT)
    boxes, parts = windows[0], torch.stack([part for of in scores for part in of])
    starts = [list(dict.fromkeys(of)) for of in ([b.top for b in boxes], [b.left for b in boxes])]
    lengths = (boxes[0].height, boxes[0].width)
    grid = parts.unflatten(0, (len(scores), *map(len, starts))).permute(0, 3, 1, 4, 2, 5)
    whole = _whole(scores[0][0], boxes, image_sizes[0], patch_size)
    matrices = []
    for axis, cells in enumerate(parts.shape[2:]):
        cut = (tuple(starts[axis]), lengths[axis], image_sizes[0][axis], cells, patch_size[axis])
        matrices.append(
            [
                interpolation(cells, size[axis], parts.dtype)
                if whole
                else window_interpolation(*cut, size[axis], parts.dtype)
                for size in sizes
            ]
        )
    down, across = (stack_padded(of, parts.device) for of in matrices)
    with torch.autocast(parts.device.type, enabled=False):
        return _best_of_grid(grid.flatten(4, 5).flatten(2, 3), down, across, largest(sizes), scale)


def _whole(
    scores: Tensor,
    windows: Sequence[Window],
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
) -> bool:
    """Whether one window is all of an image, and its patches don't reach over it."""
    covered = [step * n for step, n in zip(patch_size, scores.shape[1:], strict=True)]
    return len(windows) == 1 and all(c <= s for c, s in zip(covered, image_size, strict=True))


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
        raise ValueError(_NO_TEXT)
    if _whole(scores[0], windows, image_size, patch_size):
        with torch.autocast(scores[0].device.type, enabled=False):
            down, across = (
                interpolation(cells, pixels, scores[0].dtype).to(scores[0].device)
                for cells, pixels in zip(scores[0].shape[1:], size, strict=True)
            )
            index, probability = _best_of_grid(scores[0][None], down, across, size, scale)
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
    scores: Tensor, down: Tensor, across: Tensor, size: tuple[int, int], scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """The best texts of grids of cells [B, T, h, w] at `size`, by two products.

    A few rows of pixels at a time, texts last: what is compared stays in the processor's cache.

    Args:
        scores: of the cells.
        down: interpolation [H, h], or one for each image, [B, H, h].
        across: the same of the other side, [W, w] or [B, W, w].
        size: (H, W).
        scale: as of `best_text`.

    Returns:
        As of `best_texts`.
    """
    images, count, height, width = *scores.shape[:2], *size
    index = torch.empty((images, *size), dtype=torch.int64, device=scores.device)
    best = scores.new_empty(images, *size)
    total = torch.empty_like(best)
    numbers = _NUMBERS_IN_CACHE if scores.device.type == "cpu" else _NUMBERS_AT_ONCE
    step = max(1, _NUMBERS_KEPT // (count * scores.shape[2] * width))
    for first in range(0, images, step):
        some = slice(first, first + step)
        lines, columns = (of[some] if of.ndim == 3 else of for of in (down, across))
        own = "bxw,bthw->bhxt" if columns.ndim == 3 else "xw,bthw->bhxt"
        wide = torch.einsum(own, columns, scores[some]).flatten(2)
        rows = max(1, numbers // (len(wide) * width * count))
        for start in range(0, height, rows):
            here = slice(start, start + rows)
            part = (lines[..., here, :] @ wide).unflatten(2, (width, count))
            best[some, here], index[some, here] = part.max(dim=3)
            if scale is not None:
                total[some, here] = (scale * part).logsumexp(dim=3)
    return index, None if scale is None else (scale * best - total).exp()


def _enlarge(
    parts: Sequence[Tensor],
    windows: Sequence[Window],
    image_size: tuple[int, int],
    size: tuple[int, int],
    patch_size: tuple[int, int],
    by_image_size: bool = True,
) -> Tensor:
    """Similarities [c, h, w] of each window as one map of the image, [c, H, W].

    Patches that reach over a window are cut off; where they end before it, they are stretched over it.
    """
    if not by_image_size and _whole(parts[0], windows, image_size, patch_size):
        return _resize(parts[0], size)
    sides = (windows[0].height, windows[0].width)
    covered = [step * cells for step, cells in zip(patch_size, parts[0].shape[1:], strict=True)]
    full = [max(pair) for pair in zip(sides, covered, strict=True)]
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
