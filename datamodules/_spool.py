"""Shards of one rank: taken and fetched ahead of those who read them, dropped when all have."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from torch.utils.data import get_worker_info

from common.errors import UserError
from datamodules._fetch import FetchStopped, Limits, NoRoom, fetch
from datamodules._handout import Handout
from datamodules._remote import needs_spool
from datamodules._samples import Batch
from datamodules._tar import ShardError

log = logging.getLogger(__name__)

_LOOK = 0.02  # seconds between two looks at what others do
_PREFIX = "clip_surgery_shards_"
_OWNER = "owner.lock"
_PATIENCE = 5.0  # seconds for a thread to end in
_UNKNOWN, _END = 0, -1  # in place of a shard's number, counted from 1
_AWAITED, _THERE, _LOST, _STOPPED, _BROKEN = range(5)  # states of a shard


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

    Iterated over, the (name, path or URL) of each shard of the rank, the same for all readers: waited
    for, where it has yet to be taken.

    Args:
        folder: where shards lie while they are read.
        shards: (name, path or URL) of all that the rank may read.
        readers: how many loader workers read every shard of the rank, or 1.
    """

    def __init__(self, folder: str, shards: Sequence[tuple[str, str]], readers: int) -> None:
        self.folder = folder
        self.shards = shards
        # Shared with the loader workers; one writer each, so no lock that a killed one could hold.
        self.order: Any = RawArray("q", len(shards) + 1)  # numbers of the rank's shards
        self.states: Any = RawArray("q", len(shards) + 1)  # of the rank's first shard, second, ...
        self.at: Any = RawArray("q", readers)  # which of them each reader reads, or wants

    def __iter__(self) -> Iterator[tuple[str, str]]:
        reader, number = _reader(), 0
        while True:
            self.at[reader] = number
            self._wait(self.order, number)
            if self.order[number] == _END:
                return
            yield self.shard(number)
            number += 1

    @contextmanager
    def local(self, url: str) -> Iterator[Path]:
        """Path of a local, seekable copy of the shard that a reader has come to, waited for.

        Raises:
            ShardError: it could not be fetched.
        """
        if not needs_spool(url):
            yield Path(url)
            return
        number = self.at[_reader()]
        self._wait(self.states, number)
        if self.states[number] == _LOST:
            raise ShardError(self._reason(number))
        yield self.path(number)

    def shard(self, number: int) -> tuple[str, str]:
        """One of the rank's shards, counted in the order in which it reads them."""
        return self.shards[self.order[number] - 1]

    def known(self) -> tuple[list[str], bool]:
        """Names of the rank's shards, as far as they are known, and whether there may be more."""
        names: list[str] = []
        for which in self.order:
            if which in (_UNKNOWN, _END):
                break
            names.append(self.shards[which - 1][0])
        return names, which != _END

    def path(self, number: int) -> Path:
        """Where a shard lies."""
        return Path(self.folder) / f"{number:06d}.tar"

    def said(self, number: int) -> Path:
        """Where it is written why a shard is not there."""
        return self.path(number).with_suffix(".error")

    def _wait(self, values: Any, number: int) -> None:
        """Wait until one of the shared values is set.

        Raises:
            UserError: another process of the run is gone.
            RuntimeError: a fault of ours.
        """
        pause = Event()
        while not values[number] and self.states[number] not in (_STOPPED, _BROKEN):
            pause.wait(_LOOK)
        if self.states[number] == _STOPPED:
            raise UserError(self._reason(number))
        if self.states[number] == _BROKEN:
            raise RuntimeError(f"fetching a shard failed:\n{self._reason(number)}")

    def _reason(self, number: int) -> str:
        with suppress(OSError):
            return self.said(number).read_text(encoding="utf-8")
        return f"the shard is lost, and there was no room in {self.folder} to say why"


def _reader() -> int:
    worker = get_worker_info()
    return worker.id if worker else 0


