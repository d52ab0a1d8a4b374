"""One output shard: written under a hidden name, published by one rename, its record read back."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from webdataset import TarWriter

from datamodules._samples import DatasetInfo, SampleError
from tasks.run.errors import RunError
from tasks.run.image import ImageResult
from tasks.run.place import is_folder, publish, read_part, remove, size_of
from tasks.run.stored import ColumnTable

log = logging.getLogger(__name__)

STATE = "__shard__"
"""Folder inside an output shard for what is about the shard; webdataset passes over such names."""

RECORD = f"{STATE}/record.json"
STATES = f"{STATE}/metrics.safetensors"

Each = Callable[[Callable[[ImageResult], dict[str, bytes]], Sequence[ImageResult]], Iterable[Any]]
"""Like `map`: calls a function for each result, and returns what that does in the same order."""

_TAIL = 1 << 16  # bytes: most records are within so many of the end of their tar


@dataclass(frozen=True)
class ShardRecord:
    """What one output shard says of itself.

    Attributes:
        images: how many it has results of.
        errors: its samples that could not be used.
        states: bytes of the states of what was measured, which `load_states` reads.
        keys: of the images in order, where they are plain files; a tar has an order of its own.
    """

    images: int
    errors: list[SampleError]
    states: int
    keys: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """The record as it is stored, the last file of its shard."""
        record = {
            "images": self.images,
            "errors": [list(error) for error in self.errors],
            "states": self.states,
            **({"keys": self.keys} if self.keys else {}),
        }
        return json.dumps(record, ensure_ascii=False).encode()

    @classmethod
    def load(cls, path: Path) -> ShardRecord:
        """Read the record of a published shard, a tar or a folder, and no more of it.

        Raises:
            RunError: it has none that is whole.
        """
        return _load(path)[0]


def load_states(path: Path) -> tuple[ShardRecord, dict[str, Tensor]]:
    """A published shard's record and the states of what was measured on it.

    Raises:
        RunError: it has none that are whole.
    """
    record, offset = _load(path)
    try:
        if is_folder(path):
            data = (path / STATES).read_bytes()
        else:
            data = read_part(path, offset - _padded(record.states), record.states)
        return record, safetensors.torch.load(data)
    except (OSError, ValueError, SafetensorError) as error:
        raise _broken(path, error) from None


def _load(path: Path) -> tuple[ShardRecord, int]:
    """The record, and where in its tar it begins."""
    try:
        if is_folder(path):
            data, offset = (path / RECORD).read_bytes(), 0
            size = (path / STATES).stat().st_size
        else:
            data, offset = _tail_record(path)
            size = None
        found = json.loads(data)
        errors = [SampleError(*error) for error in found["errors"]]
        keys = list(found.get("keys", []))
        record = ShardRecord(int(found["images"]), errors, int(found["states"]), keys)
        if size not in (None, record.states):
            raise ValueError(f"{STATES} has {size} of {record.states} bytes")
        return record, offset
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _broken(path, error) from None


def _tail_record(path: Path) -> tuple[bytes, int]:
    """Bytes of a tar's last file, its record, and where its header is.

    Found from the end, since walking all headers of a large tar takes long; a tar that was cut off
    has none there.
    """
    size = size_of(path)
    if not size or size % tarfile.RECORDSIZE:
        raise ValueError("it is cut off")
    length = _TAIL
    while True:
        length = min(length, size)
        tail = read_part(path, size - length, length)
        name = RECORD.encode() + b"\0"
        place = tail.rfind(name)
        while place >= 0:
            with suppress(tarfile.HeaderError):
                header = tarfile.TarInfo.frombuf(tail[place : place + 512], "utf-8", "strict")
                begin = place + 512
                end = begin + _padded(header.size)
                if (size - length + place) % 512 == 0 and not tail[end:].strip(b"\0"):
                    return tail[begin : begin + header.size], size - length + place
            place = tail.rfind(name, 0, place)
        if length == size:
            raise ValueError("it has no record at its end")
        length *= 16


def _padded(size: int) -> int:
    """Bytes that a file of ``size`` bytes takes in a tar."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _broken(path: Path, error: Exception) -> RunError:
    return RunError(f"{path} is not a complete output shard ({error}): delete it and run again")


