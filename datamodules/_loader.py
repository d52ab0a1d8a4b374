"""Batches from loader processes: how these start and end, and how long they are waited for."""

from __future__ import annotations

import atexit
import errno
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from common import signals
from common.errors import UserError
from datamodules._samples import Batch

log = logging.getLogger(__name__)

NOTICE = 60.0  # seconds between two lines about a wait
_LOOK = 1.0  # seconds between two looks at what is waited for
_DEATH = 5.0  # seconds in which the end of a process must show, after it closed its connections


class LoaderError(UserError):
    """The loader processes can't go on; the message says why and what to do."""


class BatchLoader:
    """The batches of a stream, made here or by worker processes, in the order of the stream.

    In place of a bare DataLoader, which leaves workers to signals that are meant for the run, waits
    forever where a worker's batch gets lost on its way, and tells of their end in ten ways.

    Args:
        stream: makes the batches; asks torch which worker of how many it is.
        workers: how many processes make them; 0 for none but this one.
        timeout: seconds without a batch, and without a sign of life, after which the run ends.
        give_way: whether workers leave the cores to this process, where both want them.
        pin_memory: whether to copy batches where a GPU fetches them from.
        expected: what comes after the given batch (None at the beginning), in words.
        moving: a value that changes as long as workers come nearer to the next batch.
        received: called with each batch, before it is used.
        beside: entered once the workers have been started, left with the last batch: what starts threads,
            which forked processes must not inherit.
    """

    def __init__(
        self,
        stream: IterableDataset[Batch],
        workers: int,
        *,
        timeout: float,
        give_way: bool = False,
        pin_memory: bool = False,
        expected: Callable[[Batch | None], str] = lambda last: "the next batch",
        moving: Callable[[], object] = lambda: None,
        received: Callable[[Batch], None] = lambda batch: None,
        beside: AbstractContextManager[object] | None = None,
    ) -> None:
        self.stream = stream
        self.workers = workers
        self.timeout = timeout
        self.give_way = give_way
        self.pin_memory = pin_memory
        self.expected = expected
        self.moving = moving
        self.received = received
        self.beside = beside or nullcontext()
        self._workers: list[BaseProcess] = []

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            _Told(self.stream) if self.workers else self.stream,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            worker_init_fn=partial(_begin_worker, self.give_way),
            pin_memory=self.pin_memory,
        )
        before = multiprocessing.active_children()
        with signals.blocked(), _keep_handler():
            batches = iter(loader)
        workers = [w for w in multiprocessing.active_children() if w not in before]
        self._workers = workers
        atexit.register(self.close)  # before multiprocessing waits for them
        watch = _Watch(self.timeout, self.moving, partial(_kill, workers))
        try:
            with self.beside:
                yield from self._received(batches, workers, watch)
        finally:
            self.close()
            watch.close()
            atexit.unregister(self.close)

    def _received(
        self, batches: Iterator[Any], workers: list[BaseProcess], watch: _Watch
    ) -> Iterator[Batch]:
        last: Batch | None = None
        while True:
            try:
                with signals.interruptible(), watch.waiting(self.expected(last)):
                    last = next(batches, None)
            except Exception as error:
                if not workers:
                    raise
                raise _reason(error, workers, watch) from error
            if last is None:
                return
            if isinstance(last, _Failure):
                raise last.error from RuntimeError(f"in a loader worker:\n{last.traceback}")
            self.received(last)
            yield last

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        _kill(self._workers)
        for worker in self._workers:
            worker.join(_DEATH)
        self._workers = []


def cores_of_rank(ranks: int) -> int:
    """Cores that one of the ranks on this machine may take.

    Args:
        ranks: how many there are here.
    """
    if not hasattr(os, "sched_getaffinity"):
        return (os.cpu_count() or 1) // ranks
    cores = len(os.sched_getaffinity(0))
    on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    # Fewer than the node has: SLURM has given each rank cores of its own.
    return cores if cores < on_node else cores // ranks