class Fetcher:
    """Takes a rank's shards and fetches them in their order, in threads of the rank's process.

    Fetches ahead of the readers, so that neither the model nor the line waits for the other; bounded, so
    that what lies on the disk does not depend on the size of the data set. Entered, it works; left, it
    stops, and everything is as before. Has no threads where the shards are all there, and all the rank's.

    Args:
        shards: (name, path or URL) of all that the rank may read; those that can be read where they are
            are not fetched.
        handout: which of them it reads; None: all.
        readers: how many loader workers read every shard of the rank, or 1.
        limits: when a fetch is given up.
        ahead: how far ahead it fetches.
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, str]],
        handout: Handout | None,
        readers: int,
        limits: Limits,
        ahead: Ahead,
    ) -> None:
        remote = any(needs_spool(url) for _, url in shards)
        self.handout = handout
        self.limits = limits
        self.ahead = (
            ahead if remote else replace(ahead, shards=0, connections=int(handout is not None))
        )
        self._folder = SpoolFolder() if self.ahead.connections else None
        self.spool = Spool(str(self._folder.path) if self._folder else "", shards, readers)
        self._lock = Lock()
        self._stop = Event()
        self._threads: list[Thread] = []
        self._largest = 0
        self._reset()

    def _reset(self) -> None:
        self._begun = self._dropped = self._used = 0
        self._all_taken = False
        self._sizes: dict[int, int] = {}  # of those that have come; 0 of lost and of local ones
        for shared in (self.spool.order, self.spool.states, self.spool.at):
            shared[:] = [0] * len(shared)
        if self.handout is None:
            self.spool.order[:] = [*range(1, len(self.spool.shards) + 1), _END]

    def __enter__(self) -> None:
        self._stop.clear()
        count = self.ahead.connections
        self._threads = [Thread(target=self._work, name="fetch", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_PATIENCE)
        self._threads = []
        for number in range(self._dropped, self._begun):
            self.spool.path(number).unlink(missing_ok=True)
            self.spool.said(number).unlink(missing_ok=True)
        self._reset()

    def close(self) -> None:
        """Stop, and remove the folder."""
        self.__exit__()
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def received(self, batch: Batch) -> None:
        """Take note of a batch that the model gets now."""
        self._used += batch.last

    def progress(self) -> list[tuple[str, int]]:
        """Names and sizes of all files: they change while shards arrive."""
        found: list[tuple[str, int]] = []
        with suppress(OSError):  # the folder is gone
            for entry in os.scandir(self.spool.folder) if self.spool.folder else ():
                with suppress(OSError):  # it was read meanwhile
                    found.append((entry.name, entry.stat().st_size))
        return sorted(found)

    def _work(self) -> None:
        try:
            while (number := self._next()) is not None:
                try:
                    self._bring(number)
                except FetchStopped:
                    return
                except ShardError as error:
                    self._tell(number, _LOST, str(error))
                except BaseException:
                    self._tell(number, _BROKEN, traceback.format_exc())
        except UserError as error:  # another process of the run is gone
            self._tell(self._begun, _STOPPED, str(error))
        except BaseException:
            self._tell(self._begun, _BROKEN, traceback.format_exc())

    def _next(self) -> int | None:
        """The shard to fetch now, waited for; None if there is nothing left to do."""
        while not self._stop.is_set():
            with self._lock:
                self._drop()
                while not self._all_taken and self._has_room() and self._may_take():
                    number = self._begun
                    self._take(number)
                    if self._all_taken:
                        break
                    self._begun += 1
                    if needs_spool(self.spool.shard(number)[1]):
                        return number
                    self._sizes[number] = 0
                if self._all_taken and self._dropped == self._begun:
                    return None
            self._stop.wait(_LOOK)
        return None

    def _take(self, number: int) -> None:
        """Make sure that it is known which shard this one is."""
        if self.spool.order[number] == _UNKNOWN and self.handout is not None:
            taken = self.handout.take()
            self.spool.order[number] = _END if taken is None else taken + 1
        self._all_taken = self.spool.order[number] == _END

    def _may_take(self) -> bool:
        """Whether the next shard may be this rank's, or others need it more."""
        waiting = self._begun - self._used  # the model has begun with none of these
        return self.handout is None or waiting <= 0 or self.handout.allows(waiting)

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
        arriving = self._begun - self._dropped - len(self._sizes)
        if arriving and not self._largest:
            return False  # none has come yet, so nobody knows how large they are
        return sum(self._sizes.values()) + (arriving + 1) * self._largest <= self.ahead.bytes

    def _bring(self, number: int) -> None:
        url, path = self.spool.shard(number)[1], self.spool.path(number)
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
