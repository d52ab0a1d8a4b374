"""How long do ranks stand idle where shards differ in cost? Handed out, beside fixed parts.

    python benchmarks/idle.py --output idle.json

Whole runs of `lightning predict` with a tiny random CLIP. In place of a model that is worth several
processes stands a wait for each image, which leaves the CPU alone, so that the shares hold on a machine
that is busy. Contestants take turns, who begins changes, and all must write the same bytes.

Idle is the share of all ranks' time, from the first batch of any to the end of the last, in which a rank
worked on no batch. That can't be none: the goal is what it is at most if, at the end, all ranks but one
wait for the largest shard.

    in turns   shards are large and small in turns, so that of two ranks with fixed parts one has all the
               large ones
    drawn      numbers of images are drawn (log-normal, sigma 1)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _timing import Timing, conclude
from chaos import TINY
from lightning.pytorch import Callback, LightningModule, Trainer
from remote import make_shard

from common.files import file_digest

BATCH_SIZE = 4


class Wait(Callback):
    """Waits for each image, and notes the beginning and end of every batch; given to the Trainer.

    Args:
        path: file to note them in, the rank's number added.
        seconds: that each image takes.
        fixed: give each rank a fixed part of the shards, as without a counter that all share.
    """

    def __init__(self, path: str, seconds: float, fixed: bool) -> None:
        self.path = path
        self.seconds = seconds
        self.fixed = fixed
        self.batches: list[tuple[float, float]] = []
        self.began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        make = data.loader

        def loader() -> Any:
            if self.fixed:
                data.wanted = replace(data.wanted, counter=None)
            return make()

        data.loader = loader

    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, *more: Any) -> None:
        self.began = time.monotonic()
        time.sleep(self.seconds * len(batch.keys))

    def on_predict_batch_end(self, *args: Any) -> None:
        self.batches.append((self.began, time.monotonic()))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Path(f"{self.path}.{trainer.global_rank}").write_text(json.dumps(self.batches))


class Run(NamedTuple):
    """What came of a run."""

    seconds: float
    idle: float
    made: list[str]


def main() -> int:
    args = parse_args()
    rng = np.random.default_rng(args.seed)
    large, small = 6 * args.images // 3.5, args.images // 3.5
    sets = {
        "in turns": [int(large), int(small)] * (args.shards // 2),
        "drawn": [
            max(1, round(args.images * size)) for size in rng.lognormal(-0.5, 1, args.shards)
        ],
    }
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["CLIP_SURGERY_CACHE"] = f"{name}/cache"
        Path(name, "tiny.json").write_text(json.dumps(TINY))
        for kind, images in sets.items():
            folder = Path(tempfile.mkdtemp(prefix="shards", dir=name))
            for number, count in enumerate(images):
                make_shard(folder, number, 2000 * count, count)
            for workers in args.workers:
                row, runs = compare(args, folder, images, workers)
                rows.append({"shards": kind, "workers": workers, **row})
                samples[f"{kind}, {workers} workers"] = runs
    settings = ("shards", "images", "seconds", "ranks", "workers", "repeats", "seed")
    return conclude(args, rows, settings, {"runs": samples, "images": sets})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--images", type=int, default=14, help="of a shard, on average")
    parser.add_argument("--seconds", type=float, default=0.1, help="an image")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the table and all runs as json")
    return parser.parse_args()


def compare(
    args: argparse.Namespace, folder: Path, images: list[int], workers: int
) -> tuple[dict[str, Any], dict[str, list[tuple[float, float]]]]:
    """One set of shards, by fixed parts and handed out."""
    runs: dict[str, list[Run]] = {"fixed": [], "handed out": []}
    turns = list(runs)
    for repetition in range(args.repeats):
        first = repetition % len(turns)
        for name in turns[first:] + turns[:first]:
            runs[name].append(predict(args, folder, workers, fixed=name == "fixed"))
    if len({tuple(run.made) for of in runs.values() for run in of}) != 1:
        sys.exit("contestants made different things of the same shards")
    idle = {name: Timing(tuple(run.idle for run in of)).median for name, of in runs.items()}
    seconds = {name: Timing(tuple(run.seconds for run in of)) for name, of in runs.items()}
    goal = (args.ranks - 1) * max(images) / (sum(images) + (args.ranks - 1) * max(images))
    row = {
        **{f"{name}, s": taken.median for name, taken in seconds.items()},
        "ratio": seconds["handed out"].over(seconds["fixed"]).median,
        **{f"idle, {name}": f"{share:.1%}" for name, share in idle.items()},
        "goal": f"<= {goal:.1%}",
        "met": idle["handed out"] <= goal,
    }
    return row, {name: [(run.seconds, run.idle) for run in of] for name, of in runs.items()}


def predict(args: argparse.Namespace, folder: Path, workers: int, *, fixed: bool) -> Run:
    """`lightning predict` by several ranks, each on one thread."""
    with tempfile.TemporaryDirectory() as name:
        output, notes = Path(name) / "run", Path(name) / "batches"
        given = {"path": str(notes), "seconds": args.seconds, "fixed": fixed}
        callback = json.dumps([{"class_path": "idle.Wait", "init_args": given}])
        words = [
            *(sys.executable, "-m", "tasks", "predict", "--model=Explainability"),
            *(f"--model.backbone.model={folder.parent}/tiny.json", "--data=Images"),
            *("--model.backbone.pretrained=null", f"--data.path={folder}", "--data.names=[cat]"),
            *(f"--data.batch_size={BATCH_SIZE}", f"--data.num_workers={workers}"),
            *(f"--writer.output={output}", f"--trainer.callbacks={callback}"),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
            *(f"--trainer.devices={args.ranks}", "--trainer.strategy=ddp"),
        ]
        here = Path(__file__).resolve().parent
        env = {**os.environ, "PYTHONPATH": os.fspath(here), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            words, cwd=here.parent, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
        ranks = [json.loads(Path(f"{notes}.{rank}").read_text()) for rank in range(args.ranks)]
        made = [file_digest(tar) for tar in sorted(output.glob("*.tar"))]
    batches = [batch for rank in ranks for batch in rank]
    seconds = max(ended for _, ended in batches) - min(began for began, _ in batches)
    busy = sum(ended - began for began, ended in batches)
    return Run(seconds, 1 - busy / (args.ranks * seconds), made)


if __name__ == "__main__":
    sys.exit(main())
