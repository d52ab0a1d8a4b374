"""What a person sees of a run at its end."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tasks.run.folder import Run
from tasks.run.tally import Tally

_REASONS = 5


def print_report(run: Run, tally: Tally | None = None) -> None:
    """Print a run's metrics in percent, a column a method, and its place.

    Args:
        run: with its summary written.
        tally: what its job did, to say how much bad data was allowed.
    """
    summary = run.summary
    methods = summary.get("methods", {})
    left = max(16, *(len(name) + 1 for name in summary["metrics"])) if summary["metrics"] else 16
    width = max(10, *(len(name) + 2 for name in methods)) if methods else 10
    if summary["metrics"]:
        heads = (f"{name:>{width}}" for name in methods)
        print(f"\n{'':{left + 2}}{''.join(heads)}" if len(methods) > 1 else "")
    for name, value in summary["metrics"].items():
        columns = [of[name] for of in methods.values()] or [value]
        cells = (f"{'--' if v is None else f'{100 * v:.2f} %':>{width}}" for v in columns)
        print(f"  {name:<{left}}{''.join(cells)}")
    _print_threshold(summary)
    shards = summary["shards"]
    print(f"\n{summary['images']} images, {summary['errors']} errors", end="")
    print(f" ({run.folder / 'errors.jsonl'})" if summary["errors"] else "", end="")
    print("" if shards["done"] == shards["of"] else f", {shards['done']} of {shards['of']} shards")
    _print_errors(run)
    if tally and (allowed := tally.tolerated()):
        print(f"  {allowed}")
    print(f"results in {run.folder.resolve()}")
    headline = next(iter(methods), "")
    pictures = sorted(run.folder.glob("*/*.jpg"))  # with --writer.layout files
    picture = next((p for p in pictures if not headline or f".{headline}." in p.name), None)
    if picture is not None:
        print(f"pictures: {picture.resolve()} and others beside it")


def _print_threshold(summary: dict[str, Any]) -> None:
    """Where the headline is at another threshold than the masks on the disk: what is at theirs."""
    details = summary.get("details", {})
    best, fixed = details.get("threshold"), details.get("mIoU_at_fixed_threshold")
    if best is not None and fixed is not None and fixed != summary["metrics"].get("mIoU"):
        print(f"  mIoU is at the best threshold, {best:.2f}; at that of the masks it is", end="")
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
