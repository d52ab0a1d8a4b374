"""Kill a run again and again, restart it with other world sizes, compare with an undisturbed one.

    python benchmarks/chaos.py --kills 10 --seed 0

A bounded run on the drawn world with a tiny random CLIP: random ranks or loader workers are killed
with SIGKILL at random moments; at last the run is finished, and every output shard and metrics.json
must be byte-identical to those of one undisturbed process.
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
    choose = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.json").write_text(json.dumps(TINY))
        counts = ("--count", str(args.samples), "--shard-size", str(args.shard_size))
        lightning("shards", "shapes", *counts, "--output", str(folder / "shards")).wait()
        assert predict(folder, "undisturbed", ranks=1).wait() == 0
        kills = Counter[str]()
        restarts = 0
        while kills.total() < args.kills:
            run = predict(folder, "disturbed", ranks=choose.randint(1, args.max_ranks))
            restarts += 1
            time.sleep(choose.uniform(6, 16))
            victims = [p for p in descendants(run.pid) if p != run.pid] + [run.pid]
            if run.poll() is None:
                victim = choose.choice(victims)
                kills["launcher or rank 0" if victim == run.pid else "rank or worker"] += 1
                os.kill(victim, signal.SIGKILL)
                time.sleep(choose.uniform(0, 2))
            stop(run)
            if finished(folder / "disturbed") == finished(folder / "undisturbed"):
                # All done before enough was killed: take some of it away again.
                for path in choose.sample(sorted((folder / "disturbed").glob("*.tar")), 5):
                    path.unlink()
        assert predict(folder, "disturbed", ranks=choose.randint(1, args.max_ranks)).wait() == 0
        table = compare(folder / "undisturbed", folder / "disturbed")
    table = {"kills": kills.total(), **kills, "restarts": restarts + 1, **table}
    width = max(map(len, table))
    for row, value in table.items():
        print(f"{row:<{width}}  {value}")
    if args.output:
        args.output.write_text(json.dumps(table, indent=1))
    return int(any(table[k] for k in ("samples lost", "samples doubled", "files differing")))


def lightning(*words: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-m", "tasks", *words]
    return subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet, start_new_session=True)


def predict(folder: Path, name: str, ranks: int) -> subprocess.Popen[bytes]:
    strategy = ("--trainer.strategy=ddp",) if ranks > 1 else ()
    return lightning(
        *(
            "predict",
            "--model=Explainability",
            "--data=Shapes",
            f"--data.shards={folder / 'shards'}",
        ),
        *(f"--model.backbone.model={folder / 'tiny.json'}", "--model.backbone.pretrained=null"),
        *("--trainer.accelerator=cpu", f"--trainer.devices={ranks}", *strategy),
        *("--data.num_workers=2", f"--writer.output={folder / name}"),
    )


def descendants(pid: int) -> list[int]:
    """All living processes below ``pid``, from /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def stop(run: subprocess.Popen[bytes]) -> None:
    """End what is left of a run, as a scheduler would."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def finished(run: Path) -> set[str]:
    return {p.name for p in run.glob("*.tar")}


def compare(one: Path, other: Path) -> dict[str, int]:
    """Samples lost and doubled, and files that differ."""
    expected, found = (Counter(keys(run)) for run in (one, other))
    names = sorted(
        finished(one) | finished(other) | {"metrics.json", "metrics.csv", "errors.jsonl"}
    )
    differing = [
        n
        for n in names
        if not (other / n).exists() or (one / n).read_bytes() != (other / n).read_bytes()
    ]
    return {
        "samples": expected.total(),
        "samples lost": (expected - found).total(),
        "samples doubled": (found - expected).total(),
        "files compared": len(names),
        "files differing": len(differing),
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
