"""Pictures of results: heat maps and label maps over images, captions with their best tokens.

Images come as uint8 [3,S,S'], as the model saw them or at their own size, and are brought to the size of
what is drawn; pictures are uint8 [H,W,3].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datamodules._samples import VOID
from surgery.visualize import heat_map

COLOURS = ((240, 90, 80), (250, 210, 40), (110, 160, 250))
"""Red, yellow and blue behind the first, the second and the third token."""

_SHARE = 40  # of the width is the height of a letter
_SMALLEST = 192  # pixels: points on a smaller picture would hide it


@dataclass(frozen=True)
class Look:
    """How pictures of results are drawn.

    Attributes:
        alpha: share of the colours over the image, in [0, 1].
        colour_map: of heat, see `surgery.visualize.colours`.
        classes: maps of so many classes an image, those with the highest similarity; None: of those that
            have a mask.
    """

    alpha: float = 0.6
    colour_map: str = "jet"
    classes: int | None = None


LOOK = Look()
"""That of the paper."""


def caption_strip(tokens: list[str], best: list[int], width: int) -> np.ndarray:
    """Tokens as running text on white: uint8 [height, width, 3], as high as the text needs.

    tokens: as `surgery.tokens.readable` gives them; pieces of one word stand together. best: up to
    three positions in them, to be coloured.
    """
    size = max(12, width // _SHARE)
    font = ImageFont.load_default(size)
    line, pad = round(1.5 * size), size // 4
    places: list[tuple[float, int, float, str]] = []
    x, y = float(pad), pad
    for token in tokens:
        going_on = token.endswith("-") and len(token) > 1
        text = token[:-1] if going_on else token
        length = font.getlength(text)
        if x + length > width - pad and x > pad:
            x, y = float(pad), y + line
        places.append((x, y, length, text))
        x += length + (0 if going_on else size / 3)
    strip = Image.new("RGB", (width, y + line + pad), "white")
    draw = ImageDraw.Draw(strip)
    for position, (x, y, length, text) in enumerate(places):
        if position in best:
            box = (x - 1, y, x + length + 1, y + line - 2)
            draw.rectangle(box, fill=COLOURS[best.index(position)])
        draw.text((x, y), text, fill="black", font=font)
    return np.asarray(strip)


def enlarged(image: Tensor, size: Sequence[int]) -> Tensor:
    """An image at another size (height, width): float [H,W,3] in [0, 255]."""
    large = F.interpolate(image[None].float(), size=tuple(size), mode="bilinear", antialias=True)
    return large[0].clamp(0, 255).permute(1, 2, 0)


def heat_maps(image: Tensor, maps: Tensor, look: Look = LOOK) -> list[np.ndarray]:
    """Each of some maps [P,H,W] in [0, 1] over the image."""
    picture = enlarged(image, maps.shape[-2:]).round().to(torch.uint8)
    return [
        heat_map(picture, one.cpu(), opacity=look.alpha, colour_map=look.colour_map).numpy()
        for one in maps
    ]


def mark_cell(picture: np.ndarray, index: int, grid: tuple[int, int]) -> None:
    """Draw a white box around one cell of a grid (h, w), row by row, into a picture."""
    y, x = divmod(index, grid[1])
    top, bottom = (row * len(picture) // grid[0] for row in (y, y + 1))
    left, right = (column * picture.shape[1] // grid[1] for column in (x, x + 1))
    picture[top:bottom, [left, right - 1]] = 255
    picture[[top, bottom - 1], left:right] = 255


def label_colours(
    image: Tensor, labels: np.ndarray, palette: list[int], look: Look = LOOK
) -> np.ndarray:
    """A label map [H,W] in its colours over the image; palette: 256 x 3 numbers."""
    colours = np.array(palette, dtype=np.float32).reshape(-1, 3)[np.minimum(labels, VOID)]
    mixed = (1 - look.alpha) * enlarged(image, labels.shape).numpy() + look.alpha * colours
    return mixed.round().astype(np.uint8)


def legend_strip(entries: Sequence[tuple[str, Sequence[int]]], width: int) -> np.ndarray:
    """Names, each behind a square of its colour, on white: uint8 [height, width, 3]."""
    size = max(10, width // _SHARE)
    font = ImageFont.load_default(size)
    line, pad = round(1.5 * size), max(2, size // 4)
    places: list[tuple[int, int]] = []
    x = y = pad
    for name, _ in entries:
        length = round(line + font.getlength(name)) + size
        if x + length > width and x > pad:
            x, y = pad, y + line
        places.append((x, y))
        x += length
    strip = Image.new("RGB", (width, y + line + pad), "white")
    draw = ImageDraw.Draw(strip)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        r, g, b = (int(level) for level in colour)
        draw.rectangle((x, y, x + size, y + size), fill=(r, g, b), outline="black")
        draw.text((x + line, y + size // 2), name, fill="black", font=font, anchor="lm")
    return np.asarray(strip)


def label_figure(
    image: Tensor,
    labels: np.ndarray,
    palette: list[int],
    names: dict[int, str],
    look: Look = LOOK,
) -> np.ndarray:
    """A label map [H,W] over the image, and below it what its colours mean.

    Args:
        image: see above.
        labels: values, of which all that occur are explained, the most frequent first.
        palette: 256 x 3 numbers.
        names: label value -> name.
        look: how strong the colours are.
    """
    values, counts = np.unique(labels, return_counts=True)
    shown = sorted(zip(-counts, values.tolist(), strict=True))
    colours = np.array(palette).reshape(-1, 3)
    entries = [(names.get(v, str(v)), colours[min(v, VOID)].tolist()) for _, v in shown]
    picture = label_colours(image, labels, palette, look)
    return np.concatenate([picture, legend_strip(entries, picture.shape[1])])


def point_figure(
    image: Tensor,
    size: tuple[int, int],
    points: Sequence[Sequence[int]],
    labels: Sequence[int],
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Prompt points on the image, and the mask that they gave: green discs in it, red crosses not.

    Args:
        image: see above.
        size: (height, width) in whose pixels points are.
        points: (x, y) of each.
        labels: 1 for positive and 0 for negative points.
        mask: bool (height, width); what is not in it is darkened.
    """
    pixels = enlarged(image, size).numpy()
    if mask is not None:
        pixels = np.where(mask[..., None], pixels, 0.4 * pixels)
    scale = 1 if min(size) >= _SMALLEST else -(-_SMALLEST // min(size))
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    picture = picture.resize((size[1] * scale, size[0] * scale), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    radius = max(3, min(picture.size) // 60)
    for (left, top), positive in zip(points, labels, strict=True):
        x, y = (left + 0.5) * scale, (top + 0.5) * scale
        if positive:
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(box, fill=(40, 200, 60), outline="white", width=max(1, radius // 3))
            continue
        ends = [
            (x - radius, y - radius, x + radius, y + radius),
            (x - radius, y + radius, x + radius, y - radius),
        ]
        for colour, width in (("white", radius), ((225, 30, 30), max(2, radius // 2))):
            for end in ends:
                draw.line(end, fill=colour, width=width)
    return np.asarray(picture)


def caption_figure(
    image: Tensor, values: Tensor, tokens: list[str], best: list[int], look: Look = LOOK
) -> np.ndarray:
    """The picture of Fig. 11: image, map, and below them the caption with its best tokens coloured.

    Args:
        image: see above.
        values: the map [H,W] in [0, 1].
        tokens: see `caption_strip`.
        best: see `caption_strip`.
        look: of the heat.
    """
    picture = enlarged(image, values.shape).round().byte()
    pair = np.concatenate([picture.numpy(), *heat_maps(image, values[None], look)], axis=1)
    return np.concatenate([pair, caption_strip(tokens, best, pair.shape[1])])
