"""The command line: ``lightning COMMAND ...``. Each command is imported only when it is called."""

from __future__ import annotations

import os
import sys

_HOME = os.path.dirname(os.path.dirname(__file__))
if __name__ == "__main__" and sys.path[0] != _HOME and not getattr(sys.flags, "safe_path", False):
    # `python -m` puts the current folder first on the path, where any json.py or torch.py would be
    # imported in place of the real one. The script of the same name doesn't.
    del sys.path[0]

import signal  # noqa: E402
from importlib import import_module  # noqa: E402
from importlib.metadata import entry_points, version  # noqa: E402

from common import signals  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.source import source_digest  # noqa: E402
from tasks.commands._parser import Parser  # noqa: E402

COMMANDS = {
    "predict": "run a task over shards: masks, scores and metrics",
    "shards": "turn a data set's official layout into shards",
    "metrics": "recompute a run's metrics from its finished shards",
    "compare": "runs side by side: metrics, classes, settings, images",
    "report": "look at runs: a page with maps, masks and scores, or a contact sheet",
    "app": "a page on this machine: drop a picture, type words, see maps",
    "reproduce": "a table or figure of the paper, our numbers beside the printed ones",
    "list": "list models, data sets, tasks, configs, recipes or methods",
    "completion": "a script that lets a shell complete these commands",
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``lightning`` script and of ``python -m tasks``; returns the exit code.

    Only without ``argv`` are the process's signals heeded; a program that calls this keeps its own.
    """
    own_process = argv is None
    if own_process:
        signals.attend_first()
    argv = sys.argv[1:] if argv is None else argv
    try:
        with signals.listening(f"lightning {' '.join(argv[:1])}".rstrip(), install=own_process):
            code = run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read this has seen enough (`lightning list configs | head`). Python would complain
        # again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def run(argv: list[str]) -> int:
    """Run the command that ``argv`` names; returns the exit code."""
    # Before torch loads OpenMP: its threads would spin for milliseconds after every parallel part,
    # on cores that loader workers, or other processes of a shared machine, have a use for.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    parser = Parser(
        prog="lightning",
        description="CLIP Surgery at scale: explain CLIP, segment and recognise without training.",
        epilog="lightning COMMAND --help tells more. First run: lightning predict --config demo.yaml",
    )
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    known, _ = parser.parse_known_args(argv[:1])
    if known.version:
        print_versions()
        return 0
    if known.command is None:
        parser.print_help()
        return 0 if not argv else 2
    if known.command == "predict" and argv[1:] in (["-h"], ["--help"]):
        from tasks._help import overview  # without waiting for torch

        print(overview(), end="")
        parser.exit()
    module = import_module(f"tasks.commands.{known.command}")
    try:
        code: int = module.main(argv[1:])
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:  # a file or a folder that can't be read or written
        if os.environ.get("CLIP_SURGERY_TRACEBACK"):
            raise
        print(f"lightning {known.command}: {error}", file=sys.stderr)
        return 1
    return code


def print_versions() -> None:
    """Print our version and those of what results depend on; warn of a shadowed script."""
    print(f"clip-surgery-lightning {version('clip-surgery-lightning')} (source {source_digest()})")
    for name in ("torch", "lightning", "open_clip_torch"):
        print(f"  {name} {version(name)}")
    rivals = {
        entry.dist.name
        for entry in entry_points(group="console_scripts", name="lightning")
        if entry.dist and entry.dist.name != "clip-surgery-lightning"
    }
    if rivals:
        print(
            f"warning: {', '.join(sorted(rivals))} also installs a script named `lightning`; "
            "`python -m tasks` is always ours",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
