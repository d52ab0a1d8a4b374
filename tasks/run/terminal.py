"""What a person sees of a run at its end."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import Any

from tasks.run.folder import Run
from tasks.run.meaning import Meaning, meaning_of, remarks
from tasks.run.place import in_store
from tasks.run.tally import Tally

_REASONS = 5
_SHARE = Meaning("")
"""What a metric of somebody's own task is taken for."""


def print_report(run: Run, tally: Tally | None = None) -> None:
    """Print a run's metrics, a column a method, what they mean, and the run's place.

    Args:
        run: with its summary written.
        tally: what its job did, to say how much bad data was allowed.
    """
    summary = run.summary
    task = str(run.settings["task"]["class"])
    _print_metrics(task, summary)
    _print_threshold(summary)
    for remark in remarks(task, summary):
        print(f"  note: {remark}")
    if protocol := run.described.get("protocol"):
        print(f"  {in_words(protocol)}")
    shards = summary["shards"]
    print(f"\n{summary['images']} images, {summary['errors']} errors", end="")
    print(f" ({run.folder / 'errors.jsonl'})" if summary["errors"] else "", end="")
    print("" if shards["done"] == shards["of"] else f", {shards['done']} of {shards['of']} shards")
    _print_errors(run)
    if tally and (allowed := tally.tolerated()):
        print(f"  {allowed}")
    print(f"results in {run.folder if in_store(run.folder) else run.folder.resolve()}")
    headline = next(iter(summary.get("methods", {})), "")
    # With --writer.layout files, which a store has not.
    pictures = [] if in_store(run.folder) else sorted(run.folder.glob("*/*.jpg"))
    picture = next((p for p in pictures if not headline or f".{headline}." in p.name), None)
    if picture is not None:
        print(f"pictures: {picture.resolve()} and others beside it")


def _print_metrics(task: str, summary: dict[str, Any]) -> None:
    """A line a metric, a column a method; below, what the names mean."""
    metrics, methods = summary["metrics"], summary.get("methods", {})
    if not metrics:
        return
    meanings = {name: meaning_of(task, name) for name in metrics}
    rows = [
        [
            (meanings[name] or _SHARE).show(v)
            for v in [of[name] for of in methods.values()] or [value]
        ]
        for name, value in metrics.items()
    ]
    left = max(16, *(len(name) + 1 for name in metrics))
    width = max(10, *(len(cell) + 2 for row in rows for cell in (*row, *methods)))
    heads = "".join(f"{name:>{width}}" for name in methods) if len(methods) > 1 else ""
    print(f"\n{'':{left + 2}}{heads}".rstrip())
    for name, row in zip(metrics, rows, strict=True):
        print(f"  {name:<{left}}{''.join(f'{cell:>{width}}' for cell in row)}".rstrip())
    print()
    for name, meaning in meanings.items():
        if meaning:
            room = max(40, min(shutil.get_terminal_size().columns, 120) - left - 2)
            first, *more = textwrap.wrap(meaning.text, room)
            print(
                f"  {name:<{left}}{first}", *(f"{'':{left + 2}}{line}" for line in more), sep="\n"
            )


def in_words(protocol: Mapping[str, Any]) -> str:
    """Which protocol a run follows, and where it doesn't."""
    others = ", ".join(
        f"{name} {of['run']} in place of {of['protocol']}"
        for name, of in protocol["departs"].items()
    )
    follows = f"protocol {protocol['name']} on {protocol['dataset']}"
    return f"{follows}, but {others}" if others else follows


def _print_threshold(summary: dict[str, Any]) -> None:
    """Where the headline is at another threshold than the masks on the disk: what is at theirs."""
    details = summary.get("details", {})
    best, fixed = details.get("threshold"), details.get("mIoU_at_fixed_threshold")
    if best is not None and fixed is not None and fixed != summary["metrics"].get("mIoU"):
        print(
            f"  mIoU is at the best threshold, {best:.2f}; at that of the masks written it is",
            end="",
        )
        print(f" {100 * fixed:.2f} % (--model.threshold {best:.4g} writes the best ones)")


def _print_errors(run: Run) -> None:
    """The first few reasons, each once, with the first sample that it was said of."""
    errors = run.errors
    times = Counter(error.reason for error in errors)
    first = {error.reason: error for error in reversed(errors)}
    reasons = list(dict.fromkeys(error.reason for error in errors))
    for reason in reasons[:_REASONS]:
        error = first[reason]
        where = f"{error.shard}/{error.key}" if error.key else f"shard {error.shard}"
        more = f" (and {times[reason] - 1} more)" if times[reason] > 1 else ""
        print(f"  {where}{more}: {reason}")
    if len(reasons) > _REASONS:
        print(f"  and {len(reasons) - _REASONS} other reasons")
