"""Tables of a run's numbers: as csv, and as a plot where matplotlib is installed."""

from __future__ import annotations

import csv
import io
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tasks._files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """A table, written as ``NAME.csv``.

    Args:
        columns: their names.
        rows: one value a column; NaN is left empty.
        plot: how ``NAME.png`` shows all columns over the first one: ``lines``, ``bars`` or not.
        label: what the values are, with their unit, on the plot's axis.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    plot: Literal["lines", "bars"] | None = None
    label: str = ""

    def csv(self) -> str:
        """The table as text."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([["" if _missing(cell) else cell for cell in row] for row in self.rows])
        return buffer.getvalue()


def write_tables(folder: Path, tables: dict[str, Table]) -> None:
    """Write ``NAME.csv`` of each table, and ``NAME.png`` of those that have a plot."""
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.csv())
    plots = {name: table for name, table in tables.items() if table.plot and table.rows}
    if not plots:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning(
            "no plots of %s: matplotlib is not installed; "
            "`pip install clip-surgery-lightning[plots]`, then `lightning metrics %s`",
            ", ".join(f"{name}.csv" for name in plots),
            folder,
        )
        return
    for name, table in plots.items():
        # Not pyplot: its figures are global, and would look for a display.
        figure = Figure(figsize=(max(6.4, 0.3 * len(table.rows)), 4.2), layout="constrained")
        _draw(figure.add_subplot(), table)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        write_atomically(folder / f"{name}.png", buffer.getvalue())


def _draw(axes: Axes, table: Table) -> None:
    rows = [row for row in table.rows if not all(map(_missing, row[1:]))]
    first = [row[0] for row in rows]
    places = list(range(len(first)))
    series = len(table.columns) - 1
    for number, name in enumerate(table.columns[1:], start=1):
        values = [float(row[number]) for row in rows]
        if table.plot == "lines":
            axes.plot(places, values, marker=".", label=name)
        else:
            width = 0.8 / series
            shifted = [place + (number - (series + 1) / 2) * width for place in places]
            axes.bar(shifted, values, width, label=name)
    rotation = 90 if any(isinstance(value, str) for value in first) else 0
    axes.set_xticks(places, [str(value) for value in first], rotation=rotation)
    axes.set_xlabel(table.columns[0])
    axes.set_ylabel(table.label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def _missing(cell: Cell) -> bool:
    return isinstance(cell, float) and math.isnan(cell)
