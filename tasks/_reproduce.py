"""A table or figure of the paper: the runs that it needs, and its numbers beside ours.

`cells` says what stands where and which run gives it, `run_all` does the runs, `Reproduction` is the
table. Only a run imports torch and Lightning.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from pathlib import Path
from typing import Any

import yaml

from common import signals
from common.errors import UserError
from common.files import csv_text, write_atomically
from tasks._configs import FOLDER, SHORT, parse_yaml
from tasks._paper import EXPLAIN, METHODS, Number, Reading, numbers, readings
from tasks.run import Run
from tasks.run.compare import Side

log = logging.getLogger(__name__)

TABLES = ("table1", "table2", "table3", "table4", "table5", "table6")
FIGURES = {
    "figure4": ("fsr_survival",),
    "figure5": ("affinity", "affinity_ln_post"),
    "figure6": ("redundancy",),
    "figure10": (),
}
"""Figure -> the tables and plots of its run that are laid beside it."""
NAMES = (*TABLES, *FIGURES)

_ANALYSES = {
    "figure4": ("voc", ("mFSR_raw", "mFSR_consistent", "mFSR_consistent_same_token", "mFSR_blind")),
    "figure5": (
        "voc",
        (
            "affinity_positive",
            "affinity_negative",
            "affinity_last_ffn",
            "affinity_last_ffn_ln_post",
        ),
    ),
    "figure6": (
        "pascal_context",
        (
            "redundancy_empty",
            "redundancy_zero",
            "redundancy_empty_architecture",
            "redundancy_zero_architecture",
        ),
    ),
}
"""Figure -> data set, and the metrics that it draws."""

CLAIMS = {
    "figure4": [("mFSR_consistent", "mFSR_raw")],
    "figure5": [
        ("affinity_positive", "affinity_negative"),
        ("affinity_positive", "affinity_last_ffn"),
    ],
    "figure6": [("redundancy_zero", "redundancy_empty")],
    "figure10": [("Ours", "CLIP")],
}
"""Figure -> pairs of rows, the first of which the paper has above the second."""

_FIGURE_BACKBONE = "vit_b16"
_MEAN = "Mean difference"


@dataclass(frozen=True)
class Cell:
    """A number of a table or figure.

    Attributes:
        row: method, or what is measured.
        setting: which of several readings of the row, in the words of its options; "" for the first.
        backbone: as in ``configs/backbones``; "" for the mean over all five; "demo".
        data: data set; "shapes" in the demo.
        metric: what the paper calls it.
        paper: fraction as printed; None for a dash, or where the paper draws and prints no number.
        reading: the run that gives ours; None where it is not ours to run.
        task: in place of the task that the reading's config has; "" for that.
    """

    row: str
    setting: str
    backbone: str
    data: str
    metric: str
    paper: float | None
    reading: Reading | None = None
    task: str = ""


@dataclass
class Job:
    """A run that fills one cell or several.

    Attributes:
        name: of its folder below ``OUTPUT/runs``.
        config: packaged config.
        task: class name.
        options: its fields, ``methods`` excepted.
        methods: all that its cells need, in one pass over the images.
        data: data set.
        cells: which cells it fills.
    """

    name: str
    config: str
    task: str
    options: tuple[str, ...]
    data: str
    methods: list[str] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    @property
    def fields(self) -> dict[str, Any]:
        """The options as `tasks.predict` takes them."""
        found = dict(as_field(option) for option in self.options)
        return found | ({"model.methods": self.methods} if self.methods else {})


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


def cells(name: str, demo: bool = False) -> list[Cell]:
    """All numbers of a table or figure, in the order of the paper.

    Args:
        name: one of `NAMES`.
        demo: those of the demo world: a row for each method, of one data set and backbone.
    """
    found = list(_printed(name.removeprefix("table")) if name in TABLES else _drawn(name))
    if not demo:
        return found
    once: dict[tuple[str, str, str], Cell] = {}
    for cell in found:
        if cell.row != _MEAN:
            key = (cell.row, cell.setting, cell.metric)
            there = once.get(key)
            if there is None or (there.reading is None and cell.reading is not None):
                once[key] = Cell(*key[:2], "demo", "shapes", key[2], None, cell.reading, cell.task)
    return list(once.values())


def _printed(table: str) -> Iterator[Cell]:
    for number in numbers():
        if number.table == table:
            yield from _of_number(number)


def _of_number(number: Number) -> Iterator[Cell]:
    where = (number.backbone, number.data, number.metric, number.value)
    found = readings(number)
    if not found:
        yield Cell(number.row, "", *where)
    metrics = {reading.metric for reading in found}
    common = set.intersection(*(set(reading.options) for reading in found)) if found else set()
    for reading in found:
        options = [o.removeprefix("--model.") for o in reading.options if o not in common]
        setting = " ".join([*options, *([reading.metric] if len(metrics) > 1 else [])])
        yield Cell(number.row, setting, *where, reading)


def _drawn(figure: str) -> Iterator[Cell]:
    backbone = _FIGURE_BACKBONE
    if figure != "figure10":
        data, metrics = _ANALYSES[figure]
        printed = {
            reading.metric: number.value
            for number in numbers()
            if not number.table
            for reading in readings(number)
        }
        for metric in metrics:
            reading = Reading(f"{backbone}_{data}_analysis", (), metric)
            yield Cell(metric, "", backbone, data, figure, printed.get(metric), reading)
        return
    measured = ("point_accuracy", "point_accuracy_down_sample_1")
    rows = [(row, f"--model.methods=[{method}]", ()) for row, method in METHODS.items()]
    larger = ("Ours-512", "--model.methods=[surgery]", ("--data.image_size=512",))
    for row, methods, options in [*rows, larger]:
        for data, experiment in EXPLAIN.items():
            for metric in measured:
                reading = Reading(f"{backbone}_{experiment}", (methods, *options), metric)
                yield Cell(row, "", backbone, data, metric, None, reading, "Interactive")


def jobs(wanted: Sequence[Cell], demo: bool = False) -> list[Job]:
    """The runs that fill cells: one for all methods of the same config and options."""
    found: dict[tuple[str, ...], Job] = {}
    for cell in wanted:
        if cell.reading is None:
            continue
        task = cell.task or _settings(cell.reading.config)["model"]["class_path"].rpartition(".")[2]
        config = f"demo_{task.lower()}" if demo else cell.reading.config
        options = tuple(o for o in cell.reading.options if not o.startswith("--model.methods="))
        key = (config, task, *options)
        job = found.setdefault(key, Job("", config, task, options, cell.data))
        job.cells.append(cell)
        method = _method(cell.reading)
        if method and method not in job.methods:
            job.methods.append(method)
    for job in found.values():
        values = [option.partition("=")[2] for option in job.options]
        task = f"-{job.task.lower()}" if job.cells[0].task and not demo else ""
        words = "-".join([job.config + task, *values, *job.methods])
        job.name = "".join(c if c.isalnum() or c in "-_." else "_" for c in words)
    return list(found.values())


def _method(reading: Reading) -> str:
    """The one method of which a reading takes the metric; "" where its task has none."""
    found = dict(as_field(option) for option in reading.options).get("model.methods", [""])
    return str(found[0])


def _experiment(config: str) -> Path:
    name = next(
        config.removeprefix(f"{path.stem}_")
        for path in sorted((FOLDER / "backbones").glob("*.yaml"), reverse=True)
        if config.startswith(f"{path.stem}_")
    )
    return FOLDER / "experiments" / f"{SHORT.get(name, name)}.yaml"


def _settings(config: str) -> dict[str, Any]:
    """What the experiment of a packaged config sets."""
    settings: dict[str, Any] = yaml.safe_load(_experiment(config).read_text(encoding="utf-8"))
    return settings


def shards_command(job: Job, folder: Path) -> str:
    """The command that makes a job's shards; each experiment has it in its second line."""
    line = _experiment(job.config).read_text(encoding="utf-8").splitlines()[1].lstrip("# ")
    return f"{line.rpartition(' ')[0]} {folder}"


