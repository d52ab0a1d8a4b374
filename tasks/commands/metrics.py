"""``lightning metrics RUN``: a run's metrics again, from the states of its finished shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run ``lightning metrics``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="lightning metrics",
        description="Recompute metrics.json, metrics.csv and errors.jsonl of a run from its finished "
        "shards. Works while the run is still going.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    folder = parser.parse_args(argv).run
    from tasks._output import RunError
    from tasks._progress import print_report
    from tasks.summary import read_run, summarise

    try:
        task, info = read_run(folder)
        summarise(folder, task, info)
    except RunError as error:
        print(f"lightning metrics: {error}", file=sys.stderr)
        return 1
    print_report(folder)
    return 0
