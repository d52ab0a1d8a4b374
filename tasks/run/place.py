"""Where a run's files live: a folder of this machine, or of an object store (S3, Google's, ...).

All that differs between the two is here. An object store has no renames, no locks and no folders, and
each look at it takes a round trip. So what is in it is found by one listing; a shard's file is made on
this machine and sent whole by one put, so that its being there says that it is finished; and of other
files only what is needed is fetched.

A folder of a store is a `upath.UPath`, which answers to the same calls as a `Path`.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from common.errors import InvalidSetting
from common.files import write_atomically
from datamodules._remote import check_protocol, is_remote, without_query
from datamodules._spool import SpoolFolder
from datamodules._tar import ShardError, said_by
from tasks.run.errors import RunError

log = logging.getLogger(__name__)

MARKER = "run.json"
"""What makes a folder a run's: what it is a run of."""

_RETRIES = 3
_FINAL = (FileNotFoundError, PermissionError)
"""What trying again does not change."""

_MANGLED = re.compile(r"\w{2,}:/[^/]")
"""A URL that has been a `Path`, which makes one of two slashes."""

T = TypeVar("T")


def place_of(output: str | Path) -> Path:
    """The folder that a setting, or a word of a command line, names.

    Raises:
        InvalidSetting: nothing can be written there, or a package is missing.
    """
    url = str(output).removeprefix("file://")
    if isinstance(output, Path) and _MANGLED.match(url):
        raise InvalidSetting(f"{url}: give a URL as a string, pathlib takes it for a path")
    if not is_remote(url):
        return Path(url)
    if url.startswith(("http:", "https:", "pipe:")):
        raise InvalidSetting(
            f"{without_query(url)}: a run is written to a folder, or to a store such as s3://bucket/run"
        )
    check_protocol(url)
    try:
        from upath import UPath
    except ImportError:
        raise InvalidSetting(
            f"{url}: runs in a store need a package more: pip install universal-pathlib"
        ) from None
    return cast("Path", UPath(url.rstrip("/")))


def in_store(path: Path) -> bool:
    """Whether a path is in an object store."""
    return not isinstance(path, Path)


def beside(folder: Path, name: str) -> Path:
    """Where a file about a run is written, if nothing else was said.

    Raises:
        InvalidSetting: the run is in a store, from which nobody could open it.
    """
    if in_store(folder):
        raise InvalidSetting(f"{folder} is in a store: say with --output where {name} shall be")
    return folder / name


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; a store has none."""
    return not in_store(path) and path.is_dir()


def files_in(folder: Path) -> dict[str, Path]:
    """What lies in a folder as it is now, by name; nothing in one that is not there.

    Raises:
        RunError: the store can't be asked.
    """
    if not in_store(folder):
        return {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
    store, place = _store(folder)

    def look() -> list[str]:
        store.invalidate_cache()
        try:
            return [str(path) for path in store.ls(place, detail=False)]
        except FileNotFoundError:
            return []

    names = (path.rstrip("/").rpartition("/")[2] for path in _tried(look, folder, "listed"))
    return {name: folder / name for name in names}


def read(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it can't be read, here.
        RunError: the same, of a store.
    """
    if not in_store(path):
        return path.read_bytes()
    store, place = _store(path)
    return _tried(lambda: bytes(store.cat_file(place)), path, "read")


def read_part(path: Path, begin: int, length: int) -> bytes:
    """So many bytes of a file, from ``begin`` on; raises what `read` does."""
    if not in_store(path):
        with open(path, "rb") as file:
            file.seek(begin)
            return file.read(length)
    store, place = _store(path)
    return _tried(
        lambda: bytes(store.cat_file(place, start=begin, end=begin + length)), path, "read"
    )


def size_of(path: Path) -> int:
    """Bytes of a file; raises what `read` does."""
    if not in_store(path):
        return path.stat().st_size
    store, place = _store(path)
    return _tried(lambda: int(store.size(place)), path, "read")


def version_of(path: Path) -> str:
    """What tells a file of a store from any that was, or will be, written in its place.

    Raises:
        FileNotFoundError: there is none.
        RunError: the store can't be asked.
    """
    store, place = _store(path)

    def look() -> str:
        store.invalidate_cache()
        return str(store.ukey(place))

    return _tried(look, path, "read")


def write(path: Path, data: bytes | str) -> None:
    """Write a file that is either the old or the new one at any moment.

    Raises:
        RunError: the store does not take it.
    """
    if not in_store(path):
        write_atomically(path, data)
        return
    store, place = _store(path)
    content = data.encode() if isinstance(data, str) else data
    _tried(lambda: store.pipe_file(place, content), path, "written")


def append(path: Path, line: str) -> None:
    """Add a line to a file. In a store, one of two jobs that do so at the same moment may lose its line.

    Raises:
        RunError: the store does not take it.
    """
    if not in_store(path):
        with open(path, "a") as file:
            file.write(line)
        return
    before = b""
    with suppress(FileNotFoundError):
        before = read(path)
    write(path, before + line.encode())


def publish(made: Path, path: Path) -> None:
    """Let a finished file, or folder, appear at ``path`` at once; it is no more where it was made.

    Raises:
        RunError: the store does not take it.
    """
    if not in_store(path):
        if path.is_dir():  # a broken one, done again; files are replaced as they are
            shutil.rmtree(path)
        made.replace(path)
        return
    store, place = _store(path)
    _tried(lambda: store.put_file(str(made), place), path, "written")
    made.unlink()


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it.

    Raises:
        RunError: the store does not delete it.
    """
    if not in_store(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return
    store, place = _store(path)

    def delete() -> None:
        with suppress(FileNotFoundError):
            store.rm_file(place)

    _tried(delete, path, "deleted")


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file as one of this machine, for as long as it is needed.

    Raises:
        RunError: it can't be fetched.
    """
    if not in_store(path):
        yield path
        return
    folder = SpoolFolder()
    try:
        with folder.fetched(str(path)) as copy:
            yield copy
    except ShardError as error:
        raise RunError(str(error)) from None
    finally:
        folder.cleanup()


def _store(path: Path) -> tuple[Any, str]:
    """The file system of a path in a store, and what that calls it."""
    there: Any = path
    return there.fs, there.path


def _tried(call: Callable[[], T], path: Path, done: str) -> T:
    """What ``call`` returns; tried again where that may help, after 1, 2 and 4 seconds."""
    for attempt in range(_RETRIES + 1):
        try:
            return call()
        except Exception as error:  # every store has its own
            if done == "read" and isinstance(error, FileNotFoundError):
                raise
            failed = without_query(f"{path} could not be {done} ({said_by(error)})")
            if isinstance(error, _FINAL):
                raise RunError(f"{failed}: check the address, and the credentials") from None
        if attempt < _RETRIES:
            log.warning(
                "%s; trying again in %d s (%d of %d)", failed, 2**attempt, attempt + 1, _RETRIES
            )
            _pause(2**attempt)
    raise RunError(f"{failed}. Finished shards are kept: run the same command again to go on")


def _pause(seconds: float) -> None:
    time.sleep(seconds)
