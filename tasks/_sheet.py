"""A contact sheet: a row an image, a column a method, as in Figures 3, 4, 6, 8 and 9 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import InvalidSetting

CELL = 1.6
"""Inches of a picture's side."""


@dataclass(frozen=True)
class Row:
    """One image of a sheet.

    Attributes:
        title: the class, word or token that the maps are of; else the image's key.
        pictures: uint8 [H,W,3] each, the image first; None where there is nothing to show.
    """

    title: str
    pictures: list[np.ndarray | None]


def draw_sheet(rows: Sequence[Row], heads: Sequence[str], output: Path) -> None:
    """Draw a contact sheet.

    Args:
        rows: images, one or more, all with as many pictures; each has the height of its first one.
        heads: what each column shows.
        output: the picture, of an ending that matplotlib writes.

    Raises:
        InvalidSetting: the ending is another.
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    known = Figure().canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in known:
        raise InvalidSetting(f"{output}: the ending of a sheet is one of {', '.join(known)}")
    shapes = [next(p.shape for p in row.pictures if p is not None) for row in rows]
    heights = [shape[0] / shape[1] for shape in shapes]
    size = (0.4 + CELL * len(heads), 0.3 + 1.03 * CELL * sum(heights))
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    figure = Figure(figsize=size, layout=layout)
    axes = figure.subplots(len(rows), len(heads), squeeze=False, height_ratios=heights)
    for row, line in zip(rows, axes, strict=True):
        for axis, picture in zip(line, row.pictures, strict=True):
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if picture is not None:
                axis.imshow(picture)
        title = row.title if len(row.title) <= 24 else f"{row.title[:23]}…"
        line[0].set_ylabel(title, fontsize=9, parse_math=False)
    for axis, head in zip(axes[0], heads, strict=True):
        axis.set_title(head, fontsize=10, pad=4, parse_math=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=200)
