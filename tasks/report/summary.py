"""What a report says above its images: what was run, how well it did, what could not be used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tasks.report.answers import Column
from tasks.run import Run, RunError
from tasks.run.compare import COUNTS
from tasks.run.identity import flatten
from tasks.run.meaning import Meaning, meaning_of, remarks

ERRORS_SHOWN = 1000


@dataclass(frozen=True)
class Measured:
    """One metric, of every column.

    Attributes:
        name: of the metric.
        meaning: in words; may be empty.
        percent: whether it is a share; else a plain number.
        values: one a column; None where there is none.
    """

    name: str
    meaning: str
    percent: bool
    values: list[float | None]


def metrics_of(columns: Sequence[Column]) -> list[Measured]:
    """All metrics of all columns; the first ones are the headline."""
    found = [_metrics(column) for column in columns]
    names = dict.fromkeys(name for of in found for name in of)
    measured = []
    for name in names:
        said = (meaning_of(column.settings["class"], name) for column in columns)
        meaning = next(filter(None, said), None) or Meaning("")
        measured.append(
            Measured(name, meaning.text, meaning.percent, [of.get(name) for of in found])
        )
    return measured


def remarks_of(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Where surgery is below plain CLIP."""
    return [
        f"{name}: {remark}" if len(runs) > 1 else remark
        for run, name in zip(runs, names, strict=True)
        for remark in remarks(run.settings["task"]["class"], _summary(run))
    ]


def classes_of(columns: Sequence[Column]) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    """The class-wise numbers: (column, what is measured) heads, and a row of values a class."""
    found = _per_class(columns)
    names = dict.fromkeys(name for column in columns for name in found[column.run])
    heads: dict[str, list[tuple[Column, str]]] = {}
    for column in columns:
        rows = found[column.run]
        kinds = dict.fromkeys(kind for row in rows.values() for kind in row if "." not in kind)
        for kind in kinds:
            stored = kind if _is_first(column) or kind in COUNTS else f"{column.method}.{kind}"
            if any(stored in row for row in rows.values()):
                heads.setdefault(kind, []).append((column, stored))
    chosen = [
        (kind, column, stored)
        for kind, of in heads.items()
        for column, stored in (of[:1] if kind in COUNTS else of)
    ]
    several = len(columns) > 1
    titles = [
        f"{kind} {column.label}" if several and kind not in COUNTS else kind
        for kind, column, _ in chosen
    ]
    numbers = [
        (name, [found[column.run].get(name, {}).get(stored) for _, column, stored in chosen])
        for name in names
    ]
    return titles, numbers


def bars_of(columns: Sequence[Column]) -> tuple[str, dict[str, list[float | None]]]:
    """The first thing that is measured of classes, and its values: class -> one a column."""
    found = _per_class(columns)
    for column in columns:
        for row in found[column.run].values():
            if kind := next((k for k in row if k not in COUNTS and "." not in k), None):
                stored = [kind if _is_first(c) else f"{c.method}.{kind}" for c in columns]
                return kind, {
                    name: [
                        found[c.run].get(name, {}).get(s)
                        for c, s in zip(columns, stored, strict=True)
                    ]
                    for name in dict.fromkeys(n for c in columns for n in found[c.run])
                }
    return "", {}


def _is_first(column: Column) -> bool:
    return column.method in (None, *column.settings.get("methods", [])[:1])


def _metrics(column: Column) -> dict[str, float | None]:
    methods = _summary(column.run).get("methods", {})
    found: dict[str, float | None] = methods.get(column.method) or _summary(column.run)["metrics"]
    return found


def _summary(run: Run) -> dict[str, Any]:
    """The run's summary; an empty one of a run that was not summarised yet."""
    try:
        return run.summary
    except RunError:
        return {"metrics": {}, "per_class": {}, "images": None, "errors": None}


def _per_class(columns: Sequence[Column]) -> dict[Run, dict[str, dict[str, float | None]]]:
    """The class-wise numbers of each run, read once."""
    return {run: _summary(run)["per_class"] for run in {column.run for column in columns}}


def facts_of(run: Run) -> list[tuple[str, str]]:
    """What was run, in the few words that tell runs apart."""
    task, data = run.settings["task"], run.settings["data"]
    backbone = task.get("backbone", {})
    pretrained = backbone.get("pretrained") or "random weights"
    model = str(backbone.get("model", "?"))
    summary = _summary(run)
    done = len(run.shards) - len(run.missing())
    facts = {
        "task": task["class"],
        "data": data.get("name", "?"),
        "model": model if model == pretrained else f"{model} · {pretrained}",
        "attention": backbone.get("attention", ""),
        "methods": ", ".join(task.get("methods") or []),
        "form": task.get("feature_surgery") or task.get("form") or "",
        "precision": run.settings.get("precision", ""),
        "images": "" if summary["images"] is None else f"{summary['images']:,}",
        "errors": "" if summary["errors"] is None else f"{summary['errors']:,}",
        "shards": f"{done} of {len(run.shards)}" if done < len(run.shards) else "",
        **_time(run),
        "device": _device(run),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in ("", None)]


def _time(run: Run) -> dict[str, str]:
    """When, how long and how fast, of the jobs that made the run."""
    jobs = run.jobs
    if not jobs:
        return {}
    seconds, images = (sum(job[name] for job in jobs) for name in ("seconds", "images"))
    return {
        "begun": str(jobs[0]["began"]).replace("T", " ")[:16],
        "time": _duration(seconds) + (f" in {len(jobs)} jobs" if len(jobs) > 1 else ""),
        "speed": f"{images / seconds:.3g} images/s" if seconds and images else "",
    }


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _device(run: Run) -> str:
    device = run.described.get("device") or {}
    return f"{device.get('type', '')} {device.get('name', '')}".strip()


def settings_of(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Every setting and version: its name, its value in each run, and whether they differ."""
    tables = []
    for run in runs:
        described = {"versions": run.described.get("versions", {}), **run.settings}
        tables.append(flatten(described))
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [_short(table[key]) if key in table else "--" for table in tables]
        rows.append((key, values, len(set(values)) > 1))
    return rows


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:297]}..."


@dataclass(frozen=True)
class Errors:
    """What of a run could not be used.

    Attributes:
        total: how many samples and shards.
        reasons: how often each reason was given, the most frequent first.
        rows: run, shard, key and reason of the first of them.
    """

    total: int
    reasons: list[tuple[str, int]]
    rows: list[tuple[str, str, str, str]]


def errors_of(runs: Sequence[Run], names: Sequence[str]) -> Errors:
    """The errors of all runs."""
    rows: list[tuple[str, str, str, str]] = []
    for run, name in zip(runs, names, strict=True):
        with suppress(RunError):  # there is no list yet
            rows += [(name, error.shard, error.key, error.reason) for error in run.errors]
    reasons = Counter(reason for *_, reason in rows)
    return Errors(len(rows), reasons.most_common(), rows[:ERRORS_SHOWN])
