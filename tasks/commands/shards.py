"""``lightning shards``: a data set's official layout becomes shards; ``verify`` checks them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datamodules
from common.errors import UserError
from datamodules import DATASETS, READ_AS_THEY_ARE
from tasks.commands._parser import Parser, Suggesting

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from datamodules._convert import Source

CONVERTED = sorted(DATASETS.keys() - READ_AS_THEY_ARE)
SHOWN = 20


def arguments() -> Parser:
    """Of ``lightning shards``, before the data set is known."""
    overview = Parser(
        prog="lightning shards",
        description="Turn a data set's official layout into webdataset shards. A killed conversion "
        "is resumed by running it again. `lightning shards verify DIR` checks what was made.",
        epilog="lightning shards DATASET --help shows the layout that is expected. GCC3M (as "
        "img2dataset writes it) and Images (own files) are read as they are.",
    )
    overview.add_argument(
        "dataset",
        choices=[*CONVERTED, "verify"],
        metavar="DATASET",
        help=", ".join((*CONVERTED, "verify")),
    )
    return overview


def main(argv: list[str]) -> int:
    """Run ``lightning shards``; returns the exit code."""
    name = arguments().parse_args(argv[:1]).dataset
    return check(argv[1:]) if name == "verify" else convert(name, argv[1:])


def convert(name: str, argv: list[str]) -> int:
    """Run ``lightning shards NAME``; returns the exit code."""
    from datamodules._convert import write_shards
    from datamodules._download import download

    datamodule = getattr(datamodules, DATASETS[name])
    args = dataset_parser(name).parse_args(argv).as_dict()
    output, shard_size, workers = (
        Path(args.pop("output")),
        args.pop("shard_size"),
        args.pop("workers"),
    )
    try:
        if args.pop("download", False):
            download(datamodule.archives, Path(args["source"]), args.get("split", ""))
        source: Source = datamodule.source(**args)
        for what, value in source.extra.items():
            if isinstance(value, str):
                print(f"{what}: {value}", file=sys.stderr)
        described = write_shards(source, output, shard_size=shard_size, workers=workers)
    except (UserError, OSError) as error:
        print(f"lightning shards {name}: {error}{advice(datamodule, error)}", file=sys.stderr)
        return 1
    bad = described["bad"]
    for key, reason in bad[:SHOWN]:
        print(f"left out {key}: {reason}", file=sys.stderr)
    if len(bad) > SHOWN:
        rest = len(bad) - SHOWN
        print(f"... and {rest} more, listed in {output / 'dataset.json'}", file=sys.stderr)
    shards = described["shards"]
    print(
        f"{described['samples']} samples in {len(shards)} shards in {output}, {len(bad)} left out"
    )
    return 0 if described["samples"] else 1


def advice(datamodule: Any, error: Exception) -> str:
    """Where the official files are to be had, after a message that they aren't there."""
    from datamodules._convert import SourceError

    if not isinstance(error, SourceError) or "does not exist" not in str(error):
        return ""
    if datamodule.archives:
        return "\nTo fetch the official files into --source first, add --download"
    return f"\nTo get the official files: {datamodule.registration}"


def dataset_parser(name: str) -> ArgumentParser:
    """Arguments of one data set: those of its DataModule's ``source``, and where the shards go."""
    from jsonargparse import ArgumentParser

    datamodule = getattr(datamodules, DATASETS[name])
    parts = [datamodule.__doc__.splitlines()[0], f"Expected in --source:\n{datamodule.layout}"]
    if datamodule.registration:
        parts.append(f"To get the official files: {datamodule.registration}")
    parser = type("Parser", (Suggesting, ArgumentParser), {})(
        prog=f"lightning shards {name}",
        description="\n\n".join(parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_method_arguments(datamodule, "source", as_group=False)
    parser.add_argument("--output", required=True, type=str, help="folder for the shards")
    parser.add_argument("--shard-size", type=int, default=500, help="samples a shard")
    parser.add_argument("--workers", type=int, default=None, help="processes; all cores by default")
    if datamodule.archives:
        parser.add_argument(
            "--download",
            action="store_true",
            help="fetch the official files into --source first: "
            + ", ".join(archive.name for archive in datamodule.archives),
        )
    return parser


def verify_parser() -> Parser:
    """Arguments of ``lightning shards verify``."""
    parser = Parser(
        prog="lightning shards verify",
        description="Check shards against their dataset.json (counts and checksums) and read every "
        "sample (images, labels, their ranges and sizes). Lists all offenders.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the shards")
    parser.add_argument("--workers", type=int, default=None, help="processes; all cores by default")
    return parser


def check(argv: list[str]) -> int:
    """Run ``lightning shards verify``; returns the exit code."""
    args = verify_parser().parse_args(argv)
    from datamodules._verify import verify

    try:
        found = verify(args.folder, workers=args.workers)
    except (UserError, OSError) as error:
        print(f"lightning shards verify: {error}", file=sys.stderr)
        return 1
    for problem in found.problems:
        print(": ".join(part for part in problem if part), file=sys.stderr)
    print(f"{found.samples} samples in {found.shards} shards, {len(found.problems)} problems")
    return 1 if found.problems else 0
