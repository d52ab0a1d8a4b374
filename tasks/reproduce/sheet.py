"""Pictures of a run on one sheet, as figures of a paper show them."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from tasks._sheet import Row, draw_sheet
from tasks.run import Run

log = logging.getLogger(__name__)

_ROWS = 8


@dataclass(frozen=True)
class Sheet:
    """Which pictures of a run are laid below each other.

    Attributes:
        prefix: what their names begin with, ``attention.``; they show parts of a width, side by side.
        columns: what the parts are.
    """

    prefix: str
    columns: tuple[str, ...]

    def draw(self, run: Run, output: Path) -> None:
        """Draw the first pictures of a run, one an image; nothing where it has none."""
        rows = list(islice(self._rows(run), _ROWS))
        if not rows:
            return
        try:
            draw_sheet(rows, self.columns, output)
        except ImportError:
            log.warning(
                "no %s: matplotlib is not installed; `pip install clip-surgery-lightning[plots]`",
                output,
            )

    def _rows(self, run: Run) -> Iterator[Row]:
        """The first label's picture of each image that has one."""
        for image in run.images():
            for ending, data in image.pictures.items():
                if ending.startswith(self.prefix):
                    name = ending.removeprefix(self.prefix).removesuffix(".jpg").partition("-")[2]
                    with Image.open(io.BytesIO(data)) as picture:
                        pixels = np.asarray(picture.convert("RGB"))
                    parts = np.array_split(pixels, len(self.columns), axis=1)
                    yield Row(f"{image.key}: {name}", [*parts])
                    break
