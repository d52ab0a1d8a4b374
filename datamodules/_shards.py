"""A list of webdataset tars, named and in order, and the batches read from them, each of one shard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape, glob

from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info

from common.errors import InvalidSetting, MissingFile
from datamodules._decode import Decoder, reason_of
from datamodules._remote import check_protocol, is_remote, without_query
from datamodules._samples import Batch, Sample, SampleError
from datamodules._spool import Spool
from datamodules._tar import TARS, Entry, ShardError, index_shard


class ShardStream(IterableDataset[Batch]):
    """Batches of a rank's shards, shard after shard.

    A batch is ``batch_size`` consecutive samples of one shard, so it depends on the shard alone. The
    loader workers of a rank take turns batch by batch (worker ``w`` of ``W`` makes batches ``w``,
    ``w + W``, ...): the DataLoader hands them out in the same order as one process would, and even
    a single shard keeps all workers busy. Every worker reads the headers of every shard, but only the
    bytes of its own batches.

    Args:
        batch_size: samples a batch.
        decoder: makes a sample of a shard's entry.
        spool: says which shards, and has the remote ones.
    """

    def __init__(self, batch_size: int, decoder: Decoder, spool: Spool) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.decoder = decoder
        self.spool = spool

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        turn, turns = (worker.id, worker.num_workers) if worker else (0, 1)
        position = 0
        for name, url in self.spool:
            try:
                with self._entries(url) as entries:
                    for start in range(0, len(entries), self.batch_size) or range(1):
                        if position % turns == turn:
                            yield self._batch(name, entries, start)
                        position += 1
            except ShardError as error:
                if position % turns == turn:
                    errors = [SampleError(name, "", str(error))]
                    yield Batch.collate(name, 0, 0, [], errors)
                position += 1

    @contextmanager
    def _entries(self, url: str) -> Iterator[list[Entry]]:
        with self.spool.local(url) as path:
            yield index_shard(path, without_query(url))

    def _batch(self, name: str, entries: list[Entry], start: int) -> Batch:
        samples: list[Sample] = []
        errors: list[SampleError] = []
        for entry in entries[start : start + self.batch_size]:
            try:
                samples.append(self.decoder(entry))
            except Exception as error:  # untrusted bytes may break any decoder in any way
                errors.append(SampleError(name, entry.key, reason_of(error)))
        return Batch.collate(name, start, len(entries), samples, errors)


def expand_shards(shards: str | list[str], *, allow_pipe: bool = False) -> list[str]:
    """All shards that a folder, pattern, URL or list of these stands for, in order.

    Raises:
        MissingFile: nothing matches.
        InvalidSetting: a ``pipe:`` shard without ``allow_pipe``, or a folder of a store.
    """
    if isinstance(shards, list):
        return [s for spec in shards for s in expand_shards(spec, allow_pipe=allow_pipe)]
    if shards.startswith("pipe:"):
        if not allow_pipe:
            raise InvalidSetting(
                f"{shards!r} would run a shell command; if you trust it, set --data.allow_pipe true"
            )
        return [shards]
    found: list[str] = []
    for spec in braceexpand(shards):
        spec = spec.removeprefix("file://")
        if is_remote(spec):
            check_protocol(spec)
            _refuse_folder(spec)
            found.append(spec)
        elif os.path.isdir(spec):
            found += tars_in(spec)
        elif any(c in spec for c in "*?["):
            found += sorted(glob(spec))
        else:
            found.append(spec)
    missing_all = not found or (
        len(found) == 1 and not is_remote(found[0]) and not os.path.exists(found[0])
    )
    if missing_all:
        raise MissingFile(
            f"no shards at {without_query(shards)!r} (seen from {os.getcwd()}): give a folder of *.tar, "
            f"a pattern or a URL with --data.shards; `lightning shards --help` makes shards of a data set"
        )
    return found


def _refuse_folder(url: str) -> None:
    """Refuse what can't be a shard, at once; a page of the web may have any name.

    Raises:
        InvalidSetting: a URL of a store names no tar.
    """
    if not url.startswith(("http:", "https:")) and not without_query(url).endswith(TARS):
        shown = without_query(url).rstrip("/")
        raise InvalidSetting(
            f"{shown} names no tar: name the shards of other machines one by one, as "
            f"{shown}/{{000000..000007}}.tar"
        )


def tars_in(folder: str) -> list[str]:
    """The ``*.tar`` of a folder, or else its packed tars, in order."""
    for endings in (TARS[:1], TARS[1:]):
        found = [p for end in endings for p in glob(os.path.join(escape(folder), f"*{end}"))]
        if found:
            break
    return sorted(found)


def name_shards(urls: list[str]) -> list[tuple[str, str]]:
    """Give each shard a unique name: its file name without .tar, led by folders where needed.

    Raises:
        InvalidSetting: a shard is listed twice.

    Example:
        >>> name_shards(["train/0.tar", "train/1.tar.gz"])
        [('0', 'train/0.tar'), ('1', 'train/1.tar.gz')]
        >>> name_shards(["train/0.tar", "val/0.tar"])
        [('train_0', 'train/0.tar'), ('val_0', 'val/0.tar')]
    """

    def name(url: str, depth: int) -> str:
        parts = without_query(url).rstrip("'\" -")
        for ending in (".gz", ".tgz", ".tar"):
            parts = parts.removesuffix(ending)
        kept = [p for p in parts.replace("\\", "/").split("/") if p and p not in (".", "..")][
            -depth:
        ]
        return "_".join("".join(c if c.isalnum() or c in "-_." else "-" for c in p) for p in kept)

    for depth in range(1, 12):
        names = [name(url, depth) for url in urls]
        if len(set(names)) == len(names):
            return list(zip(names, urls, strict=True))
    listed = sorted(without_query(url) for url in urls)
    raise InvalidSetting(f"the same shard is listed twice: {listed[:4]}")