@dataclass
class Reproduction:
    """A table or figure of the paper beside our runs.

    Attributes:
        name: one of `NAMES`.
        cells: its numbers.
        demo: whether ours are of the demo world.
        ours: cell -> our number.
        runs: cell -> name of the run that gave it.
        why: cell -> why there is no number of ours.
    """

    name: str
    cells: list[Cell]
    demo: bool
    ours: dict[Cell, float] = field(default_factory=dict)
    runs: dict[Cell, str] = field(default_factory=dict)
    why: dict[Cell, str] = field(default_factory=dict)

    def fill(self, job: Job, run: Run) -> None:
        """Take a finished run's numbers."""
        summary = run.summary
        for cell in job.cells:
            assert cell.reading is not None  # jobs are made of readings
            of = summary.get("methods", {}).get(_method(cell.reading), summary["metrics"])
            value = of.get(cell.reading.metric)
            if value is None:
                self.why[cell] = f"{job.name} has no {cell.reading.metric}"
            else:
                self.ours[cell] = float(value)
                self.runs[cell] = job.name
        self._take_means()

    def _take_means(self) -> None:
        """Table 1's mean over backbones of ours minus CLIP, once all backbones are there."""
        for mean in self.cells:
            if mean.row == _MEAN:
                of = {
                    (cell.backbone, cell.row): self.ours.get(cell)
                    for cell in self.cells
                    if (cell.data, cell.metric, cell.setting) == (mean.data, mean.metric, "")
                    and cell.row != _MEAN
                }
                pairs = [(of[b, "Ours"], of.get((b, "CLIP"))) for b, row in of if row == "Ours"]
                found = [a - b for a, b in pairs if a is not None and b is not None]
                if found and len(found) == len(pairs):
                    self.ours[mean] = statistics.mean(found)

    def table(self) -> Side:
        """A row for each method and backbone, a column for each data set and metric."""
        columns = list(dict.fromkeys((cell.data, cell.metric) for cell in self.cells))
        rows: dict[tuple[str, str, str], dict[tuple[str, str], str]] = {}
        for cell in self.cells:
            row = rows.setdefault((cell.row, cell.setting, cell.backbone), {})
            row[cell.data, cell.metric] = self._shown(cell)
        return Side(
            f"{self.name}, percent",
            ("row", "setting", "backbone", *(f"{data} {metric}" for data, metric in columns)),
            [(*key, *(row.get(column, "") for column in columns)) for key, row in rows.items()],
        )

    def _shown(self, cell: Cell) -> str:
        ours = f"{100 * self.ours[cell]:.2f}" if cell in self.ours else "--"
        if cell.paper is None:
            return ours
        difference = f"; {100 * (self.ours[cell] - cell.paper):+.2f}" if cell in self.ours else ""
        return f"{ours} ({100 * cell.paper:.2f}{difference})"

    def notes(self) -> list[str]:
        """What has to be said below the table."""
        found = [
            "Ours, on the demo world: its numbers are none of the paper's, their ordering can be "
            "compared."
            if self.demo
            else "Ours (as printed; difference). `--`: no number of ours."
        ]
        if self.name in TABLES and self.name != "table5":  # segmentation does without
            found.append(
                "Feature surgery in the released code's form, unless a setting says otherwise "
                "(docs/fidelity.md)."
            )
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
        not_ours = dict.fromkeys(c.row for c in self.cells if c.reading is None and c.row != _MEAN)
        with_runs = {c.row for c in self.cells if c.reading}
        if printed := [row for row in not_ours if row not in with_runs]:
            where = "" if self.demo else ", as printed"
            found.append(f"Not ours to run{where}: {', '.join(printed)}.")
        return found + (self.ordering() if self.demo else [])

    def ordering(self) -> list[str]:
        """Whether rows are above each other as they are, everywhere, in the paper."""
        held, broken = 0, []
        for above, below, metric in claims(self.name):
            pairs = self._pairs(above, below, metric)
            for one, other in pairs:
                if self.ours[one] > self.ours[other]:
                    held += 1
                    continue
                a, b = (
                    f"{c.row}{f' ({c.setting})' if c.setting else ''} {100 * self.ours[c]:.2f}"
                    for c in (one, other)
                )
                broken.append(f"DOES NOT HOLD here: {metric}: {a} is not above {b}")
        if not held and not broken:
            return ["Nothing to compare the paper's ordering with."]
        return [
            f"Of the paper's ordering, {held} of {held + len(broken)} pairs hold here.",
            *broken,
        ]

    def _pairs(self, above: str, below: str, metric: str) -> list[tuple[Cell, Cell]]:
        """Cells of two rows; where both have several settings, those of the same one, if any."""
        found = [
            [c for c in self.cells if c.row == row and c in self.ours and metric in (c.metric, "")]
            for row in (above, below)
        ]
        pairs = [(a, b) for a, b in product(*found) if not metric or a.metric == b.metric]
        if not metric:
            pairs = [(a, b) for a, b in pairs if a.metric == b.metric]
        same = [(a, b) for a, b in pairs if a.setting == b.setting]
        several = all(len({c.setting for c in side}) > 1 for side in found)
        return same if several and same else pairs

    def write(self, folder: Path) -> None:
        """Write ``NAME.md`` and, with all digits and the runs' names, ``NAME.csv``."""
        folder.mkdir(parents=True, exist_ok=True)
        notes = "\n".join(f"- {note}" for note in self.notes())
        write_atomically(folder / f"{self.name}.md", f"{self.table().markdown()}\n\n{notes}\n")
        rows = []
        for cell in self.cells:
            ours = self.ours.get(cell)
            known = ours is not None and cell.paper is not None
            values = (ours, cell.paper, ours - cell.paper if known else None)  # type: ignore[operator]  # both are numbers
            rows.append(
                (
                    *(cell.row, cell.setting, cell.backbone, cell.data, cell.metric),
                    *("" if value is None else value for value in values),
                    *(self.runs.get(cell, ""), self.why.get(cell, "")),
                )
            )
        columns = ("row", "setting", "backbone", "data", "metric")
        more = ("ours", "paper", "difference", "run", "why_not")
        write_atomically(folder / f"{self.name}.csv", csv_text((*columns, *more), rows))


