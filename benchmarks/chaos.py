"""Kill a run again and again, restart it with other world sizes, compare with an undisturbed one.

    python benchmarks/chaos.py --kills 10 --seed 0

A bounded run on the drawn world with a tiny random CLIP: random ranks or loader workers are killed
with SIGKILL at random moments, half of them while it starts and half while it works; at last the run
is finished, and every file of results must be byte-identical to that of one undisturbed process.
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
from pathlib import Path

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 7, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
OF_THE_START = {"run.json", "config.yaml"}
"""Files that say how a run was started, not what came out."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=6, help="how many processes are killed")
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
    return int(any(table[k] for k in ("samples lost", "samples doubled", "files differing")))


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
    kills: Counter[str] = Counter({"first process": 0, "another rank": 0, "loader worker": 0})
    moments: Counter[str] = Counter({"at the start": 0, "at work": 0})
    starts = taken_away = 0
    while kills.total() < args.kills:
        if finished(other) == finished(one):  # all done before enough was killed
            for path in choose.sample(sorted(other.glob("*.tar")), (len(finished(one)) + 1) // 2):
                path.unlink()
                taken_away += 1
        before = finished(other)
        run = predict(folder, other.name, ranks=choose.randint(1, args.max_ranks))
        starts += 1
        if choose.random() < 0.5:
            time.sleep(choose.uniform(0, start))
        else:
            goal = len(before) + choose.randint(1, max(1, len(finished(one) - before) // 2))
            while len(finished(other)) < goal and run.poll() is None:
                time.sleep(0.01)
            time.sleep(choose.uniform(0, 0.5))
        alive = {**descendants(run.pid), run.pid: "first process"}
        if run.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                kind = choose.choice(sorted(set(alive.values())))
                victim = choose.choice([pid for pid, its in alive.items() if its == kind])
                os.kill(victim, signal.SIGKILL)
                kills[kind] += 1
                moments["at work" if finished(other) > before else "at the start"] += 1
            time.sleep(choose.uniform(0, 2))
            stop(run)
        else:
            complete(run)
    complete(predict(folder, other.name, ranks=choose.randint(1, args.max_ranks)))
    return {
        "kills": kills.total(),
        **{f"  of {kind}": count for kind, count in kills.items()},
        **{f"  {moment}": count for moment, count in moments.items()},
        "restarts": starts,
        "finished shards taken away": taken_away,
        **compare(one, other),
    }


def lightning(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tasks", *words]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


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
            found[child] = "another rank" if _is_rank(child, parent) else "loader worker"
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
