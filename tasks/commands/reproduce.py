"""``lightning reproduce NAME``: a table or figure of the paper, ours beside theirs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from common import signals
from common.errors import UserError
from common.nearest import did_you_mean
from tasks.commands._parser import Parser

if TYPE_CHECKING:
    from tasks.reproduce.report import Reproduction

EPILOG = """NAME may also be a card that a reproduction wrote (NAME.card.json): it is checked, and printed
as a table.

DIR of --data-root has a folder of shards for each data set, as `lightning shards` makes them: voc,
pascal_context, coco, imagenet_s, coco_stuff, cityscapes, nus_wide, and for `family` coco_object and
ade20k. For TaI-DPT (Table 6) the features of its learned prompts lie there as global.safetensors and
local.safetensors, for SAM (Figure 10) give --model.sam. --dry-run says what is missing, and the command
that makes it.

Every run is in OUTPUT/runs and goes on where it was stopped: the same command again. Any field of
`lightning predict` may follow as --SECTION.FIELD=VALUE and holds for every run, for example
--trainer.accelerator=cpu --data.batch_size=64. Several GPUs: torchrun --nproc-per-node 8
$(which lightning) reproduce ..., or srun."""


def arguments() -> Parser:
    """Of ``lightning reproduce``."""
    from tasks.reproduce import PLANS

    parser = Parser(
        prog="lightning reproduce",
        description="A table or figure of the paper, or `family`, the field of training-free "
        "segmentation on eight data sets, with our numbers beside those printed. What has no "
        "shards is named, with the command that makes them, and the rest is run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(PLANS)}, or all of the paper's")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where NAME.md, NAME.csv and the runs go"
    )
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        default=Path("shards"),
        help="folder with each data set's shards in a folder of its name (default: %(default)s)",
    )
    for option, what in (
        ("backbones", "such as vit_b16"),
        ("datasets", "such as voc"),
        ("methods", 'rows, such as "Ours"'),
    ):
        parser.add_argument(f"--{option}", nargs="+", metavar="NAME", help=f"only these: {what}")
    parser.add_argument(
        "--demo",
        action="store_true",
        help="the same rows on the demo world, offline; their ordering is compared with the paper's",
    )
    parser.add_argument("--scenes", type=int, help="of the demo world (default: 48)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and do none")
    return parser


def main(argv: list[str]) -> int:
    """Run ``lightning reproduce``; returns the exit code."""
    from tasks.reproduce import PAPER, PLANS
    from tasks.reproduce.report import Reproduction

    parser = arguments()
    options, words = parser.parse_known_args(argv)
    if options.name.endswith(".json"):
        return _read(Path(options.name))
    if options.name not in ("all", *PLANS):
        hint = did_you_mean(options.name, PLANS)
        parser.error(f"no {options.name!r} among {', '.join(PLANS)}, all, and cards (*.json){hint}")
    if options.output is None:
        parser.error("--output: a folder is needed")
    for word in words:
        if not word.startswith("--") or "." not in word.partition("=")[0] or "=" not in word:
            parser.error(f"{word!r} is neither an option nor --SECTION.FIELD=VALUE")
    if options.scenes is not None and not (options.demo and options.scenes > 0):
        parser.error("--scenes is the demo's, and at least 1")
    plans = PAPER if options.name == "all" else (PLANS[options.name],)
    wanted = [Reproduction.of(plan, options.demo) for plan in plans]
    for option, attribute in (("backbones", "backbone"), ("datasets", "data"), ("methods", "row")):
        if chosen := getattr(options, option):
            there = {getattr(cell, attribute) for found in wanted for cell in found.cells}
            if odd := [value for value in chosen if value not in there]:
                known = ", ".join(sorted(filter(None, there)))
                parser.error(f"--{option}: {options.name} has no {odd[0]!r}, but {known}")
            for found in wanted:
                found.cells = [cell for cell in found.cells if getattr(cell, attribute) in chosen]
    wanted = [found for found in wanted if found.cells]
    return _list(wanted, options) if options.dry_run else _run(parser, wanted, options, words)


def _list(wanted: list[Reproduction], options: argparse.Namespace) -> int:
    """Print what would be run."""
    from tasks.reproduce.plan import jobs
    from tasks.reproduce.runs import missing

    for job in jobs([cell for found in wanted for cell in found.cells], options.demo):
        why = missing(job, options.data_root, options.demo)
        print(f"{job.name}{f'  ({why})' if why else ''}")
    return 0


def _read(path: Path) -> int:
    """Print the table of a card."""
    from tasks.reproduce import PLANS
    from tasks.reproduce.card import read_card
    from tasks.reproduce.report import Reproduction

    try:
        plan, demo, ours = read_card(path, PLANS)
    except UserError as error:
        print(f"lightning reproduce: {error}", file=sys.stderr)
        return 1
    found = Reproduction.of(plan, demo)
    found.ours = ours | plan.derive(found.cells, ours)
    found.print()
    return 0


def _run(
    parser: argparse.ArgumentParser,
    wanted: list[Reproduction],
    options: argparse.Namespace,
    words: list[str],
) -> int:
    """Do the runs; print and write the tables."""
    from tasks.commands.predict import explain, prepare
    from tasks.reproduce.plan import as_field
    from tasks.reproduce.runs import processes, run_all
    from tasks.run.processes import leave_at_once, leave_group

    try:
        fields = dict(map(as_field, words))
    except UserError as error:
        parser.error(str(error))
    if "writer.output" in fields:
        parser.error("--writer.output: the runs are below --output")
    launched = processes()
    if launched["trainer.devices"] == 1 and str(fields.get("trainer.devices", 1)) != "1":
        parser.error(
            "--trainer.devices: one process does one run after the other; start several with torchrun "
            "--nproc-per-node N, or srun"
        )
    for found in wanted:
        found.words = tuple(word for word in words if not word.startswith("--trainer."))
    prepare()
    try:
        good = run_all(
            wanted,
            options.output,
            data_root=options.data_root,
            scenes=options.scenes,
            fields={**launched, **fields},
            tell=lambda text: print(text, flush=True),
        )
    except signals.Stopped as stop:
        if signals.speaks():
            kept = "finished shards are kept, run again to go on"
            print(f"lightning reproduce: {stop}; {kept}", file=sys.stderr)
        leave_at_once(stop.code)
        return stop.code
    except Exception as error:
        print(f"lightning reproduce: {explain(error) or repr(error)}", file=sys.stderr)
        leave_at_once(1)
        raise
    leave_group()
    if signals.speaks():
        for found in wanted:
            found.write(options.output)
            found.print()
        print(f"\nwritten to {options.output.resolve()}")
    return 0 if good else 1
