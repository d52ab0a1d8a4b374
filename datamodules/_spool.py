"""Remote shards of one rank: fetched ahead of those who read them, dropped when all have."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from torch.utils.data import get_worker_info

from datamodules._fetch import FetchStopped, Limits, NoRoom, fetch
from datamodules._remote import needs_spool
from datamodules._tar import ShardError

log = logging.getLogger(__name__)

_LOOK = 0.02  # seconds between two looks at what others do
_PREFIX = "clip_surgery_shards_"
_OWNER = "owner.lock"
_AWAITED, _THERE, _LOST, _BROKEN = range(4)  # states of a shard


@dataclass(frozen=True)
class Ahead:
    """How far ahead of its readers a rank fetches.

    Attributes:
        shards: at most so many that no reader has come to; with 0 a shard is fetched when the readers
            have done with the one before.
        bytes: held at most, with those that are being read; a single larger shard is held alone.
        connections: fetched at the same time.
    """

    shards: int = 2
    bytes: int = 4 << 30
    connections: int = 1


class Spool:
    """What the readers of a rank's shards see of its `Fetcher`, in their own processes.

    Args:
        folder: where shards lie while they are read.
        urls: the shards to be fetched, in the order in which all readers read them.
        readers: how many loader workers read every shard, or 1.
    """

    def __init__(self, folder: str, urls: Sequence[str], readers: int) -> None:
        self.folder = folder
        self.numbers = {url: number for number, url in enumerate(urls)}
        # Shared with the loader workers; one writer each, so no lock that a killed one could hold.
        self.states: Any = RawArray("q", len(urls))
        self.at: Any = RawArray("q", readers)  # the shard that each reader reads, or wants

    @contextmanager
    def local(self, url: str) -> Iterator[Path]:
        """Path of a local, seekable copy of the shard at ``url``, waited for.

        Raises:
            ShardError: it could not be fetched.
        """
        if url not in self.numbers:
            yield Path(url)
            return
        worker, number = get_worker_info(), self.numbers[url]
        reader = worker.id if worker else 0
        self.at[reader] = number
        try:
            pause = Event()
            while self.states[number] == _AWAITED:
                pause.wait(_LOOK)
            if self.states[number] == _LOST:
                raise ShardError(self._reason(number))
            if self.states[number] == _BROKEN:
                raise RuntimeError(f"fetching a shard failed:\n{self._reason(number)}")
            yield self.path(number)
        finally:
            self.at[reader] = number + 1

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return Path(self.folder) / f"{number:06d}.tar"

    def said(self, number: int) -> Path:
        """Where it is written why a shard is not there."""
        return self.path(number).with_suffix(".error")

    def _reason(self, number: int) -> str:
        with suppress(OSError):
            return self.said(number).read_text(encoding="utf-8")
        return f"the shard is lost, and there was no room in {self.folder} to say why"


class Fetcher:
    """Fetches the shards of a rank in their order, in threads of the rank's process.

    Ahead of the readers, so that neither the model nor the line waits for the other; bounded, so that
    what lies on the disk does not depend on the size of the data set. Entered, it fetches; left, it
    stops, and everything is as before.

    Args:
        shards: what the rank reads; those that can be read where they are are left alone.
        readers: how many loader workers read every shard, or 1.
        limits: when a fetch is given up.
        ahead: how far ahead it fetches.
    """

    def __init__(self, shards: Sequence[str], readers: int, limits: Limits, ahead: Ahead) -> None:
        self.urls = [url for url in shards if needs_spool(url)]
        self.limits = limits
        self.ahead = ahead
        self._folder = SpoolFolder() if self.urls else None
        self.spool = Spool(str(self._folder.path) if self._folder else "", self.urls, readers)
        self._lock = Lock()
        self._stop = Event()
        self._threads: list[Thread] = []
        self._begun = self._dropped = 0
        self._sizes: dict[int, int] = {}  # of those that have come; 0 of lost ones
        self._largest = 0

    def __enter__(self) -> None:
        self._stop.clear()
        count = self.ahead.connections if self.urls else 0
        self._threads = [Thread(target=self._work, name="fetch", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        for number in range(self._dropped, self._begun):
            self.spool.path(number).unlink(missing_ok=True)
            self.spool.said(number).unlink(missing_ok=True)
        self._begun = self._dropped = 0
        self._sizes = {}
        for shared in (self.spool.states, self.spool.at):
            shared[:] = [0] * len(shared)

    def close(self) -> None:
        """Stop, and remove the folder."""
        self.__exit__()
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def progress(self) -> list[tuple[str, int]]:
        """Names and sizes of all files: they change while shards arrive."""
        found: list[tuple[str, int]] = []
        with suppress(OSError):  # the folder is gone
            for entry in os.scandir(self.spool.folder) if self.spool.folder else ():
                with suppress(OSError):  # it was read meanwhile
                    found.append((entry.name, entry.stat().st_size))
        return sorted(found)

    def _work(self) -> None:
        while (number := self._next()) is not None:
            try:
                self._bring(number)
            except FetchStopped:
                return
            except ShardError as error:
                self._tell(number, _LOST, str(error))
            except BaseException:
                self._tell(number, _BROKEN, traceback.format_exc())

    def _next(self) -> int | None:
        """The shard to fetch now, waited for; None if there is nothing left to do."""
        while not self._stop.is_set():
            with self._lock:
                self._drop()
                if self._begun < len(self.urls) and self._has_room():
                    self._begun += 1
                    return self._begun - 1
                if self._dropped == len(self.urls):
                    return None
            self._stop.wait(_LOOK)
        return None

    def _drop(self) -> None:
        """Delete what all readers have read."""
        while self._dropped < min(self.spool.at):
            with suppress(OSError):  # then it takes room until the end
                self.spool.path(self._dropped).unlink()
            self._sizes.pop(self._dropped, None)
            self._dropped += 1

    def _has_room(self) -> bool:
        """Whether another shard may be begun: one as large as the largest of those held must fit."""
        if self._begun > max(self.spool.at) + self.ahead.shards:
            return False
        if self._begun == self._dropped:
            return True
        if not self._largest:
            return False  # none has come yet, so nobody knows how large they are
        arriving = self._begun - self._dropped - len(self._sizes)
        return sum(self._sizes.values()) + (arriving + 1) * self._largest <= self.ahead.bytes

    def _bring(self, number: int) -> None:
        url, path = self.urls[number], self.spool.path(number)
        others = self._dropped < number
        try:
            fetch(url, path, self.limits, self._stop)
        except NoRoom:
            if not others:
                raise
            self._wait_for_readers(number)
            fetch(url, path, self.limits, self._stop)
        self._tell(number, _THERE, size=path.stat().st_size)

    def _wait_for_readers(self, number: int) -> None:
        """Wait until those before a shard are dropped, which makes room on the disk."""
        while self._dropped < number:
            with self._lock:
                self._drop()
            if self._stop.wait(_LOOK):
                raise FetchStopped

    def _tell(self, number: int, state: int, said: str = "", size: int = 0) -> None:
        """Let the readers know what became of a shard."""
        if said:
            with suppress(OSError):  # whatever happens here, nobody may wait for ever
                self.spool.said(number).write_text(said, encoding="utf-8", errors="replace")
        with self._lock:
            self._sizes[number] = size
            self._largest = max(self._largest, size)
        self.spool.states[number] = state


class SpoolFolder:
    """A temporary folder that lives no longer than its process, even if that is killed.

    A killed process can't clear up; so each start clears what no living process owns. Owning is an
    open, locked file inside the folder: the system drops the lock with the last process that has it
    open, the owner or one of its loader workers.
    """

    def __init__(self) -> None:
        self._lost: dict[str, ShardError] = {}
        base = Path(tempfile.gettempdir())
        for abandoned in base.glob(f"{_PREFIX}*"):
            _clear(abandoned)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._lock = os.open(self.path / _OWNER, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / _OWNER).exists():
                return
            os.close(self._lock)  # another process took it for abandoned before it was locked

    @contextmanager
    def fetched(self, url: str) -> Iterator[Path]:
        """Path of a local, seekable copy of the shard at ``url``, fetched now if need be.

        Raises:
            ShardError: it could not be fetched, now or before.
        """
        if not needs_spool(url):
            yield Path(url)
            return
        if url in self._lost:
            raise self._lost[url]
        path = self.path / "shard.tar"
        try:
            fetch(url, path)
            yield path
        except ShardError as error:
            self._lost[url] = error
            raise
        finally:
            path.unlink(missing_ok=True)

    def cleanup(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _clear(folder: Path) -> None:
    """Delete a spool folder if nobody owns it; another user's is left alone."""
    with suppress(OSError):
        lock = os.open(folder / _OWNER, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
