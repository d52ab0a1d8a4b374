"""Reading one shard: a tar is indexed by its headers, then any sample's bytes are read on demand.

Nothing of a shard is trusted: names, links, sizes and the end of the file are checked here, before
anything is decoded, and only members that are asked for are ever read.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

MAX_KEY = 200
"""Longest key, in characters: keys become file names of the output."""


class ShardError(Exception):
    """A whole shard can't be read; the message says which and why."""


class BadSample(Exception):
    """A sample can't be used; the message is the reason given in ``errors.jsonl``."""


class Span(NamedTuple):
    """Where the bytes of a member are: ``size`` bytes of a file, from ``offset`` on."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True)
class Entry:
    """One sample of a shard: where the bytes of each member are, or why it can't be used."""

    key: str
    members: dict[str, Span]
    defect: str = ""


def index_shard(path: str | Path) -> list[Entry]:
    """List the samples of a shard from its headers, in file order.

    Samples are runs of members with the same key, as webdataset groups them.

    Raises:
        ShardError: the file is missing, not a tar, or cut off.
    """
    path = Path(path)
    entries: list[Entry] = []
    keys: set[str] = set()
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + (member.size if member.isreg() else 0)
                if end > size:
                    raise ShardError(
                        f"{path} is cut off inside {member.name!r}: copy or convert it again"
                    )
                if member.isdir():
                    continue
                prefix, extension = base_plus_ext(member.name)
                key = prefix or member.name
                if key.startswith("__") and not entries:
                    continue  # webdataset's mark for what is about the shard, not a sample
                defect = _defect(key, member)
                if (
                    entries
                    and entries[-1].key == key
                    and (extension or "") not in entries[-1].members
                ):
                    last = entries[-1]
                    entries[-1] = Entry(key, last.members, last.defect or defect)
                else:
                    if key in keys:
                        defect = defect or "its key occurs twice in the shard"
                    entries.append(Entry(key, {}, defect))
                    keys.add(key)
                if extension:
                    span = Span(str(path), member.offset_data, member.size)
                    entries[-1].members[extension.lower()] = span
            end_of_members = tar.offset
        # tarfile also stops in silence where a file was cut between two members, or in a header;
        # a whole tar ends with blocks of zeros.
        if read_member(Span(str(path), end_of_members, tarfile.BLOCKSIZE), size) != bytes(
            tarfile.BLOCKSIZE
        ):
            raise ShardError(f"{path} is cut off at its end: copy or convert it again")
    except FileNotFoundError:
        raise ShardError(f"{path} does not exist") from None
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise ShardError(f"{path} is not a readable tar: {error}") from None
    return entries


def _defect(key: str, member: tarfile.TarInfo) -> str:
    parts = key.split("/")
    if key.startswith("/") or "\\" in key or ":" in key or any(p in ("", ".", "..") for p in parts):
        return f"unsafe member name {member.name[:MAX_KEY]!r}"
    if any(p.startswith("__") and p.endswith("__") for p in parts) or not key.isprintable():
        return f"reserved or unprintable member name {member.name[:MAX_KEY]!r}"
    if len(key) > MAX_KEY:
        return f"key longer than {MAX_KEY} characters"
    if not member.isreg():
        return f"member {member.name!r} is a link or a device, not a file"
    return ""


def read_member(span: Span, limit: int) -> bytes:
    """Bytes of one member.

    Raises:
        BadSample: the member is larger than ``limit`` bytes.
    """
    if span.size > limit:
        raise BadSample(f"a member has {span.size} bytes, more than the limit of {limit}")
    with open(span.path, "rb") as file:
        file.seek(span.offset)
        return file.read(span.size)
