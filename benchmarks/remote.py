"""Do remote shards starve the model? Batches over a slow line, beside the same from the disk.

    python benchmarks/remote.py --output remote.json

Shards are served on this machine with latency and a limit of bytes a second; the real DataModule
fetches, indexes and decodes them. In place of the model stands a wait that leaves the CPU alone, so that
the ratios hold on a machine that is busy: what is measured is who waits for whom. Contestants take
turns, and all must have read the same samples.

    compute   a shard computes longer than it is fetched: seconds from the first batch to the last,
              over those of the shards on the disk
    network   a shard is fetched longer than it computes: seconds from the start to the last batch, over
              those of fetching all shards one after the other and computing the last

`ahead=0` is how shards were fetched before there was a thread for it: each when its turn comes.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _timing import Timing, format_table, write_json
from PIL import Image

from datamodules import Images

GOAL = 1.05
BATCHES = 4
"""A shard's, of four samples each."""


class Read(NamedTuple):
    """How long it took, in seconds, and what was read."""

    to_first: float
    from_first: float
    keys: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard-bytes", type=float, default=2.2e6)
    parser.add_argument("--latency", type=float, default=0.2, help="seconds")
    parser.add_argument("--rate", type=float, default=1e6, help="bytes a second")
    parser.add_argument("--compute", type=float, nargs="*", default=[2.6, 1.2], help="s a shard")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table and all samples as json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    samples: dict[str, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(args.shards):
            make_shard(folder / f"{number:06d}.tar", number, int(args.shard_bytes))
        with server(folder, args.latency, args.rate) as url:
            for compute in args.compute:
                for workers in args.workers:
                    row, taken = compare(args, folder, url, compute, workers)
                    rows.append(row)
                    kind = f"{compute:g} s a shard, {workers} workers"
                    samples |= {f"{kind}: {who}": t.samples for who, t in taken.items()}
    print(format_table(rows))
    if args.output:
        names = ("shards", "shard_bytes", "latency", "rate", "compute", "workers", "repeats")
        settings = {name: getattr(args, name) for name in names}
        write_json(args.output, {"table": rows, "seconds": samples}, **settings)
    return int(any(row["met"] is False for row in rows))


def compare(
    args: argparse.Namespace, folder: Path, url: str, compute: float, workers: int
) -> tuple[dict[str, Any], dict[str, Timing]]:
    """One setting: the disk, the line, the line without fetching ahead, and the bare download."""
    names = [f"{number:06d}.tar" for number in range(args.shards)]
    local, remote = [str(folder / name) for name in names], [f"{url}/{name}" for name in names]
    bound = compute > args.latency + args.shard_bytes / args.rate
    seconds: dict[str, list[float]] = {"disk": [], "ahead=2": [], "ahead=0": [], "download": []}
    for _ in range(args.repeats):
        read = {
            "disk": read_all(local, compute, workers, ahead=0),
            "ahead=2": read_all(remote, compute, workers, ahead=2),
            "ahead=0": read_all(remote, compute, workers, ahead=0),
        }
        if len({tuple(one.keys) for one in read.values()}) != 1:
            sys.exit("the shards were not read alike")
        for who, one in read.items():
            seconds[who].append(one.from_first if bound else one.to_first + one.from_first)
        seconds["download"].append(download(remote) + compute)
    taken = {who: Timing(tuple(values)) for who, values in seconds.items()}
    reference = taken["disk" if bound else "download"]
    ratio, before = (taken[who].over(reference).median for who in ("ahead=2", "ahead=0"))
    row = {
        "slower": "compute" if bound else "network",
        "workers": workers,
        "reference, s": reference.median,
        "ahead=2, s": taken["ahead=2"].median,
        "ratio": ratio,
        "ratio of ahead=0": before,
        "goal": f"<= {GOAL}",
        "met": ratio <= GOAL,
    }
    return row, taken


def read_all(shards: list[str], compute: float, workers: int, ahead: int) -> Read:
    """Take all batches of the shards, and wait after each as long as it would compute."""
    data = Images(shards, image_size=32, batch_size=4, num_workers=workers, ahead=ahead)
    began, first, keys = time.monotonic(), 0.0, []
    for batch in data.loader():
        first = first or time.monotonic()
        keys += batch.keys
        time.sleep(compute / BATCHES)
    ended = time.monotonic()
    data.teardown("predict")
    return Read(first - began, ended - first, keys)


def download(urls: list[str]) -> float:
    """Seconds to fetch everything, one after the other."""
    began = time.monotonic()
    for url in urls:
        urllib.request.urlopen(url).read()
    return time.monotonic() - began


def make_shard(path: Path, number: int, size: int) -> None:
    """Small pictures, so that decoding costs nothing, and bytes that nobody reads, which are sent."""
    rng = np.random.default_rng(number)
    with tarfile.open(path, "w") as tar:
        for index in range(4 * BATCHES):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(picture, "JPEG")
            more = size // (4 * BATCHES) - len(picture.getvalue())
            for ending, content in (("jpg", picture.getvalue()), ("unread", rng.bytes(more))):
                member = tarfile.TarInfo(f"{number:03d}{index:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@contextmanager
def server(folder: Path, latency: float, rate: float) -> Iterator[str]:
    """The URL of a slow server, in a process of its own."""
    script = Path(__file__).with_name("_slow_server.py")
    command = [sys.executable, os.fspath(script), os.fspath(folder), str(latency), str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


if __name__ == "__main__":
    sys.exit(main())
