"""``lightning shards``: a data set's official layout becomes shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

import datamodules
from datamodules import DATASETS
from datamodules._convert import Source, SourceError, write_shards


def main(argv: list[str]) -> int:
    """Run ``lightning shards``; returns the exit code."""
    overview = argparse.ArgumentParser(
        prog="lightning shards",
        description="Turn a data set's official layout into webdataset shards. A killed conversion "
        "is resumed by running it again.",
        epilog="lightning shards DATASET --help shows the layout that is expected.",
    )
    overview.add_argument(
        "dataset", choices=sorted(DATASETS), metavar="DATASET", help=", ".join(sorted(DATASETS))
    )
    name = overview.parse_args(argv[:1]).dataset
    parser = dataset_parser(name)
    args = parser.parse_args(argv[1:])
    output, shard_size, workers = (
        Path(args.pop("output")),
        args.pop("shard_size"),
        args.pop("workers"),
    )
    try:
        source: Source = getattr(datamodules, DATASETS[name]).source(**args.as_dict())
        described = write_shards(source, output, shard_size=shard_size, workers=workers)
    except (SourceError, ValueError, OSError) as error:
        print(f"lightning shards {name}: {error}", file=sys.stderr)
        return 1
    for key, reason in described["bad"]:
        print(f"left out {key}: {reason}", file=sys.stderr)
    shards = described["shards"]
    print(
        f"{described['samples']} samples in {len(shards)} shards in {output}, "
        f"{len(described['bad'])} left out"
    )
    return 0 if described["samples"] else 1


def dataset_parser(name: str) -> ArgumentParser:
    """Arguments of one data set: those of its DataModule's ``source``, and where the shards go."""
    datamodule = getattr(datamodules, DATASETS[name])
    parser = ArgumentParser(
        prog=f"lightning shards {name}",
        description=f"{datamodule.__doc__.splitlines()[0]}\n\nExpected in --source:\n{datamodule.layout}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_method_arguments(datamodule, "source", as_group=False)
    parser.add_argument("--output", required=True, type=str, help="folder for the shards")
    parser.add_argument("--shard-size", type=int, default=500, help="samples a shard")
    parser.add_argument("--workers", type=int, default=None, help="processes; all cores by default")
    return parser
