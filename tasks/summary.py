"""A run's summary: the records of its published shards merged in shard order."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torchmetrics import Metric

import tasks
from datamodules.samples import DatasetInfo, SampleError
from tasks import TASKS
from tasks._files import write_atomically
from tasks._output import RunError, ShardRecord, find_shard
from tasks._tables import write_tables
from tasks.base import BackboneConfig, Report, Task


def read_run(folder: Path) -> tuple[Task, DatasetInfo]:
    """The task, without its backbone, and the data set of a run.

    Raises:
        RunError: the folder holds no run.
    """
    try:
        run = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is not a run's folder: {error}") from None
    settings = dict(run["identity"]["task"])
    name = settings.pop("class")
    if name not in TASKS.values():
        raise RunError(f"{folder} is a run of an unknown task {name!r}")
    config = BackboneConfig(**settings.pop("backbone"))
    task: Task = getattr(tasks, name)(config, **settings)
    return task, DatasetInfo(**{k: _tuples(v) for k, v in run["info"].items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def summarise(
    folder: Path, task: Task, info: DatasetInfo, elsewhere: dict[str, ShardRecord] | None = None
) -> Report:
    """Merge the records of all published shards in shard order, and write the run's summary files.

    Writes ``metrics.json``, ``metrics.csv`` (class-wise), the task's tables and ``errors.jsonl``.
    ``elsewhere`` are the records of shards that other machines hold.
    """
    metrics = task.configure_metrics(info)
    images, errors, done = 0, [], 0
    names = json.loads((folder / "run.json").read_text())["shards"]
    for name in names:
        record = _published(folder, name) or (elsewhere or {}).get(name)
        if isinstance(record, SampleError):
            errors.append(record)
        elif record:
            done += 1
            images += record.images
            errors += record.errors
            merge_states(metrics, record.states)
    report = task.report(metrics, info)
    summary = {
        "metrics": report.metrics,
        **({"baseline": report.baseline} if report.baseline else {}),
        "per_class": report.per_class,
        "details": report.details,
        "images": images,
        "errors": len(errors),
        "shards": {"done": done, "of": len(names)},
    }
    write_atomically(folder / "metrics.json", json.dumps(_finite(summary), indent=1))
    write_atomically(folder / "metrics.csv", _csv(report))
    write_tables(folder, report.tables)
    lines = (
        json.dumps({"shard": e.shard, "key": e.key, "reason": e.reason}, ensure_ascii=False)
        for e in errors
    )
    write_atomically(folder / "errors.jsonl", "".join(f"{line}\n" for line in lines))
    return report


def _published(folder: Path, name: str) -> ShardRecord | SampleError | None:
    path = find_shard(folder, name)
    if path:
        return ShardRecord.load(path)
    lost = folder / f"{name}.error.json"
    return SampleError(*json.loads(lost.read_text())) if lost.exists() else None


def merge_states(metrics: dict[str, Metric], states: dict[str, Tensor]) -> None:
    """Add the states of one shard, as `Task.pop_metric_state` gave them, to ``metrics``."""
    for name, metric in metrics.items():
        prefix = f"{name}."
        part = {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
        if part:
            # A list that stayed empty in this shard was not stored.
            lists = {
                k: [part[k]] if k in part else []
                for k, default in metric._defaults.items()
                if isinstance(default, list)
            }
            metric.merge_state(part | lists)


def _csv(report: Report) -> str:
    columns = list(dict.fromkeys(c for values in report.per_class.values() for c in values))
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["class", *columns])
    for name, values in report.per_class.items():
        table.writerow([name, *(values.get(c, "") for c in columns)])
    for name, value in report.metrics.items():
        table.writerow([name, value])
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    """``value`` with NaN as null: JSON knows no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, float) and value != value:
        return None
    return value
