"""Whether an input shard is still the one that results were made of: cheap to ask of thousands."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.files import file_digest

_PIECES = 16
_PIECE = 1 << 12  # bytes


def describe_file(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """What tells a shard from another of its name, without reading all of it.

    Args:
        path: the shard.
        sha256: its checksum, where it is written down beside it.

    Returns:
        ``bytes``, ``modified`` (nanoseconds), ``inode``, and ``sha256`` where it is known or else
        ``glance``, the checksum of some pieces spread over the file.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        found = {
            "path": str(path),
            "bytes": status.st_size,
            "modified": status.st_mtime_ns,
            "inode": status.st_ino,
        }
        if sha256:
            return {**found, "sha256": sha256}
        digest = hashlib.sha256()
        for i in range(_PIECES):
            file.seek(max(status.st_size - _PIECE, 0) * i // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return {**found, "glance": digest.hexdigest()}


def describe_group(files: Iterable[tuple[str, Path]]) -> dict[str, Any]:
    """The same of a group of loose files, given as (key, path); none of them is opened."""
    names, times, inodes = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    size = 0
    for key, path in files:
        status = path.stat()
        size += status.st_size
        names.update(repr((key, status.st_size)).encode())
        times.update(repr(status.st_mtime_ns).encode())
        inodes.update(repr(status.st_ino).encode())
    return {
        "bytes": size,
        "glance": names.hexdigest(),
        "modified": times.hexdigest(),
        "inode": inodes.hexdigest(),
    }


def has_changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a shard is another one than it was; both as described above.

    A copy has another modification time and is no change. Where the time differs, the whole file is
    compared with the checksum that was known of it. Where none was known, a file that was written to
    in place counts as changed, and a copy is told by its size and by the glance alone.
    """
    if was["bytes"] != now["bytes"]:
        return True
    if "glance" in was and "glance" in now and was["glance"] != now["glance"]:
        return True
    if was["modified"] == now["modified"]:
        return False
    if "sha256" in was and "path" in now:
        return file_digest(now["path"]) != was["sha256"]
    return bool(was["inode"] == now["inode"])
