"""``lightning metrics RUN``: a run's metrics again, from the states of its finished shards."""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import UserError
from tasks.commands._parser import Parser


def arguments() -> Parser:
    """Of ``lightning metrics``."""
    parser = Parser(
        prog="lightning metrics",
        description="Recompute metrics.json, metrics.csv and errors.jsonl of a run from its finished "
        "shards. Works while the run is still going.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    return parser


def main(argv: list[str]) -> int:
    """Run ``lightning metrics``; returns the exit code."""
    folder = arguments().parse_args(argv).run
    from tasks.run import Run
    from tasks.run.terminal import print_report

    try:
        run = Run.load(folder)
        run.summarise()
    except UserError as error:
        print(f"lightning metrics: {error}", file=sys.stderr)
        return 1
    print_report(run)
    return 0
