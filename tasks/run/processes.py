"""Where the processes of a run wait for each other, and how they part."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer

from common import signals
from tasks.run.errors import RunError

log = logging.getLogger(__name__)

NOTICE = 30.0  # seconds between two lines about a wait
_LOOK = 0.1  # seconds between two looks at what is waited for
_ECHO = 20  # looks in which the signal that ended another process must have come here too


@contextmanager
def told_of_gathering(trainer: Trainer) -> Iterator[None]:
    """Say what is waited for, as long as not all processes of a run have been started."""
    over = threading.Event()

    def tell() -> None:
        waited = 0.0
        while not over.wait(NOTICE) and not dist.is_initialized():
            waited += NOTICE
            log.warning(
                "waiting %.0f s for all %d processes of the run, on %d nodes: each node needs the "
                "same command, with MASTER_ADDR, MASTER_PORT and its own NODE_RANK set (torchrun and "
                "srun do so)",
                *(waited, trainer.world_size, trainer.num_nodes),
            )

    if trainer.world_size > 1 and _store_is_used_up():
        raise RunError(
            "torchrun started this process again, and torch would give it the addresses of processes "
            "that have ended: run `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend=c10d "
            "...`, so that each start has a store of its own"
        )
    if trainer.world_size > 1 and trainer.is_global_zero:
        threading.Thread(target=tell, name="gathering", daemon=True).start()
    try:
        yield
    except dist.DistError as error:
        if dist.is_initialized():
            raise
        said = " ".join(str(error).split())[:200]
        raise RunError(
            f"the {trainer.world_size} processes of the run didn't find each other ({said})"
        ) from None
    finally:
        over.set()


def _store_is_used_up() -> bool:
    """Whether torchrun's store still holds what processes before this one left in it.

    It shares the store with all that it starts one after the other, and torch no longer keeps their
    entries apart (pytorch's issue 135712): they would fail to connect, or wait for ever.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shared and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


class Processes:
    """All processes of a run, seen from one of them; a single one has nobody to wait for."""

    def __init__(self) -> None:
        self.group: Any = None

    def connect(self, trainer: Trainer) -> None:
        """Make a group of all processes, whatever they compute on.

        Shards differ in cost: a rank may be done hours before another, longer than the default
        group would let it wait at the end.
        """
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

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
            while not barrier.is_completed() and not signals.reason():
                time.sleep(_LOOK)
            if barrier.is_completed():
                barrier.wait()
                return
        except RuntimeError as error:  # gloo's, of a connection that was closed
            broken = str(error)[:200]
        for _ in range(_ECHO):  # a stop wins over what it causes
            signals.check()
            time.sleep(_LOOK)
        raise _broke_off(broken)


def shared_counts(trainer: Trainer) -> Callable[[str, int], int] | None:
    """What adds to a number that all processes share, 0 at first, and returns it, from any thread.

    The numbers have names. They are kept in the store by which the processes found each other, and are
    new ones with each call, which all processes make.

    Returns:
        None if there is only one process.
    """
    if trainer.world_size == 1:
        return None
    these = trainer.strategy.broadcast(uuid.uuid4().hex, src=0)
    store = dist.distributed_c10d._get_default_store()

    def add(number: str, amount: int) -> int:
        try:
            return store.add(f"{these}/{number}", amount)
        except RuntimeError as error:  # of a connection that was closed
            time.sleep(_ECHO * _LOOK)  # a stop of the main thread wins over what it causes
            raise _broke_off(str(error)[:200]) from None

    return add


def _broke_off(how: str) -> RunError:
    return RunError(
        f"another process of the run broke off ({how}). Finished shards are kept: run the same command "
        "again to go on"
    )


def leave_group() -> None:
    """Leave the other processes; else gloo's threads may abort this one as it exits."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # the others may be gone
            dist.destroy_process_group()


def leave_at_once(code: int) -> None:
    """End this process, if it is one of several, after something went wrong.

    What it began with the others may never be done: gloo's threads would wait for it, in
    `destroy_process_group` as at the end of Python, as long as those are there.

    Args:
        code: of its exit.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        atexit._run_exitfuncs()  # loader workers, temporary folders
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whoever read it may be gone
                stream.flush()
        os._exit(code)
