"""Charts as SVG inside the page, drawn by matplotlib, in the page's own colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from common.errors import InvalidSetting
from tasks.run.tables import draw_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tasks.measures import Table

SERIES = 6
"""Colours that the page has for what stands side by side."""

_INK, _LINE = "#0a0a01", "#0a0a02"
"""Colours that stand for those of the page, which knows light and dark."""


def need_matplotlib() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        InvalidSetting: says what to install.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InvalidSetting(
            "charts and colour maps are matplotlib's, which is not installed: "
            "`pip install 'clip-surgery-lightning[plots]'`"
        ) from None


def class_bars(
    values: Mapping[str, Sequence[float | None]], links: Mapping[str, str], label: str
) -> Markup:
    """A bar a class and column, the best class on top; a class is a link that filters the images.

    Args:
        values: class -> value of each column, fractions.
        links: class -> address that its bars lead to.
        label: what the values are.
    """
    known = {name: of for name, of in values.items() if any(value is not None for value in of)}
    order = sorted(known, key=lambda name: -(known[name][0] or 0.0))
    count = max((len(of) for of in known.values()), default=1)
    row = 0.2 + 0.11 * count
    with _style():
        figure = _figure(3.6, 0.6 + row * len(order))
        axes = figure.add_subplot()
        height = 0.8 / count
        for i in range(count):
            places = [y + (i - (count - 1) / 2) * height for y in range(len(order))]
            numbers = [100 * (known[name][i] or 0.0) for name in order]
            bars = axes.barh(places, numbers, 0.9 * height, color=_series(i))
            for bar, name in zip(bars, order, strict=True):
                bar.set_url(links.get(name))
                bar.set_gid(f"{label} {name if len(name) < 40 else name[:40]}".replace(" ", "-"))
        axes.set_yticks(
            range(len(order)), [name if len(name) <= 26 else f"{name[:25]}…" for name in order]
        )
        for text, name in zip(axes.get_yticklabels(), order, strict=True):
            text.set_parse_math(False)
            text.set_url(links.get(name))
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.set_xlim(0, max(100.0, *axes.get_xlim()) if label else None)
        axes.set_xlabel(f"{label}, %")
        axes.xaxis.set_label_position("top")
        axes.xaxis.tick_top()
        axes.grid(axis="x")
        axes.tick_params(length=0)
        return _svg(figure, f"{label} of each class")


def histogram(values: Sequence[Sequence[float | None]], label: str) -> Markup:
    """How many images have which value in [0, 1], a line a column."""
    with _style():
        figure = _figure(3.6, 1.5)
        axes = figure.add_subplot()
        edges = np.linspace(0, 1, 21)
        for i, of in enumerate(values):
            numbers = [value for value in of if value is not None]
            counts, _ = np.histogram(np.clip(numbers, 0, 1), edges)
            axes.stairs(counts, 100 * edges, color=_series(i), linewidth=1.6, fill=False)
            axes.stairs(counts, 100 * edges, color=_series(i), alpha=0.15, fill=True)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"{label} of an image, %")
        axes.set_ylabel("images")
        axes.grid(axis="y")
        return _svg(figure, f"How many images have which {label}")


def table_figure(name: str, table: Table) -> Markup:
    """A table of the run's numbers as its plot."""
    with _style():
        figure = _figure(5.4, 3.4)
        axes = figure.add_subplot()
        draw_table(axes, table, [_series(i) for i in range(SERIES)])
        return _svg(figure, name.replace("_", " "))


def colour_table(name: str) -> np.ndarray:
    """256 colours uint8 [256,3] of a colour map, by matplotlib's name; jet as the project draws it."""
    import torch

    from surgery.visualize import colours

    table: np.ndarray = colours(torch.linspace(0, 1, 256), name).numpy()
    return table


def _series(number: int) -> str:
    return f"#0b0b{number % SERIES:02x}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context(
        {
            "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and coloured
            "svg.hashsalt": "report",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.edgecolor": _LINE,
            "axes.labelcolor": _INK,
            "axes.axisbelow": True,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "text.color": _INK,
            "grid.color": _LINE,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "legend.labelcolor": _INK,
        }
    )


def _svg(figure: Figure, title: str) -> Markup:
    """A figure as an element of the page, with its stand-in colours replaced by the page's."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = text.replace(_INK, "var(--ink)").replace(_LINE, "var(--line)")
    text = re.sub(r"#0b0b(\d\d)", r"var(--series-\1)", text)
    label = Markup('<svg role="img" aria-label="{}"').format(title)
    return Markup(label + Markup(text[len("<svg") :]))
