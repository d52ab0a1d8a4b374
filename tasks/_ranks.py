"""The other processes of a run on this machine: started, watched and ended by the first one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from common import signals
from common.errors import UserError
from common.signals import LIFELINE

_LOOK = 0.2  # seconds between two looks at the others
_GRACE = 120.0  # seconds for the batch under way, before a process that was asked to stop is killed
_PATIENCE = 5.0  # seconds for putting things away, once any process of the run has failed
_ECHO = 5  # looks in which the death that broke a connection must show


class Ranks(LightningEnvironment):
    """Starts one process for each further device, in Lightning's place.

    Lightning's own launcher kills all processes, the first one too, without a word, when one of them
    fails; and when the first one dies during its start, the others wait for it. These hold a pipe to
    the first one from their first line on, and end when it closes. When one of them fails, the others
    have a few seconds to drop their shards, whatever they are doing or waiting for.

    Args:
        argv: the words of the command, after ``lightning``.
    """

    def __init__(self, argv: list[str]) -> None:
        super().__init__()
        self.argv = argv
        self.processes: list[subprocess.Popen[bytes]] = []
        self._over = threading.Event()

    @property
    def creates_processes_externally(self) -> bool:
        """Yes, as far as Lightning is concerned: by `start`."""
        return True

    def start(self, trainer: Trainer) -> None:
        """Start the other ranks of this machine, if the Trainer has any and nobody else did."""
        strategy = trainer.strategy
        if (
            not isinstance(strategy, ParallelStrategy)
            or strategy.cluster_environment is not self
            or not isinstance(strategy.launcher, _SubprocessScriptLauncher)
            or "LOCAL_RANK" in os.environ
        ):
            return
        shared = {
            "MASTER_ADDR": self.main_address,
            "MASTER_PORT": str(self.main_port),
            "NODE_RANK": str(self.node_rank()),
            "WORLD_SIZE": str(trainer.world_size),
        }
        theirs: tuple[int, ...] = ()
        if os.name == "posix":
            end = signals.open_lifeline()
            theirs, shared[LIFELINE] = (end,), str(end)
        with signals.blocked():
            for rank in range(1, trainer.num_devices):
                env = {**os.environ, **shared, "LOCAL_RANK": str(rank)}
                command = [sys.executable, *_program(), *self.argv]
                self.processes.append(subprocess.Popen(command, env=env, pass_fds=theirs))
        for end in theirs:
            os.close(end)
        signals.hand_on(self._deliver)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def end(self, grace: float = _GRACE) -> None:
        """Let the others end; no later than after so many seconds."""
        self._over.set()
        until = time.monotonic() + grace
        for process in self.processes:
            try:
                process.wait(max(0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def break_off(self, error: BaseException) -> None:
        """Ask the others to end, for what this one met, and wait for it."""
        self._deliver(signal.SIGTERM)
        self.end(_GRACE if isinstance(error, signals.Stopped) else _PATIENCE)

    def failure(self) -> BaseException | None:
        """Why another process ended, if one did: what this one met may come of it."""
        for _ in range(_ECHO if self.processes else 0):
            for rank, process in enumerate(self.processes, 1):
                if code := process.poll():
                    return _reason(rank, code)
            time.sleep(_LOOK)
        return None

    def _deliver(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)

    def _watch(self) -> None:
        while not self._over.wait(_LOOK):
            for rank, process in enumerate(self.processes, 1):
                code = process.poll()
                if code:
                    self._tell(_reason(rank, code))
                    return

    def _tell(self, reason: BaseException) -> None:
        """Stop this process and the others for the end of one of them."""
        signals.interrupt(reason)
        if isinstance(reason, signals.Stopped):
            return  # somebody asked for it, and batches may be finished
        self._deliver(signal.SIGTERM)
        if not self._over.wait(_PATIENCE):
            signals.leave()


def environment(ranks: Ranks | None) -> ClusterEnvironment:
    """Who starts the processes of a run: torchrun, a scheduler, or ``ranks``."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        # Else SIGUSR1 would save a checkpoint; our batch scripts put the job back.
        return SLURMEnvironment(auto_requeue=False)
    for scheduler in (LSFEnvironment, MPIEnvironment):
        if scheduler.detect():
            return scheduler()
    return ranks or LightningEnvironment()


def _reason(rank: int, code: int) -> BaseException:
    """What the end of another rank means for this one."""
    stops = {
        130: signal.SIGINT,
        143: signal.SIGTERM,
        **{-number: number for number in signals.STOP},
    }
    if code in stops:
        return signals.Stopped(stops[code])
    if code > 0:
        return UserError(
            f"process {rank} of the run ended with exit code {code}, for the reason that it gave. "
            "Finished shards are kept"
        )
    how = f"died of {signal.Signals(-code).name}"
    memory = ", often for lack of memory" if code == -getattr(signal, "SIGKILL", 9) else ""
    return UserError(
        f"process {rank} of the run {how}{memory}. Finished shards are kept: run the same command "
        "again to go on"
    )


def _program() -> list[str]:
    """What Python ran to start this process: the installed script, or our package."""
    script = Path(sys.argv[0])
    return [str(script.absolute())] if script.stem == "lightning" else ["-m", "tasks"]
