"""A table with our numbers beside the printed ones: as text, Markdown and csv."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from common.files import csv_text, write_atomically
from tasks.reproduce.card import make_card
from tasks.reproduce.plan import Cell, Plan
from tasks.run import Run
from tasks.run.compare import Side

_SPENT = ("seconds_an_image", "peak_memory_mib")


def _cost(jobs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What the jobs of a run took: for an image, of one process; and at the most."""
    seconds = sum(job["seconds"] * job["processes"] for job in jobs)
    peaks = [job["peak_memory_mib"] for job in jobs if job.get("peak_memory_mib") is not None]
    values = (seconds / sum(job["images"] for job in jobs), max(peaks, default=None))
    return dict(zip(_SPENT, values, strict=True))


@dataclass
class Reproduction:
    """A table or figure beside our runs.

    Attributes:
        plan: of what it is.
        cells: its numbers, or some of them.
        demo: whether ours are of the demo world.
        ours: cell -> our number.
        runs: cell -> name of the run that gave it.
        why: cell -> why there is no number of ours.
        words: fields of every run that were set otherwise, as on the command line.
        costs: cell -> seconds an image of one process, and memory, of its run.
    """

    plan: Plan
    cells: list[Cell]
    demo: bool
    ours: dict[Cell, float] = field(default_factory=dict)
    runs: dict[Cell, str] = field(default_factory=dict)
    why: dict[Cell, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    costs: dict[Cell, dict[str, float | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, demo: bool) -> Reproduction:
        """A whole table, without numbers of ours yet."""
        return cls(plan, plan.demo_cells() if demo else plan.cells(), demo)

    def fill(self, cells: Iterable[Cell], run: Run, name: str) -> None:
        """Take numbers from a finished run of this name."""
        summary = run.summary
        for cell in cells:
            assert cell.reading is not None  # jobs are made of readings
            of = summary.get("methods", {}).get(cell.reading.method, summary["metrics"])
            value = of.get(cell.reading.metric)
            if value is None:
                self.why[cell] = cell.reading.hint or f"{name} has no {cell.reading.metric}"
            else:
                self.ours[cell] = float(value)
                self.runs[cell] = name
                if self.plan.costs and (jobs := run.jobs):
                    self.costs[cell] = _cost(jobs)
        self.ours |= self.plan.derive(self.cells, self.ours)

    def table(self) -> Side:
        """A row for each method and backbone, a column for each data set and metric."""
        columns = list(dict.fromkeys((cell.data, cell.metric) for cell in self.cells))
        rows: dict[tuple[str, str, str], dict[tuple[str, str], str]] = {}
        for cell in self.cells:
            row = rows.setdefault((cell.row, cell.setting, cell.backbone), {})
            row[cell.data, cell.metric] = self._shown(cell)
        return Side(
            f"{self.plan.name}, percent",
            ("row", "setting", "backbone", *(f"{data} {metric}" for data, metric in columns)),
            [(*key, *(row.get(column, "") for column in columns)) for key, row in rows.items()],
        )

    def cost_table(self) -> Side:
        """A row for each method and backbone, its seconds an image and memory for each data set."""
        columns = list(dict.fromkeys(cell.data for cell in self.costs))
        rows: dict[tuple[str, str, str], dict[str, str]] = {}
        for cell, cost in self.costs.items():
            peak = cost["peak_memory_mib"]
            memory = "" if peak is None else f", {peak} MiB"
            row = rows.setdefault((cell.row, cell.setting, cell.backbone), {})
            row[cell.data] = f"{cost['seconds_an_image']:.4g} s{memory}"
        return Side(
            f"{self.plan.name}, seconds an image of one process and its peak of memory",
            ("row", "setting", "backbone", *columns),
            [(*key, *(row.get(column, "") for column in columns)) for key, row in rows.items()],
        )

    def _shown(self, cell: Cell) -> str:
        ours = f"{100 * self.ours[cell]:.2f}" if cell in self.ours else "--"
        if cell.paper is None:
            return ours
        difference = f"; {100 * (self.ours[cell] - cell.paper):+.2f}" if cell in self.ours else ""
        return f"{ours} ({100 * cell.paper:.2f}{difference})"

    def print(self) -> None:
        """Show the table and what has to be said of it in a terminal."""
        print(f"\n{self.plan.name}: {self.plan.title}\n{self.table().text()}\n")
        if self.costs:
            print(f"{self.cost_table().text()}\n")
        print(*self.notes(), sep="\n")

    def notes(self) -> list[str]:
        """What has to be said below the table."""
        found = [
            "Ours, on the demo world: its numbers are none of the paper's, their ordering can be "
            "compared."
            if self.demo
            else "Ours (as printed; difference). `--`: no number of ours.",
            *self.plan.notes,
        ]
        if self.words:
            found.append(f"Every run with {' '.join(self.words)}.")
        clip = [self.ours.get(c, -1) for c in self.cells if (c.row, c.metric) == ("CLIP", "mSC")]
        if self.demo and max(clip, default=-1) > 0:
            found.append("Plain CLIP's maps of drawn scenes are not reversed, as photographs' are.")
        reasons: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell in self.why:
                reasons.setdefault(self.why[cell], []).append(cell)
        for reason, of in reasons.items():
            named = dict.fromkeys(
                " ".join(filter(None, (c.row, c.setting, c.backbone))) for c in of
            )
            found.append(f"Not run: {', '.join(named)} on {of[0].data}: {reason}")
        if printed := self._not_ours():
            where = "" if self.demo else ", as printed"
            found.append(f"Not ours to run{where}: {', '.join(printed)}.")
        return found + (self.ordering() if self.demo else [])

    def _not_ours(self) -> list[str]:
        """Rows without any run, such as those of trained methods; not what follows from others."""
        with_runs = {cell.row for cell in self.cells if cell.reading}
        rows = dict.fromkeys(cell.row for cell in self.cells if not cell.derived)
        return [row for row in rows if row not in with_runs]

    def ordering(self) -> list[str]:
        """Whether rows are above each other as they are, everywhere, in the paper."""
        held, broken = 0, []
        for above, below, metric in self.plan.claims():
            pairs = self._pairs(above, below, metric)
            for one, other in pairs:
                if self.ours[one] > self.ours[other]:
                    held += 1
                    continue
                a, b = (
                    f"{c.row}{f' ({c.setting})' if c.setting else ''} {100 * self.ours[c]:.2f}"
                    for c in (one, other)
                )
                broken.append(f"DOES NOT HOLD here: {one.metric}: {a} is not above {b}")
        if not held and not broken:
            return ["Nothing to compare the paper's ordering with."]
        return [
            f"Of the paper's ordering, {held} of {held + len(broken)} pairs hold here.",
            *broken,
        ]

    def _pairs(self, above: str, below: str, metric: str) -> Iterable[tuple[Cell, Cell]]:
        """Cells of two rows; where both have several settings, those of the same one, if any."""
        found = [
            [c for c in self.cells if c.row == row and c in self.ours and metric in (c.metric, "")]
            for row in (above, below)
        ]
        pairs = [(a, b) for a, b in product(*found) if a.metric == b.metric]
        same = [(a, b) for a, b in pairs if a.setting == b.setting]
        several = all(len({c.setting for c in side}) > 1 for side in found)
        return same if several and same else pairs

    def write(self, folder: Path) -> None:
        """Write ``NAME.md``; all digits and the runs' names as ``NAME.csv``; ``NAME.card.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        notes = "\n".join(f"- {note}" for note in self.notes())
        costs = f"{self.cost_table().markdown()}\n\n" if self.costs else ""
        text = f"{self.table().markdown()}\n\n{costs}{notes}\n"
        write_atomically(folder / f"{self.plan.name}.md", text)
        rows = []
        for cell in self.cells:
            ours = self.ours.get(cell)
            known = ours is not None and cell.paper is not None
            cost = self.costs.get(cell, {})
            spent = [cost.get(name) for name in _SPENT] if self.plan.costs else []
            values = (ours, cell.paper, ours - cell.paper if known else None, *spent)  # type: ignore[operator]  # both are numbers
            rows.append(
                (
                    *(cell.row, cell.setting, cell.backbone, cell.data, cell.metric),
                    *("" if value is None else value for value in values),
                    *(cell.source, self.runs.get(cell, ""), self.why.get(cell, "")),
                )
            )
        columns = ("row", "setting", "backbone", "data", "metric", "ours", "paper", "difference")
        more = (*(_SPENT if self.plan.costs else ()), "source", "run", "why_not")
        write_atomically(folder / f"{self.plan.name}.csv", csv_text((*columns, *more), rows))
        card = make_card(self.plan, self.demo, self.ours, self.runs, folder / "runs")
        text = json.dumps(card, indent=1, ensure_ascii=False)
        write_atomically(folder / f"{self.plan.name}.card.json", text + "\n")
        self._draw(folder)

    def _draw(self, folder: Path) -> None:
        """The bars of a figure, ``NAME-METRIC.png`` and ``.csv``."""
        from tasks.measures import Table  # and with it torchmetrics, which takes seconds
        from tasks.run.tables import write_tables

        tables = {}
        for metric in self.plan.bars:
            of = {(c.data, c.row): self.ours[c] for c in self.ours if c.metric == metric}
            rows = list(dict.fromkeys(row for _, row in of))
            if of:
                tables[f"{self.plan.name}-{metric}"] = Table(
                    ("data", *rows),
                    [
                        (data, *(of.get((data, row), math.nan) for row in rows))
                        for data in dict.fromkeys(data for data, _ in of)
                    ],
                    plot="bars",
                    label=metric,
                )
        if tables:
            write_tables(folder, tables)
