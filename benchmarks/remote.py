"""Do remote shards starve the model? Batches over a slow line, beside the same from the disk.

    python benchmarks/remote.py --output remote.json
    python benchmarks/remote.py --command --output command.json

Shards are served on this machine with latency and a limit of bytes a second. Contestants take turns, who
begins changes, and all must have made the same of the shards. Seconds are those from the end of the first
batch to the end of the last; waited are those in which no batch was worked on.

    (default)   the real DataModule fetches, indexes and decodes; in place of the model stands a wait that
                leaves the CPU alone, so that the ratios hold on a machine that is busy
    --command   whole runs of `lightning predict`, with a random network and one thread
    --other     `--command` with another checkout of this project, too

    compute   a shard computes longer than it is fetched: the reference are shards on the disk
    network   a shard is fetched longer than it computes: the reference is to fetch all shards but the
              first, one after the other, and to compute the last

`ahead=0` fetches each shard when its turn comes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _timing import Timing, conclude
from lightning.pytorch import Callback
from PIL import Image

from common.files import file_digest
from datamodules import Images

GOAL = 1.05
BATCHES = 4
"""A shard's."""
SIDE = 32
"""Of the pictures, which are so small that decoding them costs nothing."""


class Batch(NamedTuple):
    """When the work on a batch began and ended, in seconds."""

    began: float
    ended: float


class Read(NamedTuple):
    """All batches, and what must be the same for all contestants."""

    batches: list[Batch]
    made: list[str]

    @property
    def seconds(self) -> float:
        """From the end of the first batch to the end of the last."""
        return self.batches[-1].ended - self.batches[0].ended

    @property
    def computed(self) -> float:
        """Those of them in which a batch was worked on."""
        return sum(batch.ended - batch.began for batch in self.batches[1:])


