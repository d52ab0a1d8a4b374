"""``lightning reproduce NAME``: a table or figure of the paper, ours beside theirs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import signals
from common.errors import UserError

EPILOG = """Every run is in OUTPUT/runs and goes on where it was stopped: the same command again.
Any field of `lightning predict` may follow as --SECTION.FIELD=VALUE and holds for every run,
for example --trainer.accelerator=cpu --data.batch_size=64."""


def main(argv: list[str]) -> int:
    """Run ``lightning reproduce``; returns the exit code."""
    from tasks.reproduce import PLANS
    from tasks.reproduce.plan import as_field, jobs
    from tasks.reproduce.report import Reproduction
    from tasks.reproduce.runs import missing, run_all

    parser = argparse.ArgumentParser(
        prog="lightning reproduce",
        description="A table or figure of the paper, with our numbers beside those printed. What has no "
        "shards is named, with the command that makes them, and the rest is run.",
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=list(PLANS), metavar="NAME", help="%(choices)s")
    parser.add_argument("--output", type=Path, required=True, help="folder of NAME.md and NAME.csv")
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path("shards"),
        help="folder with each data set's shards in a folder of its name, such as voc (default: "
        "%(default)s)",
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
    options, words = parser.parse_known_args(argv)
    for word in words:
        if not word.startswith("--") or "." not in word.partition("=")[0] or "=" not in word:
            parser.error(f"{word!r} is neither an option nor --SECTION.FIELD=VALUE")
    if options.scenes is not None and not (options.demo and options.scenes > 0):
        parser.error("--scenes is the demo's, and at least 1")
    plan = PLANS[options.name]
    wanted = plan.demo_cells() if options.demo else plan.cells()
    for option, attribute in (("backbones", "backbone"), ("datasets", "data"), ("methods", "row")):
        if chosen := getattr(options, option):
            there = {getattr(cell, attribute) for cell in wanted}
            if odd := [value for value in chosen if value not in there]:
                known = ", ".join(sorted(filter(None, there)))
                parser.error(f"--{option}: {options.name} has no {odd[0]!r}, but {known}")
            wanted = [cell for cell in wanted if getattr(cell, attribute) in chosen]
    if options.dry_run:
        for job in jobs(wanted, options.demo):
            why = missing(job, options.data_root, options.demo)
            print(f"{job.name}{f'  ({why})' if why else ''}")
        return 0
    try:
        fields = dict(map(as_field, words))
    except UserError as error:
        parser.error(str(error))
    from tasks.commands.predict import prepare
    from tasks.run.processes import leave_at_once, leave_group

    prepare()
    found = Reproduction(plan, wanted, options.demo)
    try:
        good = run_all(
            found,
            options.output,
            data_root=options.data_root,
            scenes=options.scenes,
            fields=fields,
            tell=lambda text: print(text, flush=True),
        )
    except signals.Stopped as stop:
        if signals.speaks():
            kept = "finished shards are kept, run again to go on"
            print(f"lightning reproduce: {stop}; {kept}", file=sys.stderr)
        leave_at_once(stop.code)
        return stop.code
    leave_group()
    if signals.speaks():
        found.write(options.output)
        print(f"\n{found.table().text()}\n", *found.notes(), sep="\n")
        print(f"\nwritten to {options.output.resolve()}")
    return 0 if good else 1
