"""Commands as processes of their own: started, slowed down, watched and waited for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def devices(ranks: int) -> list[str]:
    return [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"] if ranks > 1 else []


def start(words: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A command as the first process of a group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "tasks", *words],
        env=env or slowly(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )


def _heed_signals() -> None:
    """In a script's background, or under nohup, these are ignored, and so they would be by this one."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def alive(group: int) -> set[int]:
    """The living processes of a group."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, its = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its) == group and state != "Z":
                found.add(int(path.parent.name))
    return found


def local_rank(pid: int) -> int:
    """Which rank a process is, or works for; 0 for the first one's."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(v[11:]) for v in variables if v.startswith(b"LOCAL_RANK=")), 0)


def heeds(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a process has a handler of its own for a signal; Python's is there from the start."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1) and bool(caught >> (number - 1) & 1)


def slowly() -> dict[str, str]:
    """An environment in which every batch takes at least half a second."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "slow")}


def wait_for(run: Path, process: subprocess.Popen[Any]) -> None:
    """Until the first output shard is there."""
    while not list(run.glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.05)