class Clock(Callback):
    """Notes the beginning and end of every batch in a file; given to the Trainer."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.batches: list[Batch] = []
        self.began = 0.0

    def on_predict_batch_start(self, *args: Any) -> None:
        self.began = time.monotonic()

    def on_predict_batch_end(self, *args: Any) -> None:
        self.batches.append(Batch(self.began, time.monotonic()))

    def on_predict_end(self, *args: Any) -> None:
        Path(self.path).write_text(json.dumps(self.batches))


class Contestant(NamedTuple):
    """Reads shards in its own way."""

    shards: list[str]
    ahead: int
    checkout: Path


Reader = Callable[[Contestant], Read]


def main() -> int:
    args = parse_args()
    rows: list[dict[str, Any]] = []
    samples: dict[str, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory() as name:
        os.environ["CLIP_SURGERY_CACHE"] = f"{name}/cache"
        for cost in args.images if args.command else args.compute:
            batch_size = int(cost) if args.command else 4
            folder = Path(tempfile.mkdtemp(prefix="shards", dir=name))
            for number in range(args.shards):
                make_shard(folder, number, int(args.shard_bytes), BATCHES * batch_size)
            for workers in args.workers:
                with server(folder, args.latency, args.rate) as url:
                    if args.command:
                        kind = f"{BATCHES * batch_size} images a shard, {workers} workers"
                        read = command(args.model, batch_size, workers)
                    else:
                        kind = f"{cost:g} s a shard, {workers} workers"
                        read = loader(cost, workers)
                    row, taken = compare(args, folder, url, read)
                    rows.append({"what": kind, **row})
                    samples |= {f"{kind}: {who}": t.samples for who, t in taken.items()}
    settings = ("command", "model", "shards", "shard_bytes", "latency", "rate", "repeats")
    return conclude(args, rows, settings, {"seconds": samples})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--command", action="store_true")
    parser.add_argument("--other", type=Path, metavar="CHECKOUT")
    parser.add_argument("--model", default="ViT-B-32", help="of --command; random weights")
    parser.add_argument(
        "--images", type=int, nargs="*", default=[6, 1], help="of --command, a batch"
    )
    parser.add_argument("--compute", type=float, nargs="*", default=[2.6, 1.2], help="s a shard")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard-bytes", type=float, default=2.2e6)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--rate", type=float, default=1e6, help="bytes a second")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table and all samples as json")
    args = parser.parse_args()
    if args.other and not args.command:
        parser.error("--other needs --command")
    return args


def compare(
    args: argparse.Namespace, folder: Path, url: str, read: Reader
) -> tuple[dict[str, Any], dict[str, Timing]]:
    """One setting: the disk, the line, the line without fetching ahead, and the bare download."""
    here = Path(__file__).resolve().parent.parent
    names = [f"{number:06d}.tar" for number in range(args.shards)]
    local, remote = [str(folder / name) for name in names], [f"{url}/{name}" for name in names]
    contestants = {
        "disk": Contestant(local, 0, here),
        "ahead=2": Contestant(remote, 2, here),
        "ahead=0": Contestant(remote, 0, here),
    }
    if args.other:
        contestants["other"] = Contestant(remote, -1, args.other.resolve())
    seconds: dict[str, list[float]] = {name: [] for name in (*contestants, "download")}
    waited: dict[str, list[float]] = {name: [] for name in contestants}
    turns = list(contestants)
    for repetition in range(args.repeats):
        first = repetition % len(turns)
        reads = {name: read(contestants[name]) for name in turns[first:] + turns[:first]}
        if len({tuple(one.made) for one in reads.values()}) != 1:
            sys.exit("contestants made different things of the same shards")
        for name, one in reads.items():
            seconds[name].append(one.seconds)
            waited[name].append(one.seconds - one.computed)
        last = reads["disk"].computed * (BATCHES - 1) / (BATCHES * args.shards - 1)
        seconds["download"].append(download(remote[1:]) + last)
    taken = {name: Timing(tuple(values)) for name, values in seconds.items()}
    slower = max(("disk", "download"), key=lambda name: taken[name].median)
    ratios = {
        name: taken[name].over(taken[slower]).median for name in contestants if name != "disk"
    }
    row = {
        "slower": {"disk": "compute", "download": "network"}[slower],
        "reference, s": taken[slower].median,
        **{f"{name}, s": taken[name].median for name in contestants if name != "disk"},
        **{f"ratio of {name}": ratio for name, ratio in ratios.items()},
        **{f"waited: {name}": statistics.median(times) for name, times in waited.items()},
        "goal": f"<= {GOAL}",
        "met": ratios["ahead=2"] <= GOAL,
    }
    return row, taken


def loader(compute: float, workers: int) -> Reader:
    """Batches of the DataModule, with a wait after each as long as it would compute."""

    def read(one: Contestant) -> Read:
        data = Images(
            one.shards, image_size=SIDE, batch_size=4, num_workers=workers, ahead=one.ahead
        )
        batches, keys = [], []
        for batch in data.loader():
            began = time.monotonic()
            keys += batch.keys
            time.sleep(compute / BATCHES)
            batches.append(Batch(began, time.monotonic()))
        data.teardown("predict")
        return Read(batches, keys)

    return read


def command(model: str, batch_size: int, workers: int) -> Reader:
    """`lightning predict`, on one thread."""

    def read(one: Contestant) -> Read:
        with tempfile.TemporaryDirectory() as name:
            output = Path(name) / "run"
            clock = {"class_path": "remote.Clock", "init_args": {"path": f"{name}/batches"}}
            words = [
                *(sys.executable, "-m", "tasks", "predict", "--model=Explainability"),
                *(f"--model.backbone.model={model}", "--model.backbone.pretrained=null"),
                *("--data=Images", f"--data.path={json.dumps(one.shards)}", "--data.names=[cat]"),
                *(f"--data.batch_size={batch_size}", f"--data.num_workers={workers}"),
                *(f"--writer.output={output}", f"--trainer.callbacks={json.dumps([clock])}"),
                *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
                *([f"--data.ahead={one.ahead}"] if one.ahead >= 0 else []),
            ]
            path = os.fspath(Path(__file__).resolve().parent)
            env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "no_proxy": "*"}
            done = subprocess.run(
                words, cwd=one.checkout, env=env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
            batches = json.loads(Path(f"{name}/batches").read_text())
            made = [file_digest(tar) for tar in sorted(output.glob("*.tar"))]
        return Read([Batch(*batch) for batch in batches], made)

    return read


def download(urls: list[str]) -> float:
    """Seconds to fetch shards, one after the other."""
    began = time.monotonic()
    for url in urls:
        urllib.request.urlopen(url).read()
    return time.monotonic() - began


def make_shard(folder: Path, number: int, size: int, images: int) -> None:
    """Small pictures, and bytes that nobody reads, which are sent."""
    rng = np.random.default_rng(number)
    with tarfile.open(folder / f"{number:06d}.tar", "w") as tar:
        for index in range(images):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(picture, "JPEG")
            more = size // images - len(picture.getvalue())
            for ending, content in (("jpg", picture.getvalue()), ("unread", rng.bytes(more))):
                member = tarfile.TarInfo(f"{number:03d}{index:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@contextmanager
def server(folder: Path, latency: float, rate: float) -> Iterator[str]:
    """The URL of a slow server, in a process of its own."""
    script = Path(__file__).with_name("_slow_server.py")
    words = [sys.executable, os.fspath(script), os.fspath(folder), str(latency), str(rate)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
