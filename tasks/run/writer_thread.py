"""Output shards written beside the model: images encoded on several threads, all else on one."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from tasks.run.image import ImageResult
from tasks.run.shard import OutputShard

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")


class WriterThread:
    """Adds batches to output shards and publishes these, in the order given, on a thread of its own.

    So the model goes on with the next shard while the last one is written. What fails is raised here,
    by the next call or by `finish`; of what was handed over after it, nothing is written.

    Args:
        encoders: threads that encode the images of a batch.
        waiting: batches that may wait; whoever hands over one more waits itself.
    """

    def __init__(self, encoders: int = 1, waiting: int = 2) -> None:
        self.encoders = encoders
        self.waiting = waiting
        self._pending: deque[Future[None]] = deque()
        self._unfinished: list[Future[None]] = []
        self._failed = False
        self._thread: ThreadPoolExecutor | None = None
        self._pool: ThreadPoolExecutor | None = None

    def add(self, shard: OutputShard, results: Sequence[ImageResult]) -> None:
        """Hand over the results of some images."""
        self._unfinished.append(
            self._hand_over(shard, lambda: shard.add(results, self._encode_each))
        )

    def publish(self, shard: OutputShard, states: Callable[[], dict[str, Tensor]]) -> None:
        """Hand over a shard that is whole, and the states of what was measured on it."""
        self._hand_over(shard, lambda: shard.publish(states()))
        self._unfinished.clear()

    def finish(self) -> None:
        """Wait until all is written."""
        while self._pending:
            self._pending.popleft().result()

    def drop(self) -> None:
        """Publish the shards that are whole, forget what waits of the others, and end the threads."""
        for future in self._unfinished:
            future.cancel()
        wait(self._pending)
        for future in self._pending:
            if not future.cancelled() and (error := future.exception()):
                log.error("a shard could not be written: %s", error)
        self._pending.clear()
        self._unfinished.clear()
        self._failed = False
        for pool in filter(None, (self._thread, self._pool)):
            pool.shutdown()
        self._thread = self._pool = None

    def _hand_over(self, shard: OutputShard, call: Callable[[], None]) -> Future[None]:
        while len(self._pending) > self.waiting:
            self._pending.popleft().result()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "writer")
        self._pending.append(self._thread.submit(self._run, shard, call))
        return self._pending[-1]

    def _run(self, shard: OutputShard, call: Callable[[], None]) -> None:
        if self._failed:
            shard.abandon()
            return
        try:
            _without_gradients(call)
        except BaseException:
            self._failed = True
            shard.abandon()
            raise

    def _encode_each(self, encode: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
        """`map`, on the encoders' threads."""
        if self.encoders == 1 or len(items) < 2:
            return map(encode, items)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.encoders, "encoder")
        return self._pool.map(partial(_without_gradients, encode), items)


def _without_gradients(call: Callable[..., T], *args: object) -> T:
    with torch.inference_mode():  # which Lightning only has set for the main thread
        return call(*args)
