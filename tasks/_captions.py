"""Captions as pictures, their best tokens coloured as in Fig. 11 of the paper."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

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
