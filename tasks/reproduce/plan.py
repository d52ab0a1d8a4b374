"""What is reproduced: the cells of a table or figure, and the runs that fill them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

from tasks._configs import parse_yaml, read_yaml, split_name
from tasks.reproduce.sheet import Sheet


@dataclass(frozen=True)
class Reading:
    """A run of ours that gives a printed number, as we read the paper.

    Attributes:
        config: packaged config, ``BACKBONE_EXPERIMENT``.
        metric: key in the run's ``metrics.json``.
        options: words of the command line that follow the config, ``--SECTION.FIELD=VALUE``.
        method: whose metric, of tasks with ``--model.methods``; runs that differ in it alone are one.
        task: in place of the one that the config has; "" for that.
        setting: what sets it apart from other readings of the same number; "" for the first.
        hint: what to do where the run doesn't have the metric.
        demo_options: in place of the options on the demo world, whose images are smaller.
    """

    config: str
    metric: str
    options: tuple[str, ...] = ()
    method: str = ""
    task: str = ""
    setting: str = ""
    hint: str = ""
    demo_options: tuple[str, ...] | None = None

    def options_of(self, demo: bool) -> tuple[str, ...]:
        """The options in the demo, or of the paper's own run."""
        return self.options if not demo or self.demo_options is None else self.demo_options


@dataclass(frozen=True)
class Cell:
    """A number of a table or figure.

    Attributes:
        row: method, or what is measured.
        setting: which of several readings of the row, in the words of its options; "" for the first.
        backbone: as in ``configs/backbones``; "" for all of them; "demo".
        data: data set; "shapes" in the demo.
        metric: what the paper calls it.
        paper: fraction as printed; None for a dash, or where the paper draws and prints no number.
        reading: the run that gives ours; None where it is not ours to run, or follows from others.
        source: who printed it; "" for the paper.
        derived: it follows from other cells, see `Plan.derive`.
    """

    row: str
    setting: str
    backbone: str
    data: str
    metric: str
    paper: float | None
    reading: Reading | None = None
    source: str = ""
    derived: bool = False


def _derive_nothing(cells: Sequence[Cell], ours: Mapping[Cell, float]) -> dict[Cell, float]:
    return {}


@dataclass(frozen=True)
class Plan:
    """A table or figure: one row of `tasks.reproduce.PLANS`.

    Attributes:
        name: by which it is asked for.
        title: what it shows, in a line.
        cells: makes all its numbers, in the order of the paper.
        orderings: pairs of rows, the first of which the paper has above the second; None for those
            that follow from the printed numbers.
        derive: cells without a run, from the numbers of those with one.
        notes: what has to be said below it.
        beside: tables and plots of its run that are laid beside it.
        bars: metrics that are drawn as bars, a group a data set and a bar a row.
        sheet: pictures of its run that are laid beside it on one sheet.
        costs: whether seconds an image and memory are told, too.
    """

    name: str
    title: str
    cells: Callable[[], list[Cell]]
    orderings: tuple[tuple[str, str], ...] | None = None
    derive: Callable[[Sequence[Cell], Mapping[Cell, float]], dict[Cell, float]] = _derive_nothing
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    bars: tuple[str, ...] = ()
    sheet: Sheet | None = None
    costs: bool = False

    def demo_cells(self) -> list[Cell]:
        """Its rows on the demo world: each method, setting and metric once."""
        once: dict[tuple[str, str, str], Cell] = {}
        for cell in self.cells():
            key = (cell.row, cell.setting, cell.metric)
            there = once.get(key)
            if there is None or (there.reading is None and cell.reading is not None):
                shapes = replace(cell, backbone="demo", data="shapes", paper=None, source="")
                once[key] = shapes
        return list(once.values())

    def claims(self) -> list[tuple[str, str, str]]:
        """Rows of which the first is above the second wherever the paper prints both, and the metric.

        The metric is "" for a figure, whose claims are of whatever it measures.
        """
        if self.orderings is not None:
            return [(above, below, "") for above, below in self.orderings]
        printed: dict[str, dict[str, dict[tuple[str, str], float]]] = {}
        for cell in self.cells():
            if cell.reading and cell.paper is not None:
                rows = printed.setdefault(cell.metric, {})
                rows.setdefault(cell.row, {})[cell.backbone, cell.data] = cell.paper
        return [
            (one, other, metric)
            for metric, rows in printed.items()
            for one, other in permutations(rows, 2)
            if (both := rows[one].keys() & rows[other].keys())
            and all(rows[one][where] > rows[other][where] for where in both)
        ]


@dataclass
class Job:
    """A run that fills one cell or several.

    Attributes:
        name: of its folder below ``OUTPUT/runs``.
        config: packaged config.
        task: class name.
        options: its fields, as words.
        methods: all that its cells need, in one pass over the images.
        cells: which cells it fills.
    """

    config: str
    task: str
    options: tuple[str, ...]
    name: str = ""
    methods: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """The options as `tasks.predict` takes them."""
        found = dict(as_field(option) for option in self.options)
        return found | ({"model.methods": self.methods} if self.methods else {})

    @property
    def shards(self) -> str:
        """The folder of its data set, below the one of all data sets."""
        return Path(_experiment(self.config)["data"]["init_args"]["shards"]).name

    def shards_command(self, folder: Path) -> str:
        """The command that makes its shards; each experiment has it in its second line."""
        path = _experiment_file(self.config)
        line = path.read_text(encoding="utf-8").splitlines()[1].lstrip("# ")
        return f"{line.rpartition(' ')[0]} {folder}"


def jobs(wanted: Sequence[Cell], demo: bool = False) -> list[Job]:
    """The runs that fill cells: one for all methods of the same config and options."""
    found: dict[tuple[str, ...], Job] = {}
    for cell in wanted:
        if (reading := cell.reading) is None:
            continue
        own = _experiment(reading.config)["model"]["class_path"].rpartition(".")[2]
        task = reading.task or own
        config = f"demo_{task.lower()}" if demo else reading.config
        options = reading.options_of(demo)
        job = found.setdefault((config, task, *options), Job(config, task, options))
        job.cells.append(cell)
        if reading.method and reading.method not in job.methods:
            job.methods.append(reading.method)
        values = [_short(option) for option in job.options]
        other = f"-{task.lower()}" if task != own and not demo else ""
        words = "-".join([config + other, *values, *job.methods])
        job.name = "".join(c if c.isalnum() or c in "-_." else "_" for c in words)
    return list(found.values())


def _experiment_file(config: str) -> Path:
    parts = split_name(config)
    assert parts  # a test goes through all
    return parts[1]


@cache
def _experiment(config: str) -> dict[str, Any]:
    """What the experiment of a packaged config sets."""
    return read_yaml(_experiment_file(config))


def _short(option: str) -> str:
    """``--model.backbone.blocks=from 7`` as ``blocks=from 7``."""
    name, equals, value = option.partition("=")
    return name.rpartition(".")[2] + equals + value


def as_field(option: str) -> tuple[str, Any]:
    """A word of the command line, ``--model.tau=2``, as a field and its value.

    Raises:
        InvalidConfig: the value is no YAML.

    Example:
        >>> as_field("--model.tau=2")
        ('model.tau', 2)
    """
    name, _, value = option.removeprefix("--").partition("=")
    return name, parse_yaml(value, option)
