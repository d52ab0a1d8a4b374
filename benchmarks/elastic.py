"""Kill ranks that torchrun started; it starts them again, and the files must be those of one process.

    python benchmarks/elastic.py --kills 2 --ranks 2

A bounded run on the drawn world with a tiny random CLIP, as `chaos.py` makes it. Each time another shard
has been finished, a random rank is killed with SIGKILL: torchrun ends the others and starts all anew
(`--max-restarts`), and they go on. Every file of results must be byte-identical to that of one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos import TINY, compare, complete, descendants, finished, lightning, predict


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--shard-size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        table = elastic(Path(name), args, random.Random(args.seed))
    for row, value in table.items():
        print(f"{row:<16}  {value}")
    faults = ("samples lost", "samples doubled", "files differing", "exit code")
    return int(any(table[row] for row in faults) or table["kills"] < args.kills)


def elastic(folder: Path, args: argparse.Namespace, choose: random.Random) -> dict[str, int]:
    """The table: what was done to a run, and what that did to its results."""
    (folder / "tiny.json").write_text(json.dumps(TINY))
    counts = ("--count", str(args.samples), "--shard-size", str(args.shard_size))
    complete(lightning(folder, "shards", "shapes", *counts, f"--output={folder / 'shards'}"))
    one, other = folder / "undisturbed", folder / "restarted"
    undisturbed = predict(folder, one.name, ranks=1)
    complete(undisturbed)
    words = [*undisturbed.args][3:]  # after: python -m tasks
    words = [word.replace(str(one), str(other)) for word in words if "devices" not in word]
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}")
    launcher += (f"--max-restarts={args.kills}", "-m", "tasks")
    more = (f"--trainer.devices={args.ranks}", "--trainer.strategy=ddp")
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see docs/cluster.md
    }
    with open(folder / "log", "wb") as log:
        run = subprocess.Popen(
            [sys.executable, *launcher, *words, *more], env=env, stdout=log, stderr=log
        )
        kills = 0
        while kills < args.kills and run.poll() is None:
            goal = len(finished(other)) + 1  # so each start has done something
            while len(finished(other)) < goal and run.poll() is None:
                time.sleep(0.01)
            if ranks := [pid for pid in descendants(run.pid) if is_rank(pid)]:
                os.kill(choose.choice(ranks), signal.SIGKILL)
                kills += 1
        code = run.wait()
    if code:
        print((folder / "log").read_text()[-3000:], file=sys.stderr)
    return {"kills": kills, "exit code": code, **compare(one, other)}


def is_rank(pid: int) -> bool:
    """Whether a process is one that torchrun started, not a loader worker of such a one."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        mine, its = (Path(f"/proc/{p}/environ").read_bytes() for p in (pid, parent))
    except OSError:
        return False
    return b"LOCAL_RANK=" in mine and b"LOCAL_RANK=" not in its


if __name__ == "__main__":
    sys.exit(main())
