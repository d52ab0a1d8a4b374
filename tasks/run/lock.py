"""Who works in a run's folder: jobs that would do the same shards keep out of each other's way."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from filelock import lock_descriptor

from tasks.run.errors import RunError

log = logging.getLogger(__name__)

_BEGUN = ".partial"  # ends the name of a lock file that is not locked yet
_TRIES = 5  # jobs that begin at the same moment see each other, and all step back


@dataclass(frozen=True)
class Job:
    """A process that works in a run's folder, on every ``parts``-th shard from ``part`` on."""

    host: str
    pid: int
    since: str
    part: int
    parts: int

    @classmethod
    def this(cls, part: int, parts: int) -> Job:
        """This process."""
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(socket.gethostname(), os.getpid(), now, part, parts)

    def overlaps(self, other: Job) -> bool:
        """Whether both do some shard, were there enough of them."""
        return (self.part - other.part) % math.gcd(self.parts, other.parts) == 0

    def __str__(self) -> str:
        part = f", part {self.part} of {self.parts}" if self.parts > 1 else ""
        return f"process {self.pid} on {self.host}, since {self.since}{part}"


class FolderLock:
    """A hidden file that says who works in a folder, locked for as long as that process lives.

    The lock is the operating system's (flock): it ends with its process, whatever ends that. Linux
    makes it a lock of the server's on NFS, which needs the file open for writing, as it is here; so it
    holds between machines, unless the file system is mounted with local locks (NFS: ``nolock``,
    ``local_lock=flock`` or ``all``; Lustre: ``localflock``, or without ``flock``).

    Args:
        folder: of the run; exists.
        job: who wants it.
        alone: refuse every other job, not only those that do the same shards.

    Raises:
        RunError: another job has the folder; says which.
    """

    def __init__(self, folder: Path, job: Job, *, alone: bool = False) -> None:
        self.folder = folder
        self.path = folder
        self._file: int | None = None
        for turn in range(1, _TRIES + 1):
            self._enter(job)
            rivals = [other for other in self.others() if alone or job.overlaps(other)]
            if not rivals:
                return
            self.release()
            if turn < _TRIES:
                time.sleep(random.uniform(0.05, 0.2) * turn)
        raise RunError(
            f"{folder} is in use by another job ({rivals[0]}): wait until it is done, stop it, or choose "
            "another --writer.output"
        )

    def _enter(self, job: Job) -> None:
        # Locked before it has its name: nobody may take it for one that a dead process left. Until it
        # is locked it may be taken for one, and be removed; then another is made.
        while self._file is None:
            self.path = self.folder / f".job-{uuid.uuid4().hex[:12]}"
            hidden = self.path.with_name(f"{self.path.name}{_BEGUN}")
            file = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(file, json.dumps(asdict(job)).encode())
            if self._lock(file) and _renamed(hidden, self.path):
                self._file = file
                _opened.add(file)
            else:
                os.close(file)

    def _lock(self, file: int) -> bool:
        """Whether nobody else has an open file locked."""
        try:
            return lock_descriptor(file, blocking=False)
        except OSError as error:
            log.warning(
                "%s can't be locked (%s): see to it that no second run writes there",
                *(self.folder, error),
            )
            return True

    def others(self) -> list[Job]:
        """The other jobs in the folder that are alive; what dead ones left is removed."""
        found = {p: _holder(p) for p in sorted(self.folder.glob(".job-*")) if p != self.path}
        # One that only begins will look for us.
        return [job for path, job in found.items() if job and path.suffix != _BEGUN]

    def release(self) -> None:
        """Leave the folder, and nothing in it that dead jobs left."""
        if self._file is not None:
            with suppress(OSError):  # its folder may be gone
                self.path.unlink()
                self.others()
            _opened.discard(self._file)
            os.close(self._file)
            self._file = None


def _renamed(path: Path, to: Path) -> bool:
    """Rename a file; whether it was still there."""
    try:
        path.rename(to)
    except FileNotFoundError:
        return False
    return True


def _holder(path: Path) -> Job | None:
    """The living process that holds a lock file; removes one that nobody holds."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        if lock_descriptor(file, blocking=False):
            path.unlink(missing_ok=True)
            return None
        return Job(**json.loads(os.read(file, 1 << 12)))
    except OSError:  # no locks here: nothing can be known
        return None
    except (ValueError, TypeError):  # somebody holds it, whoever that is
        return Job("an unknown machine", 0, "an unknown time", 0, 1)
    finally:
        os.close(file)


_opened: set[int] = set()
"""Lock files that this process has open."""


def _forget() -> None:
    """Close the locks in a process that was forked: loader workers may outlive their parent a little."""
    for file in _opened:
        with suppress(OSError):
            os.close(file)
    _opened.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
