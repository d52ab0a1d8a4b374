"""Shards checked: against what ``dataset.json`` says of them, and every sample by reading it."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from common import signals
from common.errors import MissingFile
from common.files import file_digest
from common.pictures import MAX_PIXELS
from datamodules._convert import process_pool
from datamodules._dataset_json import read_dataset_json
from datamodules._decode import Decoder, reason_of
from datamodules._samples import VOID, DatasetInfo, SampleError
from datamodules._tar import ShardError, index_shard


class Verified(NamedTuple):
    """What was found: how much there is, and all that is wrong with it."""

    shards: int
    samples: int
    problems: list[SampleError]


def verify(folder: Path, *, workers: int | None = None) -> Verified:
    """Check all shards of a folder.

    Without a ``dataset.json`` (img2dataset writes none) the samples are read all the same, but what
    labels may occur is not known.

    Raises:
        MissingFile: no shards there, or only some of those that are being made.
        InvalidSetting: its ``dataset.json`` isn't valid.
    """
    described = read_dataset_json(folder)
    files = {path.name: path for path in sorted(folder.glob("*.tar"))}
    facts = {shard["name"]: shard for shard in described.get("shards", [])}
    if not files and not facts:
        raise MissingFile(f"{folder} holds no *.tar: give a folder of shards")
    problems = [
        SampleError(name, "", "is listed in dataset.json, but missing")
        for name in facts.keys() - files
    ]
    if described:
        unlisted = sorted(files.keys() - facts.keys())
        problems += [SampleError(name, "", "is not listed in dataset.json") for name in unlisted]
    job = partial(verify_shard, facts=facts, decoder=decoder_for(described))
    workers = min(workers or os.cpu_count() or 1, max(len(files), 1))
    samples = 0
    with ExitStack() as stack:
        spread: Any = map
        if workers > 1:
            spread = stack.enter_context(process_pool(workers)).map
        with signals.blocked():
            found = spread(job, files.values())
        for count, wrong in tqdm(
            found, total=len(files), unit="shard", disable=None, file=sys.stderr
        ):
            samples += count
            problems += wrong
    if not samples and not problems:
        problems.append(SampleError(str(folder), "", "there is not one sample in its shards"))
    return Verified(len(files), samples, problems)


def decoder_for(described: dict[str, Any]) -> Decoder:
    """A decoder that knows of the data set what ``dataset.json`` says."""
    any_byte = [str(value) for value in range(1, VOID)]
    info = DatasetInfo(
        name=described.get("dataset", "shards"),
        classes=tuple(described.get("classes", any_byte)),
        zero_is_background=described.get("background", True),
        labels=described.get("labels", "none"),
    )
    return Decoder(info, size=(8, 8), max_pixels=MAX_PIXELS)


def verify_shard(
    path: Path, *, facts: dict[str, dict[str, Any]], decoder: Decoder
) -> tuple[int, list[SampleError]]:
    """Number of samples in a shard, and all that is wrong with it."""
    problems: list[SampleError] = []
    try:
        entries = index_shard(path)
    except ShardError as error:
        return 0, [SampleError(path.name, "", str(error))]
    expected = facts.get(path.name)
    if expected and len(entries) != expected["samples"]:
        reason = f"has {len(entries)} samples, dataset.json says {expected['samples']}"
        problems.append(SampleError(path.name, "", reason))
    if expected and file_digest(path) != expected["sha256"]:
        problems.append(SampleError(path.name, "", "its checksum is not that in dataset.json"))
    for entry in entries:
        try:
            decoder(entry)
        except Exception as error:  # whatever broken bytes do to a decoder
            problems.append(SampleError(path.name, entry.key, reason_of(error)))
    return len(entries), problems
