"""The processes of a run: whether they were asked to stop, and where they wait for each other."""

from __future__ import annotations

import signal
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

from tasks.run.errors import RunError, Stopped

_LOOK = 0.1  # seconds between two looks at what is waited for


class Processes:
    """All processes of a run, seen from one of them; a single one has nobody to wait for."""

    def __init__(self) -> None:
        self.asked_to_stop = ""
        """Name of the signal that asked this process to stop; empty as long as none did."""
        self.group: Any = None

    def connect(self, trainer: Trainer) -> None:
        """Make a group of all processes, whatever they compute on.

        Shards differ in cost: a rank may be done hours before another, longer than the default
        group would let it wait at the end.
        """
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def listen(self, trainer: Trainer) -> None:
        """Note SIGTERM and SIGUSR1 from now on, and hand them on to processes started from here.

        In place of Lightning's own handler, which would wait inside of it for a broadcast of all
        ranks: a rank that has finished and waits for the others never joins in.
        """

        def note(number: int, frame: Any) -> None:
            launcher = trainer.strategy.launcher
            if not self.asked_to_stop and launcher is not None:
                launcher.kill(number)
            self.asked_to_stop = signal.Signals(number).name

        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGUSR1"):  # Windows lacks the second
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), note)

    def wait(self) -> None:
        """Wait until all processes have come here, for as long as it takes.

        Raises:
            Stopped: this one was asked to stop meanwhile.
            RunError: another one broke off.
        """
        if self.group is None:
            return
        broken = ""
        try:
            barrier = dist.barrier(group=self.group, async_op=True)
            while not barrier.is_completed() and not self.asked_to_stop:
                time.sleep(_LOOK)
            if barrier.is_completed():
                barrier.wait()
                return
        except RuntimeError as error:  # gloo's, of a connection that was closed
            broken = str(error)[:200]
        if self.asked_to_stop:
            raise Stopped(
                f"stopped by {self.asked_to_stop} while waiting for other processes; finished shards "
                "are kept, run again to go on"
            )
        raise RunError(
            f"another process of the run broke off ({broken}). Finished shards are kept: run the same "
            "command again to go on"
        )