def claims(name: str) -> list[tuple[str, str, str]]:
    """Rows of which the first is above the second wherever the paper prints both, and the metric.

    The metric is "" for a figure, whose claims are of whatever it measures.
    """
    if name in CLAIMS:
        return [(above, below, "") for above, below in CLAIMS[name]]
    printed: dict[str, dict[str, dict[tuple[str, str], float]]] = {}
    for cell in cells(name):
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


def run_all(
    found: Reproduction,
    output: Path,
    *,
    data_root: Path = Path("shards"),
    scenes: int | None = None,
    fields: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = log.info,
) -> bool:
    """Do the runs of a table, or go on with them; it is written anew after each.

    Args:
        found: the table, filled on the way.
        output: folder of the table; runs are below ``runs``.
        data_root: folder of the data sets' shards, each in a folder of its name.
        scenes: of the demo world; None for its 48.
        fields: of every run, as `tasks.predict` takes them.
        tell: hears of each run.

    Returns:
        Whether no run failed. What has no data is not a failure.
    """
    import tasks

    todo = jobs(found.cells, found.demo)
    good = True
    first = signals.speaks()  # one process of those that share the runs writes and tells
    for i, job in enumerate(todo, start=1):
        folder = output / "runs" / job.name
        if first:
            tell(f"[{i}/{len(todo)}] {job.name}")
        reason = None if found.demo else missing(job, data_root)
        if found.demo and any(word.endswith(".safetensors") for word in job.options):
            reason = "the demo has no learned prompts"
        if reason is None:
            config, more = _objects(job, output, data_root, found.demo, scenes)
            try:
                run = tasks.predict(
                    config,
                    **{
                        **more,
                        "trainer.devices": 1,
                        **(fields or {}),
                        "writer.output": str(folder),
                    },
                )
                if first:
                    found.fill(job, run)
                    _lay_beside(found.name, run.folder, output)
            except Exception as error:
                signals.check()  # a stop wins over what it causes
                good = False
                reason = f"the run failed: {' '.join(str(error).split()) or repr(error)}"
                if not isinstance(error, UserError | OSError):  # our fault: the others still go on
                    traceback.print_exc()
        if reason is not None:
            found.why |= dict.fromkeys(job.cells, reason)
            if first:
                tell(f"    {reason}")
        if first:
            found.write(output)
    return good


