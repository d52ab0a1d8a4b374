"""What a person sees of a run at its end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from tasks.run.folder import Run
from tasks.run.tolerance import Tally

_REASONS = 5


def print_report(run: Run, tally: Tally | None = None) -> None:
    """Print a run's metrics in percent, beside plain CLIP's where it was measured, and its place.

    Args:
        run: with its summary written.
        tally: what its job did, to say how much bad data was allowed.
    """
    summary = run.summary
    baseline = summary.get("baseline", {})
    if summary["metrics"]:
        print("\n" + " " * 20 + ("  CLIP   Surgery" if baseline else ""))
    for name, value in summary["metrics"].items():
        columns = [baseline[name]] if name in baseline else []
        cells = ("   --  " if v is None else f"{100 * v:6.2f} %" for v in (*columns, value))
        print(f"  {name:<16} {'  '.join(cells)}")
    _print_threshold(summary)
    shards = summary["shards"]
    print(f"\n{summary['images']} images, {summary['errors']} errors", end="")
    print(f" ({run.folder / 'errors.jsonl'})" if summary["errors"] else "", end="")
    print("" if shards["done"] == shards["of"] else f", {shards['done']} of {shards['of']} shards")
    _print_errors(run)
    if tally and (allowed := tally.tolerated()):
        print(f"  {allowed}")
    print(f"results in {run.folder.resolve()}")
    picture = min(run.folder.glob("*/*.jpg"), key=_of_plain_clip, default=None)
    if picture is not None:
        print(f"pictures: {picture.resolve()} and others beside it")


def _of_plain_clip(picture: Path) -> tuple[bool, str]:
    """Sorts pictures (with --writer.layout files): first those that the headline is of."""
    return any(f".{kind}." in picture.name for kind in ("raw", "clip")), str(picture)


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
