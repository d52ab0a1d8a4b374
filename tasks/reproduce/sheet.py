"""Pictures of a run on one sheet, as figures of a paper show them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from PIL import Image, ImageDraw, ImageFont

from tasks.run import Run

_ROWS, _HEIGHT, _MARGIN = 8, 224, 24  # pixels


@dataclass(frozen=True)
class Sheet:
    """Which pictures stand below each other.

    Attributes:
        prefix: what their names begin with, ``attention.``; they show parts side by side.
        columns: what the parts are.
    """

    prefix: str
    columns: tuple[str, ...]


def draw_sheet(run: Run, sheet: Sheet) -> bytes | None:
    """The first pictures of a run, one an image, as a PNG; None where it has none."""
    found = list(islice(_pictures(run, sheet.prefix), _ROWS))
    if not found:
        return None
    rows = [
        picture.resize((max(1, picture.width * _HEIGHT // picture.height), _HEIGHT))
        for _, picture in found
    ]
    width = max(row.width for row in rows)
    page = Image.new("RGB", (width, _MARGIN + len(rows) * (_HEIGHT + _MARGIN)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for i, column in enumerate(sheet.columns):
        draw.text((i * rows[0].width // len(sheet.columns) + 4, 4), column, fill="black", font=font)
    for i, (row, (title, _)) in enumerate(zip(rows, found, strict=True)):
        top = _MARGIN + i * (_HEIGHT + _MARGIN)
        page.paste(row, (0, top))
        draw.text((4, top + _HEIGHT + 4), title, fill="black", font=font)
    buffer = io.BytesIO()
    page.save(buffer, "PNG")
    return buffer.getvalue()


def _pictures(run: Run, prefix: str) -> Iterator[tuple[str, Image.Image]]:
    """Title and picture of the first label of each image that has one."""
    for image in run.images():
        for ending, data in image.pictures.items():
            if ending.startswith(prefix):
                name = ending.removeprefix(prefix).removesuffix(".jpg").partition("-")[2]
                yield f"{image.key}: {name}", Image.open(io.BytesIO(data)).convert("RGB")
                break
