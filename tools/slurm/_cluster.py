"""A SLURM cluster of two nodes on this machine: its own munge, one controller, two node daemons."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
NODES = ("near", "far")
GPUS = 4
"""That each node claims to have: plain files, since nothing but the scheduler counts them."""
GRACE = 40
"""Seconds that a preempted job has in the usual partition."""

_CONFIG = """\
ClusterName=tried
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that was put back waits until its credential has expired, else for two minutes.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
# Jobs that have ended can be asked for as long as anybody may wait for them.
MinJobAge=3600
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 Gres=gpu:{gpus}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 Gres=gpu:{gpus}
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL PriorityTier=9
"""


class Cluster:
    """Two nodes with the names of `NODES`, more processors than there are, and GPUs that are none.

    Args:
        folder: for everything that the daemons write.

    Raises:
        SystemExit: SLURM is not installed, or does not start.
    """

    def __init__(self, folder: Path) -> None:
        if missing := [name for name in PROGRAMS if not shutil.which(name)]:
            raise SystemExit(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
        self.folder = folder
        folder.mkdir(mode=0o700)
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        for number in range(GPUS):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        config = _CONFIG.format(
            folder=folder,
            host=socket.gethostname(),
            user=pwd.getpwuid(os.getuid()).pw_name,
            ports=_free_ports(3),
            nodes=NODES,
            gpus=GPUS,
            grace=GRACE,
        )
        (folder / "slurm.conf").write_text(config)
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        files = ("key-file=munge.key", "socket=munge.sock", "pid-file=munged.pid")
        files += ("log-file=munged.log", "seed-file=munged.seed")
        words = [f"--{name}={self.folder / file}" for name, file in (f.split("=") for f in files)]
        try:
            self._start("munged", "--force", *words)
            self._start("slurmctld")
            for node in NODES:
                self._start("slurmd", "-N", node)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if (self.folder / "slurmctld.pid").exists():
            self.call("scancel", f"--user={os.getuid()}", check=False)
            # Daemons that are told to end in the middle of a job leave its processes behind.
            self._wait(lambda: not self.call("squeue", "--noheader", check=False))
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munged"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                process = int(path.read_text())
                os.kill(process, signal.SIGTERM)
                self._wait(partial(_is_gone, process))

    def call(self, *words: str, check: bool = True) -> str:
        """What a command of SLURM's prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def submit(self, script: Path, options: Sequence[str], words: Sequence[str], log: Path) -> str:
        """Put a batch script into the queue; returns the job's number."""
        return self.call(
            "sbatch", "--parsable", f"--output={log}", *options, str(script), *words
        ).split(";")[0]

    def states(self, job: str) -> list[str]:
        """The states of a job, or of all jobs of an array."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job)
        return [word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")]

    def restarts(self, job: str) -> int:
        """How often a job, or those of an array, were put back and started again."""
        shown = self.call("scontrol", "show", "job", "--oneliner", job)
        return sum(
            int(word.partition("=")[2]) for word in shown.split() if word.startswith("Restarts=")
        )

    def _start(self, *words: str) -> None:
        # Daemons keep what they are given: not the pipe that somebody reads this script's words from.
        log = self.folder / f"{words[0]}.start"
        with open(log, "a") as file:
            done = subprocess.run(words, env=self.environment, stdout=file, stderr=file, timeout=60)
        if done.returncode:
            raise SystemExit(f"{words[0]} did not start: {log.read_text()[-2000:]}")

    def _wait_for_nodes(self) -> None:
        words = ("sinfo", "--Node", "--noheader", "--format=%T")
        if not self._wait(lambda: set(self.call(*words, check=False).split()) == {"idle"}):
            raise SystemExit(f"the nodes did not come up, see {self.folder}/*.log")

    def _wait(self, reached: Callable[[], bool], limit: float = 60) -> bool:
        """Whether something came to be so, within some seconds."""
        until = time.monotonic() + limit
        while not reached():
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True


def _is_gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"  # not every machine's first process looks after those that have ended


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports
