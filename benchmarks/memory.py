"""Does a long run grow? 20,000 small samples through ``lightning predict``, and what its processes hold.

    python benchmarks/memory.py --task Segmentation --workers 2

Resident memory (Linux, /proc) of the main process and of its loader workers, against images done. Growth
is that of the largest reading after the first thousand images over the largest within it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SHARD = 250
"""Samples a shard; readings are as fine as that."""


class Reading(NamedTuple):
    """Resident megabytes after so many images: of the main process, and of all its workers together."""

    images: int
    main: float
    workers: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--task", default="Explainability", help="any that fits the drawn world")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--largest", type=int, default=32, help="sides are random from 32 to this")
    parser.add_argument("--output", type=Path, help="also write all readings as json")
    args = parser.parse_args()
    if args.samples < 2000:
        parser.error("growth counts from 1,000 images on: --samples must be at least 2000")
    with tempfile.TemporaryDirectory() as name:
        run = start(Path(name), args.samples, args.task, args.workers, args.largest)
        began = time.perf_counter()
        readings = list(follow(run, Path(name) / "run"))
        seconds = time.perf_counter() - began
        assert run.returncode == 0, f"predict ended with {run.returncode}"
    print(f"{args.task}, {args.workers} loader workers, {seconds:.0f} s with the start\n")
    print(f"{'images done':>11}  {'main, MB':>9}  {'workers, MB':>11}")
    for reading in thinned(readings):
        print(f"{reading.images:>11,}  {reading.main:>9.1f}  {reading.workers:>11.1f}")
    grown = growth(readings)
    print(f"\ngrowth after 1,000 images: main {grown.main:+.2%}, workers {grown.workers:+.2%}")
    first, last = readings[0], readings[-1]
    kept = 1024 * (last.main - first.main) / (last.images - first.images) * 1000
    print(f"kept by the main process: {kept:+.0f} kB per 1,000 images")
    if args.output:
        args.output.write_text(json.dumps([r._asdict() for r in readings], indent=1))
    return int(max(grown.main, grown.workers) >= 0.05)


def start(
    folder: Path, samples: int, task: str, workers: int, largest: int = 32
) -> subprocess.Popen[bytes]:
    """A run over ``samples`` small samples; every shard holds the same."""
    (folder / "tiny.json").write_text(json.dumps(TINY))
    shards = folder / "shards"
    shards.mkdir()
    write_shard(shards / "000000.tar", largest)
    for number in range(1, samples // SHARD):
        (shards / f"{number:06d}.tar").hardlink_to(shards / "000000.tar")
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tasks", "predict"),
            *(f"--model={task}", "--data=Shapes", f"--data.shards={shards}"),
            *(f"--model.backbone.model={folder / 'tiny.json'}", "--model.backbone.pretrained=null"),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
            *(f"--data.num_workers={workers}", f"--writer.output={folder / 'run'}"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def write_shard(path: Path, largest: int) -> None:
    """`SHARD` different pictures with labels of the drawn world's classes."""
    draw = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(SHARD):
            height, width = draw.integers(32, largest + 1, 2)
            pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
            coarse = Image.fromarray(draw.integers(0, 4, (4, 4), np.uint8) * 3)
            label = np.asarray(coarse.resize((width, height), Image.Resampling.NEAREST))
            for ending, values in (("png", pixels), ("label.png", label)):
                data = io.BytesIO()
                Image.fromarray(values).save(data, "PNG")
                member = tarfile.TarInfo(f"{number:08d}.{ending}")
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)


def follow(run: subprocess.Popen[bytes], folder: Path) -> Iterator[Reading]:
    """Readings while a run goes on: one each time that shards were published.

    Those of the last shards are left out if workers have ended already.
    """
    done = most = 0
    while run.poll() is None:
        found = len(list(folder.glob("*.tar"))) * SHARD
        workers = children(run.pid)
        most = max(most, len(workers)) if found else 0
        if found > done and len(workers) == most:
            done = found
            yield Reading(found, resident(run.pid), sum(map(resident, workers)))
        time.sleep(0.02)


def resident(pid: int) -> float:
    """Megabytes of a process that are in memory; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return sum(int(s.split()[1]) / 1024 for s in status.splitlines() if s.startswith("VmRSS:"))


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
        return [int(word) for task in tasks for word in task.read_text().split()]
    except OSError:
        return []


def growth(readings: list[Reading], start: int = 1000) -> Reading:
    """Largest reading after ``start`` images over the largest until then, less 1."""
    before = [r for r in readings if r.images <= start]
    after = [r for r in readings if r.images > start]

    def grown(column: str) -> float:
        was, became = (max(getattr(r, column) for r in part) for part in (before, after))
        return became / was - 1 if was else 0.0

    return Reading(after[-1].images, grown("main"), grown("workers"))


def thinned(readings: list[Reading], count: int = 12) -> list[Reading]:
    """About ``count`` of the readings, the first and the last among them."""
    step = max(1, len(readings) // count)
    return [*readings[:-1:step], readings[-1]]


if __name__ == "__main__":
    sys.exit(main())
