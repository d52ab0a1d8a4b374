"""What do class texts cost? 85 templates x 59 classes of PASCAL Context, encoded and read again.

    python benchmarks/text.py --output text.json

The text tower is causal and read at the end token, so ours computes as many positions as the longest
prompt of a batch has. The reference is open_clip's own `encode_text`, which computes all 77, of the
same batches; both are in fp32 and get the prompts as token ids. Reading them from the cache is
measured in processes of their own, as a second run would do it: the call alone, after the weights
and the tokenizer are there.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import Timing, conclude, side_by_side
from torch import Tensor

import surgery
from datamodules.pascal_context import INFO

GOAL = 4.0
"""Cropped prompts are encoded at least so many times faster: ViT-B-16, all classes."""

AGREEMENT = 1e-6
"""Class features of unit length differ by no more."""

CACHE_GOAL = 0.05
"""A second run has the features within so many seconds."""


def main() -> int:
    args = parse_args()
    logging.disable(logging.WARNING)  # that random weights mean nothing
    if args.threads:
        torch.set_num_threads(args.threads)
    backbone = surgery.load_backbone(args.model, None)
    names = INFO.prompts[: args.classes]
    if args.measure_cache:
        # Not on the GPU: what is measured is the disk, and the key of what lies there.
        print(time_cache(backbone, names, args.measure_cache))
        return 0
    backbone.to("cuda" if args.accelerator == "gpu" else "cpu")
    prompts = [template.replace("{}", name) for name in names for template in surgery.TEMPLATES]
    token_ids = backbone.tokenizer(prompts)
    lengths = token_ids.argmax(dim=-1) + 1
    print(f"{len(prompts)} prompts of {int(lengths.min())} to {int(lengths.max())} tokens")

    full = with_all_positions(backbone)
    ours, reference = (encoder(args, own, names, token_ids) for own in (backbone, full))
    encoder(args, full, names[:1], token_ids[: len(surgery.TEMPLATES)])()  # what is set up once
    found: dict[str, Tensor] = {}
    taken = side_by_side(
        {
            "reference": lambda: found.update(reference=reference()),
            "ours": lambda: found.update(ours=ours()),
        },
        repeats=args.repeats,
        warmup=0,
        synchronize=args.accelerator == "gpu",
    )
    difference = float((found["ours"] - found["reference"]).abs().max())
    with tempfile.TemporaryDirectory() as name:
        first = surgery.encode_prompts(backbone, backbone.tokenizer, names, cache_dir=name)
        cached = Timing(tuple(fresh_time_cache(Path(name)) for _ in range(args.repeats)))
        kept = surgery.encode_prompts(backbone, backbone.tokenizer, names, cache_dir=name)
    assert torch.equal(first, kept), "the cache gives other features than were put there"

    usual = args.model == "ViT-B-16" and len(names) == len(INFO.prompts)
    times = taken["reference"].over(taken["ours"]).median
    medians = {"reference": taken["reference"].median, "ours": taken["ours"].median}
    rows = [
        {
            "what": "s for all prompts; ratio: times faster",
            **medians,
            "ratio": times,
            "goal": f">= {GOAL:.0f}" if usual else None,
            "met": times >= GOAL if usual else None,
        },
        below("s from the cache, in a second run", cached.median, CACHE_GOAL),
        below("largest difference of class features", difference, AGREEMENT),
    ]
    samples = {name: timing.samples for name, timing in {**taken, "cached": cached}.items()}
    settings = ("model", "batch_size", "repeats", "accelerator")
    counts = {"classes": len(names), "prompts": len(prompts)}
    return conclude(args, rows, settings, {"samples": samples}, **counts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16", help="as of load_backbone; random weights")
    parser.add_argument("--classes", type=int, help="only the first so many of the 59")
    parser.add_argument("--batch-size", type=int, default=256, help="prompts at a time")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; as many as it wants by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write table and samples as json")
    parser.add_argument("--measure-cache", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def with_all_positions(backbone: surgery.Backbone) -> Any:
    """The same backbone, but with open_clip's own way to encode texts."""
    full: Any = copy.copy(backbone)
    full.encode_text = backbone.model.encode_text
    return full


def encoder(
    args: argparse.Namespace, backbone: surgery.Backbone, names: tuple[str, ...], ids: Tensor
) -> Callable[[], Tensor]:
    """Encodes all prompts of the names, whose ids are given, without any cache."""
    return partial(
        surgery.encode_prompts,
        backbone,
        lambda _: ids,
        names,
        batch_size=args.batch_size,
        cache_dir=False,
    )


def time_cache(backbone: surgery.Backbone, names: tuple[str, ...], folder: Path) -> float:
    """Seconds until the class texts are there, which an earlier run has put into the folder."""
    tokenizer = backbone.tokenizer
    before = sorted(folder.iterdir())
    began = time.perf_counter()
    surgery.encode_prompts(backbone, tokenizer, names, cache_dir=folder)
    seconds = time.perf_counter() - began
    assert before == sorted(folder.iterdir()), "the features were not in the cache"
    return seconds


def fresh_time_cache(folder: Path) -> float:
    """`time_cache` in a process of its own, started with this one's arguments."""
    command = [sys.executable, *sys.argv, "--measure-cache", os.fspath(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def below(what: str, value: float, goal: float) -> dict[str, Any]:
    """A line of the table for what has no reference but a limit."""
    limits = {"ratio": None, "goal": f"<= {goal:g}", "met": value <= goal}
    return {"what": what, "reference": None, "ours": value, **limits}


if __name__ == "__main__":
    sys.exit(main())
