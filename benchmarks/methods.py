"""What does each explanation method cost beside surgery? Time and memory, by the number of texts."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import conclude, side_by_side
from torch import Tensor

import surgery
from surgery.methods import check_towers


def main() -> int:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.accelerator == "gpu" else "cpu")
    backbone = surgery.load_backbone(args.model).to(device)
    check_towers(args.methods, backbone)
    draw = torch.Generator().manual_seed(0)
    size = backbone.image_size
    images = torch.randn(args.batch, 3, *size, generator=draw).to(device)
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    for count in args.texts:
        texts = torch.randn(count, backbone.embed_dim, generator=draw).to(device)
        contestants = {
            name: partial(explain, backbone, images, texts, name) for name in args.methods
        }
        taken = side_by_side(contestants, repeats=args.repeats, synchronize=device.type == "cuda")
        taken = {name: timing.per(args.batch) for name, timing in taken.items()}
        samples[str(count)] = {name: timing.samples for name, timing in taken.items()}
        for name, timing in taken.items():
            row = {
                "texts": count,
                "method": name,
                "seconds an image": timing.median,
                "times surgery": timing.over(taken["surgery"]).median,
            }
            if device.type == "cuda":
                row["MiB"] = peak(contestants[name])
            rows.append(row)
    print(f"{args.model}, {size[0]} x {size[1]}, batch {args.batch}")
    settings = ("model", "methods", "texts", "batch", "accelerator", "repeats")
    return conclude(args, rows, settings, {"samples": samples})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-16", help="as of load_backbone; random weights")
    parser.add_argument(
        "--methods", nargs="+", choices=sorted(surgery.METHODS), default=list(surgery.METHODS)
    )
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; as many as it wants by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write table and samples as json")
    args = parser.parse_args()
    if "surgery" not in args.methods:
        args.methods.insert(0, "surgery")
    return args


@torch.inference_mode()
def explain(backbone: surgery.Backbone, images: Tensor, texts: Tensor, name: str) -> Tensor:
    empty = texts[:1]  # a text like any other: what one alone is compared with costs nothing here
    return surgery.explain(backbone, images, surgery.Texts(texts, empty), name)


def peak(run: Any) -> float:
    """MiB that the GPU holds at most while a function runs, beyond what it held before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


if __name__ == "__main__":
    sys.exit(main())
