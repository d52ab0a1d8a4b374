"""Reading one shard: a tar is indexed by its headers, then any sample's bytes are read on demand.

Nothing of a shard is trusted: names, links, sizes and the end of the file are checked here, before
anything is decoded, and only members that are asked for are ever read.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from webdataset.tariterators import base_plus_ext

MAX_KEY = 200
"""Longest key, in characters: keys become file names of the output."""

TARS = (".tar", ".tar.gz", ".tgz")
"""Endings of shards; all but the first have to be unpacked."""

_MAX_EXTENSION = 1 << 16
"""Longest header extension (a long name, pax fields), in bytes; usual ones have some hundred."""
_MAX_EXTENSIONS = 8
"""Most extensions before one member; tarfile reads each a call deeper."""
_MAX_PADDING = 16 << 20
"""Most zeros after the end of a tar, in bytes; usual are 10 KiB."""
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


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


def index_shard(path: str | Path, name: str = "") -> list[Entry]:
    """List the samples of a shard from its headers, in the order of their first members.

    A sample is all members of the same key. In webdataset's own tars they follow each other; a plain
    `tar -cf x.tar .` has them in the order in which the file system lists them.

    Args:
        path: the tar.
        name: what messages call it; by default its path.

    Raises:
        ShardError: the file is missing, not a tar, cut off, or goes on after its end.
    """
    name = name or str(path)
    entries: list[Entry] = []
    places: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for member in _members(file):
                _add(entries, places, member, str(path))
    except FileNotFoundError:
        raise ShardError(f"{name} does not exist") from None
    except ShardError as error:
        raise ShardError(f"{name} {error}") from None
    except Exception as error:  # untrusted headers may break tarfile in any way
        raise ShardError(f"{name} is not a readable tar: {said_by(error)}") from None
    return entries


def _add(entries: list[Entry], places: dict[str, int], member: tarfile.TarInfo, path: str) -> None:
    """Add a member to its sample; ``places`` has the last of ``entries`` with each key."""
    # `tar -cf x.tar .` writes ./name, which is as harmless as name.
    stored = member.name.removeprefix("./")
    prefix, extension = base_plus_ext(stored)
    key = prefix or stored
    if key.startswith("__") and not entries:
        return  # webdataset's mark for what is about the shard, not a sample
    defect = _defect(key, member)
    key = readable(key)
    ending = (extension or "").lower()
    place = places.get(key)
    if place is None or ending in entries[place].members:
        if place is not None:
            defect = defect or "its key occurs twice in the shard"
        place = places[key] = len(entries)
        entries.append(Entry(key, {}, defect))
    elif defect and not entries[place].defect:
        entries[place] = Entry(key, entries[place].members, defect)
    if ending:
        entries[place].members[ending] = Span(path, member.offset_data, member.size)


class _Header(tarfile.TarInfo):
    """A header as tarfile reads it, refused where that would take unbounded memory or calls."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Parse one block."""
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise ShardError("is damaged: a header gives a negative size")
        if header.type in _EXTENSIONS and header.size > _MAX_EXTENSION:
            raise ShardError(
                f"is damaged: a long name or pax header of {header.size} bytes, more than "
                f"{_MAX_EXTENSION}"
            )
        return header

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> _Header:
        """Read a header, with the extensions before it: tarfile comes here once for each."""
        tarfile.depth += 1
        if tarfile.depth > _MAX_EXTENSIONS:
            raise ShardError(
                f"is damaged: more than {_MAX_EXTENSIONS} long name or pax headers in a row"
            )
        header: _Header = super().fromtarfile(tarfile)
        tarfile.depth -= 1
        return header


class _Archive(tarfile.TarFile):
    tarinfo = _Header
    members: list[tarfile.TarInfo]  # known to tarfile, but not to its type stubs
    depth = 0


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar that are no folders; raises `ShardError` if it isn't whole."""
    size = os.fstat(file.fileno()).st_size
    position = 0
    with _Archive(fileobj=file, mode="r") as archive:
        while member := archive.next():
            archive.members.clear()  # it would keep them all
            # A pax header may give another size than the block that was checked.
            if member.size < 0 or archive.offset <= position:
                raise ShardError(f"is damaged: a negative size in the header at byte {position}")
            if archive.offset - tarfile.BLOCKSIZE >= size or (
                member.isreg() and not member.issparse() and member.offset_data + member.size > size
            ):
                raise ShardError(
                    f"is cut off inside {readable(member.name)!r}: copy or convert it again"
                )
            position = archive.offset
            if not member.isdir():
                yield member
        # tarfile stops in silence at whatever it doesn't understand.
        _check_end(file, archive.offset, size)


def _check_end(file: BinaryIO, end: int, size: int) -> None:
    """Check that a tar ends with zeros, from the byte ``end`` to that of its ``size``."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise ShardError("is cut off at its end: copy or convert it again")
    if any(block):
        raise ShardError(f"is damaged: no header at byte {end}: copy or convert it again")
    if size - end > _MAX_PADDING:
        raise ShardError(
            f"goes on for {size - end} bytes after its end at byte {end}: is it several tars in one "
            "file, or a copy that isn't complete?"
        )
    rest = file.read()
    found = re.search(rb"[^\0]", rest)
    if found:
        raise ShardError(
            f"goes on after its end: zeros at byte {end}, data at byte "
            f"{end + tarfile.BLOCKSIZE + found.start()}: is it several tars in one file, or was a "
            "part overwritten?"
        )


def _defect(key: str, member: tarfile.TarInfo) -> str:
    parts = key.split("/")
    shown = repr(readable(member.name))
    if key.startswith("/") or "\\" in key or ":" in key or any(p in ("", ".", "..") for p in parts):
        return f"unsafe member name {shown}"
    if any(p.startswith("__") and p.endswith("__") for p in parts) or not key.isprintable():
        return f"reserved or unprintable member name {shown}"
    if len(key) > MAX_KEY:
        return f"key longer than {MAX_KEY} characters"
    if not member.isreg() or member.issparse():
        return f"member {shown} is a link, a device or a sparse file, not a plain file"
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


def readable(text: str) -> str:
    """An untrusted text as one that can be stored: UTF-8, of a bounded length."""
    return text[: 2 * MAX_KEY].encode("utf-8", "backslashreplace").decode()


def said_by(error: Exception) -> str:
    """An error's text without what differs from run to run: objects' addresses, paths of files."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", str(error))
    return readable(f"{type(error).__name__}: {text}" if text else type(error).__name__)
