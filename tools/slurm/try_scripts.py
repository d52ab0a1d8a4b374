"""Run every batch script of this folder under a real SLURM, and compare with a single process.

    apt-get install slurm-wlm munge
    python tools/slurm/try_scripts.py

Sets up a cluster of two nodes on this machine (`_cluster.py`), draws scenes, explains them in one
process, and then as jobs: on one node, on two, as an array, and disturbed by what schedulers do: the
time limit with SIGUSR1, preemption with a grace time, signals for the script and for the tasks, an end
for good. Jobs that will be disturbed hold in the middle of a shard until then (`_held.py`), so that they
are at work whatever else this machine does. Whatever happened, every output shard and metrics.json must
be byte-identical to the single process's.
Nothing here needs a GPU: the jobs ask the scheduler for some that the nodes only claim to have. Takes
some minutes; no part of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _cluster import NODES, Cluster

HERE = Path(__file__).resolve().parent
SHARDS = 12
SHARD_SIZE = 8
LATEST = 600.0
"""Seconds after which a job should be done, on a busy machine."""
ENDS = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}


class Trial:
    """The jobs of one cluster, and what a single process made of the same shards."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.shards = folder / "shapes"
        lightning(
            *("shards", "shapes", "--count", str(SHARDS * SHARD_SIZE)),
            *("--shard-size", str(SHARD_SIZE), "--seed", "3", f"--output={self.shards}"),
        )
        self.single = folder / "single"
        lightning("predict", "--config", *self._words(self.single))

    def _words(self, output: Path) -> list[str]:
        return [
            *("demo.yaml", f"--data.shards={self.shards}", "--data.num_workers=1"),
            *("--data.batch_size=4", "--writer.layout=tar", "--writer.overlays=false"),
            *("--trainer.accelerator=cpu", "--trainer.precision=32-true"),
            *("--trainer.enable_progress_bar=false", f"--writer.output={output}"),
        ]

    def submit(self, name: str, script: str, *options: str, hold: bool = False) -> str:
        """Begin a job, whose run and log are called ``name``; `release` ends what holds it."""
        words = self._words(self.folder / name)
        if hold:
            held = {"class_path": "_held.Held", "init_args": {"until": str(self._release(name))}}
            words.append(f"--trainer.callbacks={json.dumps([held])}")
        log = self.folder / f"{name}.log"
        return self.cluster.submit(HERE / f"{script}.sbatch", options, words, log)

    def _release(self, name: str) -> Path:
        return self.folder / f"{name}.release"

    def release(self, name: str) -> None:
        """Hold a job's processes no longer."""
        self._release(name).touch()

    def at_work(self, name: str, job: str, processes: int) -> None:
        """Wait until a held job has a finished shard of each of its processes."""
        first = f"a first shard of each of {processes} processes"
        self.wait(f"{name}, {first}", lambda: self.finished(name) >= processes, job)
        if self.cluster.restarts(job):
            raise RuntimeError(f"{name} was put back before it had {first}")

    def finished(self, name: str) -> int:
        """Shards of a run that are there."""
        return len(list((self.folder / name).glob("*.tar")))

    def over(self, job: str) -> bool:
        """Whether a job, or all of an array, have ended."""
        return set(self.cluster.states(job)) <= ENDS

    def wait(
        self, what: str, reached: Callable[[], bool], job: str = "", limit: float = LATEST
    ) -> None:
        """Wait until something is so.

        Args:
            what: is waited for.
            reached: whether it is so.
            job: whose end makes it impossible.
            limit: in seconds.

        Raises:
            RuntimeError: the job has ended.
            TimeoutError: it takes too long.
        """
        until = time.monotonic() + limit
        while not reached():
            if job and self.over(job) and not reached():
                states = ", ".join(self.cluster.states(job))
                raise RuntimeError(f"{what}: the job ended before, as {states}")
            if time.monotonic() > until:
                raise TimeoutError(f"{what}: not within {limit:.0f} s")
            time.sleep(0.5)

    def complete(self, name: str, job: str, *, restarts: int) -> list[str]:
        """Wait for the end of a job; what is wrong with it, or with what it made."""
        self.wait(name, lambda: self.over(job))
        faults = [f"ended as {s}" for s in self.cluster.states(job) if s != "COMPLETED"]
        if (found := self.cluster.restarts(job)) != restarts:
            faults.append(f"put back {found} times, not {restarts}")
        return faults + self.differences(name)

    def differences(self, name: str) -> list[str]:
        """Files that are not those of the single process, or words that nobody should see."""
        names = [*sorted(p.name for p in self.single.glob("*.tar")), "metrics.json"]
        run = self.folder / name
        there = [*sorted(p.name for p in run.glob("*.tar")), "metrics.json"]
        faults = [] if names == there else [f"files {there}"]
        faults += [
            f"{file} differs"
            for file in names
            if (run / file).exists()
            and (run / file).read_bytes() != (self.single / file).read_bytes()
        ]
        faults += [f"{path.name} was left" for path in run.glob(".*")]
        log = (self.folder / f"{name}.log").read_text()
        return faults + [f"said {word!r}" for word in ("`srun`", "Traceback") if word in log]


TWO = ("--ntasks-per-node=2", "--cpus-per-task=8")


def one_node(trial: Trial) -> list[str]:
    """Two tasks on one node."""
    return trial.complete("one_node", trial.submit("one_node", "one_node", *TWO), restarts=0)


