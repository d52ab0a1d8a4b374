"""Pictures of results: heat maps and label maps over images, captions with their best tokens.

Images come as uint8 [3,S,S'], as the model saw them or at their own size, and are brought to the size of
what is drawn; pictures are uint8 [H,W,3].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datamodules.samples import VOID
from surgery.visualize import heat_map

COLOURS = ((240, 90, 80), (250, 210, 40), (110, 160, 250))
"""Red, yellow and blue behind the first, the second and the third token."""

_SHARE = 40  # of the width is the height of a letter


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


def heat_maps(image: Tensor, maps: Tensor) -> list[np.ndarray]:
    """Each of some maps [P,H,W] in [0, 1] over the image."""
    picture = enlarged(image, maps.shape[-2:]).round().to(torch.uint8)
    return [heat_map(picture, one.cpu()).numpy() for one in maps]


def mark_cell(picture: np.ndarray, index: int, grid: tuple[int, int]) -> None:
    """Draw a white box around one cell of a grid (h, w), row by row, into a picture."""
    y, x = divmod(index, grid[1])
    top, bottom = (row * len(picture) // grid[0] for row in (y, y + 1))
    left, right = (column * picture.shape[1] // grid[1] for column in (x, x + 1))
    picture[top:bottom, [left, right - 1]] = 255
    picture[[top, bottom - 1], left:right] = 255


def label_colours(image: Tensor, labels: np.ndarray, palette: list[int]) -> np.ndarray:
    """A label map [H,W] in its colours over the image; palette: 256 x 3 numbers."""
    colours = np.array(palette, dtype=np.float32).reshape(-1, 3)[np.minimum(labels, VOID)]
    mixed = 0.4 * enlarged(image, labels.shape).numpy() + 0.6 * colours
    return mixed.round().astype(np.uint8)


def caption_figure(image: Tensor, values: Tensor, tokens: list[str], best: list[int]) -> np.ndarray:
    """The picture of Fig. 11: image, map, and below them the caption with its best tokens coloured.

    Args:
        image: see above.
        values: the map [H,W] in [0, 1].
        tokens: see `caption_strip`.
        best: see `caption_strip`.
    """
    picture = enlarged(image, values.shape).round().byte()
    pair = np.concatenate([picture.numpy(), heat_map(picture, values).numpy()], axis=1)
    return np.concatenate([pair, caption_strip(tokens, best, pair.shape[1])])
