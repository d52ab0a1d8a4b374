"""A run's summary files, from the records of its published shards merged in shard order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from common.files import csv_text, finite
from datamodules._samples import SampleError
from tasks.run.errors import RunError
from tasks.run.place import files_in, in_store, read, write
from tasks.run.shard import ShardRecord, find_shards, load_states
from tasks.run.tables import write_tables

if TYPE_CHECKING:
    from tasks.measures import Measures, Report

_CONNECTIONS = 16
_IN_MEMORY = 64
"""Shards of a store whose states are fetched at a time."""

Published = tuple[ShardRecord, dict[str, Tensor]]
"""What a finished shard says of itself, and the states of what was measured on it."""


def merge_shards(
    folder: Path, names: Sequence[str], measures: Measures, elsewhere: Mapping[str, Published]
) -> dict[str, ShardRecord | SampleError]:
    """Merge the states of all finished shards into ``measures``, in shard order.

    Args:
        folder: of the run.
        names: all shards of the run, in order.
        measures: empty.
        elsewhere: what other machines hold, of shards that are not in ``folder``.

    Returns:
        Shard -> what it says of itself, or why it is missing; nothing for those that are not done.
    """
    outcomes: dict[str, ShardRecord | SampleError] = {}
    there = files_in(folder)
    places = find_shards(there, names)
    loaded = _load(list(places.values()))
    for name in names:
        published = next(loaded) if name in places else elsewhere.get(name)
        if published:
            outcomes[name], states = published
            measures.merge(states)
        elif _loss(name) in there:
            outcomes[name] = _read_loss(folder / _loss(name))
    return outcomes


def _load(paths: Sequence[Path]) -> Iterator[Published]:
    """What shards say of themselves, in order; of a store several at a time, for each takes a while."""
    if not any(map(in_store, paths)):
        yield from map(load_states, paths)
        return
    with ThreadPoolExecutor(_CONNECTIONS, "fetch") as pool:
        for start in range(0, len(paths), _IN_MEMORY):
            yield from pool.map(load_states, paths[start : start + _IN_MEMORY])


def note_loss(folder: Path, error: SampleError) -> None:
    """Write down that a shard can't be read, until it is tried again."""
    text = json.dumps(list(error), ensure_ascii=False)
    write(folder / _loss(error.shard), text)


def _loss(name: str) -> str:
    return f"{name}.error.json"


def _read_loss(path: Path) -> SampleError:
    """Why a shard could not be read."""
    try:
        return SampleError(*json.loads(read(path)))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} can't be read ({error}): delete it") from None


def write_summary(
    folder: Path, report: Report, outcomes: Mapping[str, ShardRecord | SampleError], shards: int
) -> None:
    """Write ``metrics.json``, ``metrics.csv`` (class-wise), ``errors.jsonl`` and the report's tables."""
    records = [record for record in outcomes.values() if isinstance(record, ShardRecord)]
    errors = [
        error
        for record in outcomes.values()
        for error in (record.errors if isinstance(record, ShardRecord) else [record])
    ]
    summary = {
        "metrics": report.metrics,
        **({"methods": report.methods} if report.methods else {}),
        "per_class": report.per_class,
        "details": report.details,
        "images": sum(record.images for record in records),
        "errors": len(errors),
        "shards": {"done": len(records), "of": shards},
    }
    write(folder / "metrics.json", json.dumps(finite(summary), indent=1))
    write(folder / "metrics.csv", _classes_csv(report))
    write_tables(folder, report.tables)
    lines = (json.dumps(error._asdict(), ensure_ascii=False) for error in errors)
    write(folder / "errors.jsonl", "".join(f"{line}\n" for line in lines))


def _classes_csv(report: Report) -> str:
    columns = list(dict.fromkeys(c for values in report.per_class.values() for c in values))
    classes = (
        [name, *(values.get(column, "") for column in columns)]
        for name, values in report.per_class.items()
    )
    return csv_text(["class", *columns], [*classes, *report.metrics.items()])