class _Watch:
    """Tells the user of a long wait, and ends one that is too long.

    Counts looks, not the clock: a process that was halted for a while has not waited.
    """

    def __init__(self, timeout: float, moving: Callable[[], object], end: Callable[[], None]):
        self.timeout = timeout
        self.moving = moving
        self.end = end
        self.expected = ""
        self.waited = 0.0
        self.expired = False
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    @contextmanager
    def waiting(self, expected: str) -> Iterator[None]:
        self.waited, self.expected = 0.0, expected
        try:
            yield
        finally:
            self.expected = ""

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        moved, silent = self.moving(), 0.0
        while not self._closed.wait(_LOOK):
            if not self.expected:
                continue
            self.waited += _LOOK
            now = self.moving()
            silent = silent + _LOOK if now == moved and self.waited > _LOOK else 0.0
            moved = now
            if self.waited % NOTICE < _LOOK:
                log.warning("waiting %.0f s for %s", self.waited, self.expected)
            if silent >= self.timeout > 0:
                self.expired = True
                self.end()


class _Failure:
    """An exception of a worker on its way to the process that it works for."""

    def __init__(self, error: Exception) -> None:
        self.traceback = "".join(traceback.format_exception(error))
        try:
            pickle.loads(pickle.dumps(error))
            self.error = error
        except Exception:  # whatever a strange exception does
            self.error = RuntimeError(f"{type(error).__name__}: {error}")


class _Told(IterableDataset[Any]):
    """A stream in a worker, whose exceptions are told to the process that it works for."""

    def __init__(self, stream: IterableDataset[Batch]) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | _Failure]:
        try:
            yield from self.stream
        except Exception as error:
            yield _Failure(error)


def _tell_of_loss(queue: Queue[Any], error: Exception, sent: Any) -> None:
    """Send word of a batch that could not be sent; called in the thread that a queue sends from.

    Args:
        queue: to the process that this one works for.
        error: what was met.
        sent: by torch: the batch's number and the batch.
    """
    if not isinstance(sent, tuple):  # the pipe broke: nobody is there to be told
        return
    if "AF_UNIX path too long" in str(error):
        what = f"set TMPDIR, {tempfile.gettempdir()}, to a shorter path: sockets are made there"
    elif getattr(error, "errno", 0) == errno.EMFILE:
        what = "lift the limit on open files (ulimit -n)"
    else:
        what = (
            "make room in shared memory (/dev/shm; docker run --shm-size), lift a limit on file sizes "
            "(ulimit -f)"
        )
    said = f"a loader worker could not hand over a batch ({error}): {what}, or set --data.num_workers 0"
    failure = LoaderError(said)
    failure.__cause__ = error
    queue.put((sent[0], _Failure(failure)))


def _begin_worker(give_way: bool, number: int) -> None:
    signals.leave_to_parent()
    # Else the batch would be lost, and its reason printed by a thread that nobody hears. The hook is
    # there for `concurrent.futures`; torch has none of its own.
    Queue._on_queue_feeder_error = _tell_of_loss  # type: ignore[attr-defined]
    if give_way and hasattr(os, "nice"):
        os.nice(10)  # the model's threads wait for the slowest one


@contextmanager
def _keep_handler() -> Iterator[None]:
    """Undo torch's handler of SIGCHLD.

    It raises wherever this process is when a worker dies, in the middle of writing a file or of the
    handling of another error; reading from the workers finds it out too.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _reason(error: Exception, workers: list[BaseProcess], watch: _Watch) -> Exception:
    """Why no more batches come, where a DataLoader has raised ``error``."""
    again = "Finished shards are kept: run the same command again to go on"
    if watch.expired:
        return LoaderError(
            f"nothing came for {watch.timeout:.0f} s while waiting for {watch.expected}. Is the source "
            f"of the shards gone? --data.timeout waits longer. {again}"
        )
    code = _exit_code(workers)
    if not code:
        return error
    if code == -signal.SIGKILL:
        how = "was killed, often for lack of memory: fewer --data.num_workers need less"
    elif code == -getattr(signal, "SIGBUS", 0):
        how = (
            "had no shared memory left: make room in /dev/shm (docker run --shm-size), or set fewer "
            "--data.num_workers"
        )
    elif code < 0:
        how = f"ended by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code}"
    return LoaderError(f"a loader worker {how}. {again}")


def _exit_code(workers: list[BaseProcess]) -> int:
    """That of the first worker found to have failed; 0 if none has."""
    # A connection breaks off a moment before its process is seen to have ended.
    for _ in range(int(_DEATH / 0.1)):
        codes = [worker.exitcode for worker in workers if worker.exitcode]
        if codes:
            return codes[0]
        time.sleep(0.1)
    return 0


def _as_it_is(batch: Any) -> Any:
    return batch  # torch's default would turn the batch's tuples into lists
