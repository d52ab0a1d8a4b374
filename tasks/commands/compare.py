"""``lightning compare RUN RUN ...``: runs side by side."""

from __future__ import annotations

import sys
from pathlib import Path

from common.errors import UserError
from tasks.commands._parser import Parser


def arguments() -> Parser:
    """Of ``lightning compare``."""
    parser = Parser(
        prog="lightning compare",
        description="Metrics of runs side by side, with their differences to the first one; classes by "
        "their difference; the settings that differ; and the images that the runs disagree on most.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of two or more runs")
    parser.add_argument(
        "--output", type=Path, help="also write compare.md, and a csv a table, here"
    )
    parser.add_argument(
        "--images", type=int, default=10, help="how many images are listed; 0 reads no results"
    )
    parser.add_argument(
        "--classes", type=int, default=10, help="how many lines of classes are printed"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run ``lightning compare``; returns the exit code."""
    parser = arguments()
    options = parser.parse_args(argv)
    if len(options.runs) < 2:
        parser.error("give two runs or more")
    from tasks.run import Run
    from tasks.run.compare import compare

    try:
        found = compare([Run.load(folder) for folder in options.runs], options.images)
        if options.output:
            found.write(options.output)
    except UserError as error:
        print(f"lightning compare: {error}", file=sys.stderr)
        return 1
    for line in found.legend():
        print(line)
    for name, side in found.sides.items():
        if not side.rows:
            print(f"\n{side.title}: none")
            continue
        lines = side.text().splitlines()
        more = 0 if name != "classes" else max(len(lines) - 1 - options.classes, 0)
        print(f"\n{side.title}", *lines[: len(lines) - more], sep="\n")
        if more:
            print(f"and {more} more (--classes, or --output for all)")
    if options.output:
        print(f"\nwritten to {options.output.resolve()}")
    return 0
