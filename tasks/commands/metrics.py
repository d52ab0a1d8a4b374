"""``lightning metrics RUN``: a run's metrics again, from the states of its finished shards."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, cast

from common.errors import UserError
from tasks.commands._parser import Parser

if TYPE_CHECKING:
    from tasks import Task
    from tasks.measures import Measures
    from tasks.run import Run


def arguments() -> Parser:
    """Of ``lightning metrics``."""
    parser = Parser(
        prog="lightning metrics",
        description="Recompute metrics.json, metrics.csv and errors.jsonl of a run from its finished "
        "shards. Works while the run is still going.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run, or s3://...")
    parser.add_argument(
        "-c",
        "--config",
        help="the config of the run, where its task is your own and has measures of its own: they are "
        "code, and only a config may say which is run",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run ``lightning metrics``; returns the exit code."""
    args = arguments().parse_args(argv)
    from tasks.run import Run
    from tasks.run.terminal import print_report

    try:
        run = Run.load(args.run)
        run.summarise(_measures_of_config(args.config, run) if args.config else None)
    except UserError as error:
        print(f"lightning metrics: {error}", file=sys.stderr)
        return 1
    print_report(run)
    return 0


def _measures_of_config(config: str, run: Run) -> Measures:
    """Empty measures of the task that a config names, with the settings of a run of it."""
    from tasks._configs import InvalidConfig, import_class, read_layers

    task = run.settings["task"]
    named = [layer for layer in read_layers(config) if "model" in layer.classes]
    cls = import_class("model", named[-1].classes["model"], named[-1].folder) if named else None
    if cls is None or cls.__name__ != task.get("class"):
        raise InvalidConfig(
            f"{config} names {cls.__name__ if cls else 'no task'}, and {run.folder} is a run of "
            f"{task.get('class')}"
        )
    try:
        return cast("type[Task]", cls).measured_by.of(run.info, task)
    except KeyError as error:
        raise InvalidConfig(f"{run.folder} was made without the setting {error}") from None