class OutputShard:
    """An output shard under way, in a hidden file or folder.

    Args:
        folder: of the run.
        name: of the shard.
        layout: ``tar`` or ``files``.
        info: the data set, whose colours masks are written in.
        work: a folder of this machine, where it is until it is published; by default that of the run.
        check: called before and after it is published; where it raises, the shard must not be there.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        layout: str,
        info: DatasetInfo,
        work: Path | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.position = 0
        self.keys: list[str] = []
        self.errors: list[SampleError] = []
        self.tables: dict[str, ColumnTable] = {}
        self.info = info
        self.check = check
        self.final = folder / (f"{name}.tar" if layout == "tar" else name)
        self.partial = (work or folder) / f".{self.final.name}.{os.getpid()}.partial"
        self.tar: TarWriter | None = None
        if layout == "tar":
            self.file = open(self.partial, "wb")  # noqa: SIM115  (closed by publish or abandon)
            self.tar = TarWriter(
                self.file, "root", "root", 0o644, encoder=False, mtime=0, format="GNU_FORMAT"
            )
        else:
            self.partial.mkdir()

    def add(self, results: Sequence[ImageResult], each: Each = map) -> None:
        """Append the results of some images.

        Args:
            results: of the images.
            each: encodes them, maybe side by side.
        """
        encoded = each(lambda result: result.encode(self.info), results)
        for result, files in zip(results, encoded, strict=True):
            for name, row in result.rows().items():
                if name not in self.tables:
                    self.tables[name] = ColumnTable(row.names)
                self.tables[name].add(result.key, row.values)
            self._write(result.key, files)
            self.keys.append(result.key)

    def _write(self, key: str, members: dict[str, bytes]) -> None:
        if self.tar:
            self.tar.write({"__key__": key, **members})
            return
        for ending, data in members.items():
            path = self.partial / f"{key}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def publish(self, states: dict[str, Tensor]) -> None:
        """Give the shard its final name, with its tables, metric states and record inside.

        Where the second look fails, for whatever reason, nobody knows whose the folder is by now: the
        shard is taken back.
        """
        try:
            self._finish(safetensors.torch.save(states))
            self.check()
            try:
                publish(self.partial, self.final)
            finally:
                self._check_again()
        except BaseException:
            self.abandon()
            raise

    def _check_again(self) -> None:
        """After sending the shard, which may have taken minutes; one that failed may be there even so."""
        try:
            self.check()
        except BaseException:
            self._take_back()
            raise

    def _take_back(self) -> None:
        try:
            remove(self.final)
        except RunError as error:  # the reason why it is taken back matters more
            log.error("%s: delete it if another run was begun there", error)

    def _finish(self, states: bytes) -> None:
        for name, table in self.tables.items():
            self._write(f"{STATE}/{name}", {"parquet": table.encode()})
        keys = [] if self.tar else self.keys
        record = ShardRecord(len(self.keys), self.errors, len(states), keys)
        for file, data in ((STATES, states), (RECORD, record.to_bytes())):
            key, ending = file.rsplit(".", 1)
            self._write(key, {ending: data})
        if self.tar:
            self.tar.close()
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def abandon(self) -> None:
        """Remove what was written."""
        if self.tar:
            for stream in (self.tar, self.file):
                # They write what they still hold: there may be no room for it, or no file any more.
                with suppress(OSError, ValueError):
                    stream.close()
            self.partial.unlink(missing_ok=True)
        else:
            shutil.rmtree(self.partial, ignore_errors=True)


def find_shards(there: Mapping[str, Path], names: Sequence[str]) -> dict[str, Path]:
    """The published output shards of those names, tars or folders, in their order.

    Args:
        there: what lies in the run's folder, see `files_in`.
        names: of shards.
    """
    places = {name: there.get(f"{name}.tar") or there.get(name) for name in names}
    return {name: path for name, path in places.items() if path}


def leftover_of(file: str) -> str:
    """The shard that a partial output or a note of a lost shard belongs to; empty for others."""
    if file.endswith(".error.json"):
        return file.removesuffix(".error.json")
    if file.startswith(".") and file.endswith(".partial"):
        return file[1:].rsplit(".", 2)[0].removesuffix(".tar")
    return ""
