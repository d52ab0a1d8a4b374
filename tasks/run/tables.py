"""Tables of a run's numbers on disk: as csv, and as a plot where matplotlib is installed."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import csv_text, is_nan
from tasks.run.place import write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tasks.measures import Table

log = logging.getLogger(__name__)


def write_tables(folder: Path, tables: dict[str, Table]) -> None:
    """Write ``NAME.csv`` of each table, and ``NAME.png`` of those that have a plot."""
    for name, table in tables.items():
        rows = (["" if is_nan(cell) else cell for cell in row] for row in table.rows)
        write(folder / f"{name}.csv", csv_text(table.columns, rows))
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
        width = 0.3 * len(table.rows) if table.plot == "bars" else 0
        figure = Figure(figsize=(max(6.4, width), 4.2), layout="constrained")
        draw_table(figure.add_subplot(), table)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        write(folder / f"{name}.png", buffer.getvalue())


def draw_table(axes: Axes, table: Table, colours: Sequence[str] = ()) -> None:
    """Plot a table.

    Args:
        axes: to draw on.
        table: with a ``plot``.
        colours: of its series, and after them of its levels; matplotlib's own by default.
    """
    rows = [row for row in table.rows if not all(map(is_nan, row[1:]))]
    first = [row[0] for row in rows]
    counted = not any(isinstance(value, str) for value in first)
    places = [float(value) for value in first] if counted else list(range(len(first)))
    series = len(table.columns) - 1
    for number, name in enumerate(table.columns[1:], start=1):
        values = [float(row[number]) for row in rows]
        if table.plot == "bars":
            width = 0.8 / series
            shifted = [place + (number - (series + 1) / 2) * width for place in places]
            axes.bar(shifted, values, width, label=name, color=_one(colours, number - 1))
        else:
            style = "." if table.plot == "points" else ".-"
            axes.plot(places, values, style, label=name, color=_one(colours, number - 1))
    of_levels = colours[series : series + 2] or ("tab:blue", "tab:red")
    for (name, level), colour in zip(table.levels.items(), of_levels, strict=False):
        axes.axhline(level, color=colour, label=name)
    if not counted:
        axes.set_xticks(places, [str(value) for value in first], rotation=90)
    axes.set_xlabel(table.columns[0])
    axes.set_ylabel(table.label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()


def _one(colours: Sequence[str], number: int) -> str | None:
    return colours[number % len(colours)] if colours else None
