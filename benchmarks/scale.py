"""How long start, resume and merge take of a run of many shards by many processes, without a model.

    python benchmarks/scale.py --shards 10000 --ranks 64

Makes a data set of so many small shards and, for the finished part of a run, output shards with the
metric states of Explainability on COCO's 80 classes by two methods; then calls, one after the other,
what a job calls at its start and at its end, and counts the files opened and folders listed. Seconds are
of the processor, since on a busy machine others are no measure; a network's file system adds its round
trip to each of the calls counted. "x ranks" is what all ranks do, of which one was measured.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from datamodules import COCO
from tasks.measures.explainability import ExplainabilityMeasures
from tasks.run import Run

GOAL = 30.0
"""Seconds of the processor that each step of start and merge may take, of 10,000 finished shards."""

SETTINGS = {
    "class": "Explainability",
    "order": "code",
    "threshold": 0.5,
    "void": "ignore",
    "methods": ["surgery", "clip"],
}
EVENTS = {"open": "opened", "os.listdir": "listed", "os.scandir": "listed"}


class Calls:
    """Files opened and folders listed since the last look, as Python itself reports them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self.counts[EVENTS[event]] += 1

    def take(self) -> Counter[str]:
        counts, self.counts = self.counts, Counter()
        return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--output", type=Path, help="also write the table as json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), args.shards, args.ranks)
    print(f"{args.shards} shards, {args.ranks} ranks\n")
    print(f"{'what':58}{'CPU s':>8}{'x ranks':>9}{'opened':>9}{'listed':>9}")
    for row in rows:
        each = f"{row['seconds'] * args.ranks:.2f}" if row["all"] else ""
        print(f"{row['what']:58}{row['seconds']:8.2f}{each:>9}{row['opened']:9}{row['listed']:9}")
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1))
    limit = GOAL * max(args.shards, 1000) / 10_000
    late = [
        r["what"] for r in rows if r["what"].startswith(("start", "merge")) and r["seconds"] > limit
    ]
    print(f"\ngoal: start and merge within {limit:g} s:", f"missed by {late}" if late else "met")
    return int(bool(late))


def measure(folder: Path, shards: int, ranks: int) -> list[dict[str, Any]]:
    """A row for each step: what it is, its seconds, its calls, and whether all ranks do it."""
    inputs, output = folder / "shards", folder / "run"
    make_inputs(inputs, shards)
    calls, rows = Calls(), []

    def step(what: str, call: Callable[[], Any], *, all_ranks: bool = False) -> Any:
        calls.take()
        began = time.process_time()
        result = call()
        seconds = time.process_time() - began
        rows.append({"what": what, "seconds": seconds, "all": all_ranks} | _counts(calls.take()))
        return result

    data = COCO(shards=str(inputs))
    described = describe(data)
    names = [name for name, _ in data.shard_list()]
    run = Run.open(output, described, mine=names)
    run.accept(names, {})
    run.close()
    make_outputs(run, names)

    step("list the shards, as each rank does", data.part_list, all_ranks=True)
    described = step("start: describe the run and its input shards", lambda: describe(data))
    run = step(
        "start: open the run, find what is finished",
        lambda: Run.open(output, described, mine=names),
    )
    shared = {key: value for key, value in run.described.items() if key != "contents"}
    sent = step("start: what is broadcast, packed", lambda: pickle.dumps((shared, run.finished)))
    rows[-1]["what"] += f" ({len(sent) / 1e6:.1f} MB)"
    step(
        "take over the broadcast, as each rank does",
        lambda: Run(output, pickle.loads(sent)[0]),
        all_ranks=True,
    )
    step("start: accept", lambda: run.accept(names, {}))
    data.wanted = replace(data.wanted, finished=frozenset(run.finished[::2]))
    step("list what is left, as each rank does", data.todo, all_ranks=True)
    step("merge: look for shards of other machines", run.missing)
    step("merge: all states, and the summary", run.summarise)
    run.close()
    mine = names[::ranks]
    part = step(
        "start of one of so many independent jobs: describe",
        lambda: describe(COCO(shards=str(inputs), part=0, parts=ranks)),
        all_ranks=True,
    )
    one = step(
        "start of one of so many independent jobs: open",
        lambda: Run.open(output, part, mine=mine, part=0, parts=ranks),
        all_ranks=True,
    )
    step(
        "start of one of so many independent jobs: accept",
        lambda: one.accept(mine, {}),
        all_ranks=True,
    )
    one.close()
    return rows


def _counts(calls: Counter[str]) -> dict[str, int]:
    return {name: calls[name] for name in ("opened", "listed")}


def describe(data: COCO) -> dict[str, Any]:
    """What ``run.json`` holds, as the writer puts it together."""
    return {
        "identity": {
            "task": SETTINGS,
            "data": data.settings(),
            "writer": {"layout": "tar", "overlays": False},
        },
        "shards": [name for name, _ in data.shard_list()],
        "contents": data.contents(),
        "info": asdict(data.info),
    }


def make_inputs(folder: Path, shards: int) -> None:
    """Shards of one picture each, and no ``dataset.json``, as img2dataset leaves them."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "jpeg")
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        entry = tarfile.TarInfo("0.jpg")
        entry.size = len(picture.getvalue())
        archive.addfile(entry, io.BytesIO(picture.getvalue()))
    for number in range(shards):
        (folder / f"{number:06}.tar").write_bytes(tar.getvalue())


def make_outputs(run: Run, names: list[str]) -> None:
    """All shards finished: one is written, the others are other names of the same file."""
    measures = ExplainabilityMeasures(
        run.info, *(SETTINGS[k] for k in ("order", "threshold", "void", "methods"))
    )
    maps = {method: torch.rand(2, 32, 32) for method in SETTINGS["methods"]}
    label = torch.randint(0, 2, (2, 32, 32))
    measures.update(maps, maps, [label], torch.zeros(2, dtype=torch.int64), torch.tensor([0, 7]))
    first = run.shard(names[0])
    first.publish(measures.pop())
    for name in names[1:]:
        os.link(first.final, run.folder / f"{name}.tar")


if __name__ == "__main__":
    sys.exit(main())
