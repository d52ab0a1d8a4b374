"""``lightning completion SHELL``: a script with which a shell completes commands, fields and values."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

from datamodules import DATASETS
from tasks import TASKS
from tasks.commands._parser import Parser

SHELLS = ("bash", "zsh", "tcsh")
_FOLDERS = frozenset({"output", "source", "folder", "data-root", "writer.output", "data.shards"})
_FILES = frozenset({"run", "runs", "data.path", "model.text_features"})


def arguments() -> Parser:
    """Of ``lightning completion``."""
    parser = Parser(
        prog="lightning completion",
        description="Print a script for a shell. For bash: lightning completion bash > "
        "~/.local/share/bash-completion/completions/lightning. For zsh: into a file _lightning in a "
        "folder of $fpath. Write it anew after an update.",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell")
    return parser


def main(argv: list[str]) -> int:
    """Run ``lightning completion``; returns the exit code."""
    shell = arguments().parse_args(argv).shell
    try:
        import shtab
    except ImportError:
        print(
            "lightning completion: needs shtab: pip install 'clip-surgery-lightning[completion]'",
            file=sys.stderr,
        )
        return 1
    parser = everything()
    for action in _all_actions(parser):
        if action.dest in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # shtab's way
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))
    return 0


def everything() -> argparse.ArgumentParser:
    """All commands with their arguments, as one parser that only describes them."""
    from tasks.__main__ import COMMANDS

    parser = argparse.ArgumentParser(prog="lightning")
    parser.add_argument("--version", action="store_true", help="print versions and exit")
    commands = parser.add_subparsers(dest="command")
    for name, text in COMMANDS.items():
        if name == "predict":
            _add_fields(commands.add_parser(name, help=text, add_help=False))
        elif name == "shards":
            _add_data_sets(commands.add_parser(name, help=text))
        else:
            own = import_module(f"tasks.commands.{name}").arguments()
            commands.add_parser(name, help=text, parents=[own], add_help=False)
    return parser


def _add_data_sets(parser: argparse.ArgumentParser) -> None:
    from tasks.commands.shards import CONVERTED, dataset_parser, verify_parser

    of = parser.add_subparsers(dest="dataset")
    for name in CONVERTED:
        described = of.add_parser(name, help=f"make shards of {DATASETS[name]}")
        for action in dataset_parser(name)._actions:
            _describe(described, action)
    of.add_parser("verify", help="check shards", parents=[verify_parser()], add_help=False)


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """All fields of all tasks and data sets, of the writer and the Trainer."""
    import open_clip
    from lightning.pytorch import Trainer
    from lightning.pytorch.cli import LightningArgumentParser

    import datamodules
    import tasks
    from surgery import METHODS, RECIPES
    from tasks._configs import all_names
    from tasks._help import SECTIONS
    from tasks.run.callback import ResultWriter

    known: dict[str, list[str]] = {
        "model.backbone.attention": list(RECIPES),
        "model.methods": list(METHODS),
        "model.backbone.model": ["demo", *open_clip.list_models()],
        "model.backbone.pretrained": sorted({tag for _, tag in open_clip.list_pretrained()}),
    }
    topics = [*SECTIONS, "all", *TASKS.values(), *DATASETS.values()]
    for option, values in (
        ("--config", list(all_names())),
        ("--model", sorted(TASKS.values())),
        ("--data", sorted(DATASETS.values())),
        ("--help", topics),
    ):
        parser.add_argument(option, choices=values)
    parser.add_argument("--print_config", action="store_true")
    classes = [(getattr(tasks, name), "model") for name in TASKS.values()]
    classes += [(getattr(datamodules, name), "data") for name in DATASETS.values()]
    for cls, section in (*classes, (ResultWriter, "writer"), (Trainer, "trainer")):
        described = LightningArgumentParser()
        described.add_lightning_class_args(cls, section)
        for action in described._actions:
            if action.dest.startswith(f"{section}."):
                _describe(parser, action, known.get(action.dest))


def _describe(
    parser: argparse.ArgumentParser, action: argparse.Action, values: list[str] | None = None
) -> None:
    """Add what an option of jsonargparse's takes, if it isn't there."""
    option = next((o for o in action.option_strings if not o.endswith("+")), "")
    there = {option for other in parser._actions for option in other.option_strings}
    if not option.startswith("--") or option in there or option.endswith(".help"):
        return
    choices = values or [str(choice) for choice in action.choices or _choices(action)]
    added = parser.add_argument(option, choices=choices or None)
    added.dest = action.dest
    added.help = str(action.help or "").partition(". ")[0].replace("%", "%%")


def _choices(action: argparse.Action) -> list[str]:
    """The values of a field that has only some."""
    found = list(dict.fromkeys(_values(getattr(action, "_typehint", None))))
    return [] if "" in found else found


def _values(hint: Any) -> Iterator[str]:
    """Values of a type; an empty one where it has any number of them."""
    if get_origin(hint) is Literal:
        yield from map(str, get_args(hint))
    elif hint is bool:
        yield from ("true", "false")
    elif hint is type(None):
        yield "null"
    elif get_args(hint) and get_origin(hint) not in (list, tuple, dict):
        for part in get_args(hint):
            yield from _values(part)
    else:
        yield ""


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _all_actions(below)
        else:
            yield action
