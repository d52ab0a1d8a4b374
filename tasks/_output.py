"""One output shard: written under a hidden name, published by one rename, read back."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor
from webdataset import TarWriter

from common.errors import UserError
from datamodules.samples import DatasetInfo, SampleError
from tasks._files import encode, encode_table

STATE = "__shard__"
"""Folder inside an output shard for what is about the shard; webdataset passes over such names."""


class RunError(UserError):
    """The run can't go on; the message says why and what to do."""


class Stopped(RunError):
    """The run was asked to stop; it can go on later."""


_RECORD = ("record.json", "metrics.safetensors")


class ShardRecord:
    """What one output shard says of itself: images, errors and metric states."""

    def __init__(self, images: int, errors: list[SampleError], states: dict[str, Tensor]) -> None:
        self.images = images
        self.errors = errors
        self.states = states

    def members(self) -> dict[str, dict[str, bytes]]:
        """The record as files: key -> ending -> bytes."""
        record = {"images": self.images, "errors": [list(e) for e in self.errors]}
        return {
            f"{STATE}/record": {"json": json.dumps(record, ensure_ascii=False).encode()},
            f"{STATE}/metrics": {"safetensors": safetensors.torch.save(self.states)},
        }

    @classmethod
    def load(cls, path: Path) -> ShardRecord:
        """Read the record of a published shard, a tar or a folder.

        Raises:
            RunError: it has none.
        """
        try:
            if path.is_dir():
                files = {name: (path / STATE / name).read_bytes() for name in _RECORD}
            else:
                with tarfile.open(path) as tar:
                    found = {m.name: m for m in tar if m.name.startswith(f"{STATE}/")}
                    files = {
                        name: tar.extractfile(found[f"{STATE}/{name}"]).read()  # type: ignore[union-attr]  # a file
                        for name in _RECORD
                    }
            record = json.loads(files["record.json"])
            return cls(
                record["images"],
                [SampleError(*e) for e in record["errors"]],
                safetensors.torch.load(files["metrics.safetensors"]),
            )
        except (OSError, KeyError, TypeError, ValueError, tarfile.TarError, SafetensorError) as e:
            raise RunError(
                f"{path} is not a complete output shard ({e!r}): delete it and run again"
            ) from None


class OutputShard:
    """An output shard under way, in a hidden file or folder beside its place."""

    def __init__(self, folder: Path, name: str, layout: str, info: DatasetInfo) -> None:
        self.name = name
        self.position = 0
        self.images = 0
        self.errors: list[SampleError] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.palette = info.flat_palette()
        self.final = folder / (f"{name}.tar" if layout == "tar" else name)
        self.partial = folder / f".{self.final.name}.{os.getpid()}.partial"
        self.tar: TarWriter | None = None
        if layout == "tar":
            self.file = open(self.partial, "wb")  # noqa: SIM115  (closed by publish or abandon)
            self.tar = TarWriter(
                self.file, "root", "root", 0o644, encoder=False, mtime=0, format="GNU_FORMAT"
            )
        else:
            self.partial.mkdir()

    def add(self, key: str, members: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
        """Append the results of one image."""
        for table, row in rows.items():
            self.tables.setdefault(table, []).append({"key": key, **row})
        self._write(key, {k: encode(k, v, self.palette) for k, v in members.items()})
        self.images += 1

    def _write(self, key: str, members: dict[str, bytes]) -> None:
        if self.tar:
            self.tar.write({"__key__": key, **members})
            return
        for ending, data in members.items():
            path = self.partial / f"{key}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def publish(self, states: dict[str, Tensor]) -> None:
        """Give the shard its final name, with its tables and its record inside."""
        try:
            self._finish(states)
            self.partial.replace(self.final)
        except BaseException:
            self.abandon()
            raise

    def _finish(self, states: dict[str, Tensor]) -> None:
        for name, rows in self.tables.items():
            self._write(f"{STATE}/{name}", {"parquet": encode_table(rows)})
        for key, members in ShardRecord(self.images, self.errors, states).members().items():
            self._write(key, members)
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


def find_shard(folder: Path, name: str) -> Path | None:
    """The published output shard of that name: a tar or a folder."""
    return next((p for p in (folder / f"{name}.tar", folder / name) if p.exists()), None)
