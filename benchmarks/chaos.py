"""Disturb a run again and again, restart it with other world sizes, compare with an undisturbed one.

    python benchmarks/chaos.py --blows 20 --seed 0

A bounded run on the drawn world with a tiny random CLIP. At random moments, half of them while it starts
and half while it works, one of these happens: a random rank or loader worker is killed with SIGKILL; all
processes are sent SIGTERM or SIGINT at once, as a scheduler or a terminal does; one is halted with
SIGSTOP for a while; a second run is started in the same folder. No process may be left, a stop must
end with its exit code, and the second run must be refused. At last the run is finished, and every file
of results must be byte-identical to that of one undisturbed process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 7, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
OF_THE_START = {"run.json", "config.yaml", "jobs.jsonl"}
"""Files that say how and when a run was worked on, not what came out."""

FAULTS = (
    *("processes left", "wrong exit codes", "second runs let in"),
    *("samples lost", "samples doubled", "files differing"),
)
"""Rows of the table that must be 0."""
LATEST = 20.0
"""Seconds after which no process of a killed run may be there any more."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--blows", type=int, default=8, help="how often the run is disturbed")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--shard-size", type=int, default=20)
    parser.add_argument("--max-ranks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the table as json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        table = chaos(Path(name), args, random.Random(args.seed))
    width = max(map(len, table))
    for row, value in table.items():
        print(f"{row:<{width}}  {value}")
    if args.output:
        args.output.write_text(json.dumps(table, indent=1))
    return int(any(table[row] for row in FAULTS))


def chaos(folder: Path, args: argparse.Namespace, choose: random.Random) -> dict[str, int]:
    """The table: what was done to a run, and what that did to its results."""
    (folder / "tiny.json").write_text(json.dumps(TINY))
    counts = ("--count", str(args.samples), "--shard-size", str(args.shard_size))
    complete(lightning(folder, "shards", "shapes", *counts, f"--output={folder / 'shards'}"))
    one, other = folder / "undisturbed", folder / "disturbed"
    began = time.perf_counter()
    run = predict(folder, one.name, ranks=1)
    while not finished(one) and run.poll() is None:
        time.sleep(0.05)
    start = time.perf_counter() - began
    complete(run)
    blows: Counter[str] = Counter(dict.fromkeys(BLOWS, 0))
    moments: Counter[str] = Counter({"at the start": 0, "at work": 0})
    faults: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
    starts = taken_away = 0
    while blows.total() < args.blows:
        if finished(other) == finished(one):  # all done before it was disturbed enough
            for path in choose.sample(sorted(other.glob("*.tar")), (len(finished(one)) + 1) // 2):
                path.unlink()
                taken_away += 1
        before = finished(other)
        run = predict(folder, other.name, ranks=choose.randint(1, args.max_ranks))
        starts += 1
        if choose.random() < 0.5:
            time.sleep(choose.uniform(0.3, start))  # Python itself begins with the first 0.3 s
        else:
            goal = len(before) + choose.randint(1, max(1, len(finished(one) - before) // 2))
            while len(finished(other)) < goal and run.poll() is None:
                time.sleep(0.01)
            time.sleep(choose.uniform(0, 0.5))
        if run.poll() is not None:
            complete(run)
            continue
        kind = choose.choice(list(BLOWS))
        moment = "at work" if finished(other) > before else "at the start"
        with contextlib.suppress(ProcessLookupError):  # it was done at that very moment
            of_this = BLOWS[kind](run, folder, choose)
            if of_this:
                code = run.poll()
                print(f"{kind} {moment}: {of_this}, exit code {code}", file=sys.stderr)
            faults.update(of_this)
            blows[kind] += 1
            moments[moment] += 1
        stop(run)
    complete(predict(folder, other.name, ranks=choose.randint(1, args.max_ranks)))
    return {
        "blows": blows.total(),
        **{f"  {kind}": count for kind, count in blows.items()},
        **{f"  {moment}": count for moment, count in moments.items()},
        "restarts": starts,
        "finished shards taken away": taken_away,
        **faults,
        **compare(one, other),
    }


def kill(what: str, run: subprocess.Popen[bytes], folder: Path, choose: random.Random) -> list[str]:
    """SIGKILL for one process; the others must end by themselves, or, below a worker, with it."""
    victims = [
        pid for pid, kind in {**descendants(run.pid), run.pid: FIRST}.items() if kind == what
    ]
    os.kill(choose.choice(victims or [run.pid]), signal.SIGKILL)
    return left_behind(run)


def ask(
    number: int, run: subprocess.Popen[bytes], folder: Path, choose: random.Random
) -> list[str]:
    """A signal for all processes at once."""
    os.killpg(run.pid, number)
    expected = {0, 130 if number == signal.SIGINT else 143}  # 0: it was all done already
    faults = left_behind(run)
    return faults + (["wrong exit codes"] if run.poll() not in expected else [])


def halt(run: subprocess.Popen[bytes], folder: Path, choose: random.Random) -> list[str]:
    """A process stands still for a while, then all goes on."""
    pid = choose.choice([run.pid, *descendants(run.pid)])
    os.kill(pid, signal.SIGSTOP)
    time.sleep(choose.uniform(1, 8))
    os.kill(pid, signal.SIGCONT)
    return ["wrong exit codes"] if run.wait() else []


def rival(run: subprocess.Popen[bytes], folder: Path, choose: random.Random) -> list[str]:
    """A second run in the same folder: one of the two is refused, and the other goes on."""
    second = predict(folder, "disturbed", ranks=1)
    codes = sorted((second.wait(), run.wait()))
    # Both 0: the first one was done before the second began.
    return [] if codes in ([0, 1], [0, 0]) else ["second runs let in"]


FIRST, RANK, WORKER = "first process", "another rank", "loader worker"
BLOWS = {
    f"SIGKILL for the {FIRST}": partial(kill, FIRST),
    f"SIGKILL for {RANK}": partial(kill, RANK),
    f"SIGKILL for a {WORKER}": partial(kill, WORKER),
    "SIGTERM for all": partial(ask, signal.SIGTERM),
    "Ctrl-C for all": partial(ask, signal.SIGINT),
    "SIGSTOP for a while": halt,
    "a second run": rival,
}


def left_behind(run: subprocess.Popen[bytes]) -> list[str]:
    """A fault if processes of a run are still there after a while; waits for them until then."""
    until = time.monotonic() + LATEST
    while time.monotonic() < until:
        # One whose threads are still ending looks dead already, but has no exit code yet.
        if run.poll() is not None and not in_group(run.pid):
            return []
        time.sleep(0.05)
    return ["processes left"]


def in_group(group: int) -> bool:
    """Whether a process group has any living process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its = path.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its) == group and state != "Z":
                return True
    return False


def lightning(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tasks", *words]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(
            command,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # What runs in the background of a script ignores it, and would pass that on.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def predict(folder: Path, name: str, ranks: int) -> subprocess.Popen[bytes]:
    strategy = ("--trainer.strategy=ddp",) if ranks > 1 else ()
    return lightning(
        folder,
        *("predict", "--model=Explainability", "--data=Shapes"),
        *(f"--data.shards={folder / 'shards'}", "--data.num_workers=2"),
        *(f"--model.backbone.model={folder / 'tiny.json'}", "--model.backbone.pretrained=null"),
        *("--trainer.accelerator=cpu", f"--trainer.devices={ranks}", *strategy),
        f"--writer.output={folder / name}",
    )


def complete(run: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a process that nobody killed."""
    if run.wait():
        stop(run)
        raise SystemExit(f"not killed, but ended with {run.returncode}: {run.args!r}")


def descendants(pid: int) -> dict[int, str]:
    """All living processes below ``pid``, from /proc, and what they are."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        parent = todo.pop()
        for child in children.get(parent, []):
            # Ranks are started by the first process, as new programs; workers are forked.
            found[child] = RANK if _is_rank(child, parent) else WORKER
            todo.append(child)
    return found


def _is_rank(pid: int, parent: int) -> bool:
    try:
        mine, its = (Path(f"/proc/{p}/environ").read_bytes() for p in (pid, parent))
    except OSError:
        return False
    return b"LOCAL_RANK=" in mine and b"LOCAL_RANK=" not in its


def stop(run: subprocess.Popen[bytes]) -> None:
    """End what is left of a run, as a scheduler would."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def finished(run: Path) -> set[str]:
    return {p.name for p in run.glob("*.tar")}


def compare(one: Path, other: Path) -> dict[str, int]:
    """Samples lost and doubled, and files that differ or are there in one run only."""
    expected, found = (Counter(keys(run)) for run in (one, other))
    files = [{p.name: p.read_bytes() for p in run.iterdir()} for run in (one, other)]
    names = (files[0].keys() | files[1].keys()) - OF_THE_START
    return {
        "samples": expected.total(),
        "samples lost": (expected - found).total(),
        "samples doubled": (found - expected).total(),
        "files compared": len(names),
        "files differing": sum(files[0].get(name) != files[1].get(name) for name in names),
    }


def keys(run: Path) -> list[str]:
    """Keys of all images in the output shards."""
    found = []
    for path in sorted(run.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [m.name for m in tar if m.name.endswith("scores.npy")]
    return found


if __name__ == "__main__":
    sys.exit(main())
