"""``lightning report RUN [RUN ...]``: a page to look at runs with, or a contact sheet of them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from tasks.commands._parser import Parser

if TYPE_CHECKING:
    from tasks.run import Run


def arguments() -> Parser:
    """Of ``lightning report``."""
    parser = Parser(
        prog="lightning report",
        description="Write report.html into the first run's folder: what was run, its metrics, and every "
        "image with its maps, masks and scores, the worst first. Several runs of the same images stand "
        "side by side. One file that works offline; large runs get a folder beside it.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of the runs")
    parser.add_argument(
        "--shards",
        metavar="PLACE",
        help="where the runs' images are now, if they moved or are on another machine: as --data.shards, "
        "or --data.path of own pictures",
    )
    parser.add_argument("--images", type=int, metavar="N", help="only the first N images")
    parser.add_argument(
        "--size", type=int, default=256, metavar="PIXELS", help="longer side of the pictures (256)"
    )
    parser.add_argument("--output", type=Path, help="another place for the page, or the sheet")
    sheet = parser.add_argument_group("contact sheet, as Figures 3, 8 and 9 of the paper")
    sheet.add_argument(
        "--sheet",
        action="store_true",
        help="write sheet.png in place of the page: a row an image, a column a method; with --output, "
        "any ending that matplotlib writes, such as .pdf",
    )
    sheet.add_argument("--rows", type=int, default=8, help="rows of the sheet (8)")
    sheet.add_argument(
        "--keys", nargs="+", metavar="KEY", help="these images, in this order; else spread evenly"
    )
    sheet.add_argument("--alpha", type=float, default=0.6, help="share of the heat's colours (0.6)")
    sheet.add_argument(
        "--colour-map", default="jet", help="jet, as in the paper, or another of matplotlib's"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run ``lightning report``; returns the exit code."""
    parser = arguments()
    options = parser.parse_args(argv)
    for name in ("images", "size", "rows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if not 0 <= options.alpha <= 1:
        parser.error(f"--alpha is a share in [0, 1], got {options.alpha}")
    from tasks.run import Run

    try:
        runs = [Run.load(folder) for folder in options.runs]
        path = _sheet(runs, options) if options.sheet else _page(runs, options)
    except UserError as error:
        print(f"lightning report: {error}", file=sys.stderr)
        return 1
    print(f"written to {path.resolve()}")
    return 0


def _page(runs: list[Run], options: argparse.Namespace) -> Path:
    from tqdm import tqdm

    from tasks.report import write_report

    with tqdm(desc="report", unit=" images", disable=not sys.stderr.isatty(), leave=False) as bar:
        return write_report(
            runs,
            options.output,
            shards=options.shards,
            images=options.images,
            side=options.size,
            progress=lambda done: bar.update(done - bar.n),
        )


def _sheet(runs: list[Run], options: argparse.Namespace) -> Path:
    from tasks._draw import Look
    from tasks.report.sheet import write_sheet

    return write_sheet(
        runs,
        options.output,
        shards=options.shards,
        rows=options.rows,
        keys=options.keys,
        look=Look(options.alpha, options.colour_map),
    )
