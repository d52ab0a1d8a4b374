"""Runs side by side: their metrics, their classes, their settings, and the images they disagree on."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeVar

import numpy as np

from common.files import csv_text, write_atomically
from tasks.run.folder import Run
from tasks.run.identity import flatten
from tasks.run.image import StoredImage
from tasks.run.meaning import meaning_of
from tasks.run.place import in_store
from tasks.run.results import LabelMap, Masks, Scores

COUNTS = ("images", "positives", "points")
"""Columns of classes that say of how much the others are."""

BEST = 5
"""How many of the highest scores of an image are compared."""

_LONGEST = 16  # letters of a name that heads a column

Value = str | float | None
Key = TypeVar("Key")


@dataclass(frozen=True)
class Side:
    """One table of a comparison.

    Attributes:
        title: what it shows.
        columns: their names.
        rows: one value a column; None where there is none.
        percent: whether numbers are fractions, to be shown in percent.
        plain: metrics, or columns of classes, that are no fractions: cosines, distances.
        shown: column -> what people see in its place, where that is long; the csv has the whole.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Value, ...]]
    percent: bool = True
    plain: frozenset[str] = frozenset()
    shown: Mapping[str, str] = field(default_factory=dict)

    @property
    def heads(self) -> tuple[str, ...]:
        """The columns' names as people see them."""
        return tuple(self.shown.get(column, column) for column in self.columns)

    def markdown(self) -> str:
        """The table, with its title above."""
        lines = [self.heads, ("---",) * len(self.columns)]
        lines += map(self._cells, self.rows)
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])

    def text(self) -> str:
        """The same in columns, for a terminal."""
        lines = [self.heads, *map(self._cells, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i and self.percent else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def csv(self) -> str:
        """The same with all digits."""
        rows = (["" if value is None else value for value in row] for row in self.rows)
        return csv_text(self.columns, rows)

    def _cells(self, row: tuple[Value, ...]) -> tuple[str, ...]:
        plain = any(value in self.plain for value in row if isinstance(value, str))
        numbers = "{:.4f}".format if plain else lambda value: f"{100 * value:.2f}"
        return tuple(
            "--" if value is None else numbers(value) if isinstance(value, float) else value
            for value in row
        )


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds.

    Attributes:
        sides: ``metrics``, ``classes``, ``settings`` and ``images``.
        letters: what runs with long names are called in them -> name.
    """

    sides: Mapping[str, Side]
    letters: Mapping[str, str]

    def legend(self) -> list[str]:
        """A line for each run that has a letter."""
        return [f"{letter}: {name}" for letter, name in self.letters.items()]

    def write(self, folder: Path) -> None:
        """Write ``compare.md``, and ``NAME.csv`` of each table."""
        folder.mkdir(parents=True, exist_ok=True)
        parts = ["# Runs side by side; shares in percent", *(f"- {line}" for line in self.legend())]
        parts += [side.markdown() for side in self.sides.values()]
        write_atomically(folder / "compare.md", "\n\n".join(parts) + "\n")
        for name, side in self.sides.items():
            write_atomically(folder / f"{name}.csv", side.csv())


def compare(runs: Sequence[Run], images: int = 10) -> Comparison:
    """Compare runs with the first one.

    Args:
        runs: two or more, finished or not, but summarised.
        images: how many of those that runs disagree on most are listed; 0 reads no results.

    Raises:
        RunError: a run can't be read.
    """
    names = names_of(runs)
    heads = _with_differences(names)
    letters = {}
    if max(map(len, names)) > _LONGEST and len(names) <= len(ascii_uppercase):
        letters = dict(zip(ascii_uppercase, names, strict=False))
    shown = dict(zip(heads, _with_differences([*letters]), strict=True)) if letters else {}
    metrics = [_metrics(run) for run in runs]
    classes = [
        {
            (name, column): value
            for name, row in run.per_class.items()
            for column, value in row.items()
        }
        for run in runs
    ]
    keys = [key for key in _union(classes) if key[1].rpartition(".")[2] not in COUNTS]
    rows = [(*key, *_beside([of.get(key) for of in classes])) for key in keys]
    rows = [row for row in rows if _largest(row[2 + len(runs) :]) is not None]
    rows.sort(key=lambda row: -(_largest(row[2 + len(runs) :]) or 0.0))
    settings = [flatten(run.settings) for run in runs]
    values = [
        [_short(of[key]) if key in of else None for of in settings] for key in _union(settings)
    ]
    tasks = {run.settings["task"]["class"] for run in runs}
    plain = frozenset(
        name
        for name in [*_union(metrics), *(column for _, column in keys)]
        for task in tasks
        if (meaning := meaning_of(task, name.rpartition(".")[2])) and not meaning.percent
    )
    sides = {
        "metrics": Side(
            "Metrics",
            ("metric", *heads),
            [(key, *_beside([of.get(key) for of in metrics])) for key in _union(metrics)],
            plain=plain,
            shown=shown,
        ),
        "classes": Side(
            "Classes, by their difference",
            ("class", "column", *heads),
            rows,
            plain=plain,
            shown=shown,
        ),
        "settings": Side(
            "Settings that differ",
            ("setting", *names),
            [
                (key, *row)
                for key, row in zip(_union(settings), values, strict=True)
                if len({*(json.dumps(of.get(key)) for of in settings)}) > 1
            ],
            percent=False,
            shown=shown,
        ),
    }
    if images:
        worst = heapq.nlargest(images, _disagreements(runs), key=lambda row: row[2])
        title = "Images that the runs disagree on most, from 0 to 100"
        sides["images"] = Side(title, ("shard", "image", "disagreement"), [*worst])
    return Comparison(sides, letters)


def disagreement(one: StoredImage, other: StoredImage) -> float | None:
    """How differently two runs answer for an image, in [0, 1]; None where it can't be said.

    The share of pixels of another class, of label maps; 1 - IoU, of masks, the mean over what either
    has; the share of the five best classes that differ, of scores.
    """
    maps = one.get(LabelMap), other.get(LabelMap)
    if maps[0] and maps[1]:
        a, b = maps[0].values, maps[1].values
        return float((a != b).mean()) if a.shape == b.shape else None
    masks = one.get(Masks), other.get(Masks)
    if masks[0] and masks[1]:
        return _of_masks(masks[0], masks[1])
    scores = one.get(Scores), other.get(Scores)
    if scores[0] and scores[1]:
        first, second = (_best(found) for found in (scores[0], scores[1]))
        return 1 - len(first & second) / len(first)
    return None


def _of_masks(one: Masks, other: Masks) -> float | None:
    if one.masks.shape[1:] != other.masks.shape[1:]:
        return None
    found = [dict(zip(masks.names, masks.masks, strict=True)) for masks in (one, other)]
    empty = np.zeros(one.masks.shape[1:], bool)
    unlike = []
    for name in _union(found):
        a, b = (of.get(name, empty) for of in found)
        union = int((a | b).sum())
        unlike.append(1 - int((a & b).sum()) / union if union else 0.0)
    return float(np.mean(unlike)) if unlike else 0.0


def _best(scores: Scores) -> set[str]:
    values = next(iter(scores.ways.values()))
    return {scores.names[i] for i in np.argsort(-values, kind="stable")[:BEST]}


def _disagreements(runs: Sequence[Run]) -> Iterator[tuple[str, str, float]]:
    """Shard, key and disagreement of each image that the first run and another have."""
    for shard in runs[0].shards:
        others = [{image.key: image for image in run.images([shard])} for run in runs[1:]]
        for image in runs[0].images([shard]):
            found = [disagreement(image, of[image.key]) for of in others if image.key in of]
            known = [value for value in found if value is not None]
            if known:
                yield shard, image.key, max(known)


def _with_differences(names: Sequence[str]) -> tuple[str, ...]:
    """A column for each run, and one for each difference to the first."""
    return (*names, *(f"{name} - {names[0]}" for name in names[1:]))


def names_of(runs: Sequence[Run]) -> list[str]:
    """What the runs are called: their folders' names, or their paths where these are the same."""
    short = [(f if in_store(f) else f.resolve()).name for f in (run.folder for run in runs)]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _metrics(run: Run) -> dict[str, float | None]:
    """All metrics; those of other methods than the first under their names."""
    beside = list(run.summary.get("methods", {}).items())[1:]
    return run.metrics | {f"{m}.{name}": value for m, of in beside for name, value in of.items()}


def _union(tables: Sequence[Mapping[Key, Any]]) -> list[Key]:
    """The keys of all, in their order."""
    return list(dict.fromkeys(key for table in tables for key in table))


def _beside(values: list[float | None]) -> list[float | None]:
    """Values, and their differences to the first one."""
    first, *rest = values
    return values + [None if v is None or first is None else v - first for v in rest]


def _largest(differences: Sequence[Value]) -> float | None:
    """The largest difference, whatever its sign; None where nothing can be compared."""
    return max((abs(value) for value in differences if isinstance(value, float)), default=None)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