def missing(job: Job, data_root: Path) -> str | None:
    """What a run lacks, and how to get it; None if nothing."""
    from datamodules._shards import tars_in

    folder = data_root / job.data
    if not tars_in(str(folder)):
        return f"no shards in {folder}; make them: {shards_command(job, folder)}"
    for value in map(str, job.fields.values()):
        if value.endswith(".safetensors") and not (data_root / value).is_file():
            return f"no {data_root / value}: features of TaI-DPT's learned prompts"
    return None


def _objects(
    job: Job, output: Path, data_root: Path, demo: bool, scenes: int | None
) -> tuple[Any, dict[str, Any]]:
    """Config and fields of a job's run."""
    fields = {
        name: str(data_root / value) if str(value).endswith(".safetensors") else value
        for name, value in job.fields.items()
    }
    if demo:
        shapes = {"shards": str(output / "shards" / f"shapes-{scenes or 'demo'}")}
        drawn = {"scenes": scenes} if scenes else {}
        return {
            "model": {
                "class_path": job.task,
                "init_args": {"backbone": {"model": "demo", "pretrained": "demo"}},
            },
            "data": {"class_path": "Shapes", "init_args": {**shapes, **drawn}},
        }, fields
    if job.cells[0].task:
        fields["model"] = {"class_path": job.task}
    return job.config, {**fields, "data.shards": str(data_root / job.data)}


def _lay_beside(name: str, run: Path, output: Path) -> None:
    """Copy what a figure's run has drawn and listed to the figure."""
    for table in FIGURES.get(name, ()):
        for ending in ("csv", "png"):
            if (run / f"{table}.{ending}").is_file():
                shutil.copyfile(run / f"{table}.{ending}", output / f"{name}-{table}.{ending}")