def several_nodes(trial: Trial) -> list[str]:
    """Two tasks on each of two nodes."""
    job = trial.submit("several_nodes", "several_nodes", *TWO)
    return trial.complete("several_nodes", job, restarts=0)


def array(trial: Trial) -> list[str]:
    """Three independent jobs."""
    return trial.complete("array", trial.submit("array", "array", "--array=0-2"), restarts=0)


def disturbed(
    trial: Trial,
    name: str,
    script: str,
    blow: Callable[[str], object],
    *options: str,
    processes: int,
    jobs: int = 1,
) -> list[str]:
    """A job that something happens to while it is at work: it is put back, and goes on.

    Args:
        trial: of the cluster.
        name: of the run.
        script: the batch script.
        blow: what happens to the job of this number.
        options: of sbatch.
        processes: of the job, each of which finishes a shard first.
        jobs: of an array, that are to be put back.
    """
    job = trial.submit(name, script, *options, hold=True)
    trial.at_work(name, job, processes)
    blow(job)
    trial.wait(f"{name}, put back", lambda: trial.cluster.restarts(job) >= jobs, job)
    trial.release(name)
    return trial.complete(name, job, restarts=jobs)


def time_limit(trial: Trial) -> list[str]:
    """SIGUSR1 for the script before the limit: SLURM sends it up to a minute earlier than told."""
    options = (*TWO, "--time=4", "--signal=B:USR1@60")
    return disturbed(trial, "time_limit", "one_node", lambda job: None, *options, processes=2)


def signal_for_the_script(trial: Trial) -> list[str]:
    """scancel --batch --signal=USR1, two nodes."""

    def blow(job: str) -> None:
        trial.cluster.call("scancel", "--batch", "--signal=USR1", job)

    return disturbed(trial, "signal_for_the_script", "several_nodes", blow, *TWO, processes=4)


def signal_for_the_tasks(trial: Trial) -> list[str]:
    """scancel --signal=TERM, two nodes."""

    def blow(job: str) -> None:
        trial.cluster.call("scancel", "--signal=TERM", job)

    return disturbed(trial, "signal_for_the_tasks", "several_nodes", blow, *TWO, processes=4)


def signal_for_an_array(trial: Trial) -> list[str]:
    """scancel --batch --signal=USR1 for one job of three."""

    def blow(job: str) -> None:
        trial.cluster.call("scancel", "--batch", "--signal=USR1", f"{job}_1")

    return disturbed(trial, "signal_for_an_array", "array", blow, "--array=0-2", processes=3)


def requeued(trial: Trial) -> list[str]:
    """scontrol requeue: SIGTERM, and SIGKILL for what is still there."""

    def blow(job: str) -> None:
        trial.cluster.call("scontrol", "requeue", job)

    return disturbed(trial, "requeued", "one_node", blow, *TWO, processes=2)


def _preempt(trial: Trial) -> None:
    options = ("--partition=urgent", f"--nodes={len(NODES)}", "--exclusive", "--wrap=sleep 1")
    log = trial.folder / "urgent.log"
    trial.cluster.call("sbatch", f"--output={log}", *options)


def preempted(trial: Trial) -> list[str]:
    """A job of a higher partition wants both nodes; the tasks have a grace time."""

    def blow(job: str) -> None:
        _preempt(trial)

    return disturbed(trial, "preempted", "several_nodes", blow, *TWO, processes=4)


def preempted_array(trial: Trial) -> list[str]:
    """The same for independent jobs, which are all put back."""

    def blow(job: str) -> None:
        _preempt(trial)

    name = "preempted_array"
    return disturbed(trial, name, "array", blow, "--array=0-2", processes=3, jobs=3)


def ended_for_good(trial: Trial) -> list[str]:
    """scancel without a signal: not put back, nothing left behind; the same job goes on later."""
    name = "ended_for_good"
    job = trial.submit(name, "one_node", *TWO, hold=True)
    trial.at_work(name, job, 2)
    trial.cluster.call("scancel", job)
    trial.wait(name, lambda: trial.cluster.states(job) == ["CANCELLED"], limit=60)
    faults = ["put back"] if trial.cluster.restarts(job) else []
    return faults + trial.complete(name, trial.submit(name, "one_node", *TWO), restarts=0)


CASES = (
    *(one_node, several_nodes, array, signal_for_the_script, signal_for_the_tasks),
    *(signal_for_an_array, requeued, preempted, preempted_array, time_limit, ended_for_good),
)


def lightning(*words: str) -> None:
    """Run a command of ours, outside of SLURM."""
    done = subprocess.run(["lightning", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lightning {' '.join(words)}: {done.stderr[-2000:]}")


def main() -> int:
    """Run the cases; 1 where one has a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [case.__name__ for case in CASES]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(names)}; all")
    parser.add_argument("--keep", type=Path, help="a new folder for runs and logs, which stay")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(names):
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(names)}")
    # Names of nodes that no name service knows, one thread a process, and `_held` for the jobs.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="slurm_") as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with Cluster(folder.resolve() / "cluster") as cluster:
            trial = Trial(cluster, folder.resolve())
            for case in CASES:
                if args.cases and case.__name__ not in args.cases:
                    continue
                began = time.monotonic()
                try:
                    faults = case(trial)
                except (TimeoutError, RuntimeError) as error:
                    faults = [str(error)]
                    cluster.call("scancel", f"--user={os.getuid()}", check=False)
                failed += bool(faults)
                result = "; ".join(faults) or "the same files"
                seconds = time.monotonic() - began
                print(f"{case.__name__:24}{seconds:6.0f} s  {result}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
