"""Measure functions side by side, and report what came out: shared by the scripts of this folder."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """All samples of one contestant, in the order they were taken; seconds, or ratios of them."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper one."""
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return lower, upper

    def per(self, count: int) -> Timing:
        """The same for one of `count` things done at once."""
        return Timing(tuple(sample / count for sample in self.samples))

    def over(self, other: Timing) -> Timing:
        """Ratios to another's, repetition by repetition: what both felt alike cancels out."""
        pairs = zip(self.samples, other.samples, strict=True)
        return Timing(tuple(own / its for own, its in pairs))


def side_by_side(
    contestants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    synchronize: bool = False,
) -> dict[str, Timing]:
    """Time functions in turns, so that whatever slows the machine down for a while hits all alike.

    In each repetition every contestant runs once; who begins changes from one to the next.

    Args:
        contestants: functions by name. What they return is dropped after the clock has stopped.
        repeats: timed repetitions.
        warmup: repetitions before those, not timed.
        synchronize: wait for the GPU before either reading of the clock.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(warmup + repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            run = contestants[name]
            if synchronize:
                torch.cuda.synchronize()
            began = time.perf_counter()
            result = run()
            if synchronize:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            del result
            if repetition >= warmup:
                samples[name].append(seconds)
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as aligned text: the keys on top, numbers to the right."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [isinstance(value, int | float) for value in rows[0].values()]
    lines = (
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def conclude(
    args: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    settings: Sequence[str],
    results: Mapping[str, Any],
    **more: Any,
) -> int:
    """Print a table, write it where ``--output`` says, and say whether a goal was missed.

    Args:
        args: of the command line; its ``output`` is a file, or None.
        rows: of the table; where they have goals, ``met`` says whether each is, or None.
        settings: names of the arguments that it was measured with.
        results: what is written beside the table, such as all samples.
        more: settings that are no arguments.

    Returns:
        The exit code: 1 if a goal was missed.
    """
    if rows:
        print(format_table(rows))
    if args.output:
        given = {name: getattr(args, name) for name in settings}
        write_json(args.output, {"table": rows, **results}, **more, **given)
    return int(any(row.get("met") is False for row in rows))


def write_json(path: Path, results: Any, **settings: Any) -> None:
    """Write results with the date, the environment, and the settings they were measured with."""
    content = {
        "date": date.today().isoformat(),
        "environment": environment(),
        "settings": settings,
        "results": results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def environment() -> dict[str, Any]:
    """The kind of machine and its software; nothing that says whose it is."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
