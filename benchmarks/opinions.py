"""Which optimiser of Opinions climbs higher: in so many steps, and in the same time?

    python benchmarks/opinions.py --output opinions.json

Ours (momentum) and the fork's (Adam), each with views of the image that are encoded once, and with views
that are drawn anew in every step. All are judged by the same views, which none of them has climbed: the
best text found so far, mean over scenes of the demo world, on the demo's CLIP. They take turns on every
scene, and time is that of the process on its cores.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _timing import conclude
from torch import Tensor

import surgery
from datamodules import draw_scene
from datamodules.shapes import DRAWN
from surgery.opinions import LEARNING_RATES, ascend, fresh_features, mean_feature, seed_from, views

CONTESTANTS = {
    f"{optimiser}, {'fresh' if fresh else 'same'} views": (optimiser, fresh)
    for fresh in (False, True)
    for optimiser in LEARNING_RATES
}
JUDGES = 64
"""Views that the texts found are judged by."""


def main() -> int:
    args = parse_args()
    logging.disable(logging.WARNING)
    if args.threads:
        torch.set_num_threads(args.threads)
    backbone = surgery.load_backbone("demo", "demo")
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    heights: dict[str, list[Tensor]] = {name: [] for name in CONTESTANTS}
    for number in range(args.scenes):
        image = picture(number)
        judge = mean_feature(backbone, views(image, JUDGES, seed_from("judge", number)), JUDGES)
        names = list(CONTESTANTS)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.process_time()
            ids = climb(args, backbone, image, number, *CONTESTANTS[name])
            seconds[name].append(time.process_time() - began)
            heights[name].append(judged(backbone, ids, judge))
    step = {name: sum(taken) / args.scenes / args.steps for name, taken in seconds.items()}
    so_far = {name: torch.stack(found).mean(dim=0) for name, found in heights.items()}
    today = next(iter(CONTESTANTS))
    rows = []
    for name, curve in so_far.items():
        ratios = [own / its for own, its in zip(seconds[name], seconds[today], strict=True)]
        # So many steps are done when today's way is through all of its own.
        affordable = max(1, min(args.steps, round(args.steps * step[today] / step[name])))
        reached = (curve >= so_far[today][-1] - 1e-6).nonzero()
        rows.append(
            {
                "what": name,
                "time a step": statistics.median(ratios),
                **{f"after {n} steps": float(curve[n - 1]) for n in marks(args.steps)},
                "in today's time": float(curve[affordable - 1]),
                "steps to today's height": int(reached[0]) + 1 if len(reached) else "-",
            }
        )
    curves = {name: curve.tolist() for name, curve in so_far.items()}
    settings = [name for name in vars(args) if name != "output"]
    return conclude(args, rows, settings, {"seconds": seconds, "curves": curves})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=5)
    parser.add_argument("--views", type=int, default=16)
    parser.add_argument("--threads", type=int, help="of torch; as many as it wants by default")
    parser.add_argument("--output", type=Path, help="also write table and samples as json")
    return parser.parse_args()


def marks(steps: int) -> list[int]:
    """Steps after which heights are told."""
    return sorted({max(1, steps // 10), max(1, steps // 4), steps})


def picture(number: int) -> Tensor:
    """A scene uint8 [3, 96, 96] of the demo world, as large as the demo's CLIP reads it."""
    scene = draw_scene(DRAWN.seed, number, 96)
    return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous()


def climb(
    args: argparse.Namespace,
    backbone: surgery.Backbone,
    image: Tensor,
    seed: int,
    optimiser: Any,
    fresh: bool,
) -> Tensor:
    """Ids [steps, S, L] of a whole climb, views included."""
    if fresh:
        target = fresh_features(backbone, image, args.views, args.steps, seed, args.views)
    else:
        target = mean_feature(backbone, views(image, args.views, seed), args.views)
    return ascend(
        backbone,
        backbone.tokenizer,
        target,
        sequences=args.sequences,
        length=args.length,
        steps=args.steps,
        seed=seed,
        micro_batch=args.sequences,
        optimiser=optimiser,
    ).ids


def judged(backbone: surgery.Backbone, ids: Tensor, judge: Tensor) -> Tensor:
    """Cosine [steps] of the best text so far with the views that nothing has climbed."""
    texts, where = ids.flatten(0, 1).unique(dim=0, return_inverse=True)
    start, end = (backbone.tokenizer([""])[0, place].expand(len(texts), 1) for place in (0, 1))
    with torch.no_grad():
        features = backbone.encode_text(torch.cat([start, texts, end], dim=1))
    scores = F.normalize(features, dim=-1) @ judge
    return scores[where].view(ids.shape[:2]).amax(dim=1).cummax(dim=0).values


if __name__ == "__main__":
    sys.exit(main())
