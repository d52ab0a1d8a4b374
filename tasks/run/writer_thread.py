"""Work beside the model: one thread, one call after the other, and never many of them waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch


class WriterThread:
    """Runs calls in the order given on a thread of its own.

    What a call raises is raised here, by the next `run` or by `finish`.

    Args:
        waiting: calls that may wait; `run` waits itself until one more may.
    """

    def __init__(self, waiting: int = 2) -> None:
        self.waiting = waiting
        self._pending: deque[Future[None]] = deque()
        self._thread: ThreadPoolExecutor | None = None

    def run(self, call: Callable[[], None]) -> None:
        """Hand over a call."""
        while len(self._pending) > self.waiting:
            self._pending.popleft().result()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "writer")
        self._pending.append(self._thread.submit(_without_gradients, call))

    def finish(self) -> None:
        """Wait until all calls are done."""
        while self._pending:
            self._pending.popleft().result()

    def drop(self) -> None:
        """Forget the calls that wait; return once the one under way is done."""
        for future in self._pending:
            future.cancel()
        wait(self._pending)
        self._pending.clear()


def _without_gradients(call: Callable[[], None]) -> None:
    with torch.inference_mode():  # which Lightning only has set for the main thread
        call()
