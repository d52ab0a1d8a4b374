"""What does low precision cost? The demo's CLIP and world in fp32, and under bf16 and fp16 autocast.

    python benchmarks/precision.py --output precision.json

Explainability on scenes that the demo never saw: mSC, and mIoU at the best threshold, as its card has
them. Autocast has only the image tower in it, as in a run: texts, similarities, feature surgery and
maps are in float32 whatever the precision, which is asserted.
Differences are the largest of all patches and texts, of cosines before feature surgery and of what it
makes of them; masks are those of the images' own classes, at 0.5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import format_table, write_json
from torch import Tensor

import surgery
from datamodules._drawing import NOUNS, Scene, draw_scene
from surgery.metrics import MeanScoreContrast, ThresholdIoU

WORLD = 900_000
"""The world that training held out."""

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = 32


@dataclass(frozen=True)
class Found:
    """What one precision makes of all scenes; mSC and mIoU as fractions.

    before, after: similarities [S, N, T] without and with feature surgery; masks: of the positive
    classes of each scene, bool [P, H, W].
    """

    contrast: float
    overlap: float
    before: Tensor
    after: Tensor
    masks: list[Tensor]


def main() -> int:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    backbone = surgery.load_backbone("demo", "demo")
    backbone.to("cuda" if args.accelerator == "gpu" else "cpu")
    text = surgery.encode_prompts(backbone, backbone.tokenizer, NOUNS, cache_dir=False)
    scenes = [draw_scene(WORLD, i, backbone.image_size) for i in range(args.scenes)]
    exact = explain(backbone, text, scenes, None)
    rows = [line("fp32", exact, exact)]
    for name, dtype in list(DTYPES.items())[1:]:
        try:
            rows.append(line(name, explain(backbone, text, scenes, dtype), exact))
        except RuntimeError as error:
            print(f"{name}: not possible here ({str(error).splitlines()[0]})")
    print(format_table(rows))
    if args.output:
        write_json(args.output, rows, scenes=args.scenes, accelerator=args.accelerator)
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; as many as it wants by default")
    parser.add_argument("--output", type=Path, help="also write the table as json")
    return parser.parse_args()


@torch.inference_mode()
def explain(
    backbone: surgery.Backbone, text: Tensor, scenes: list[Scene], dtype: torch.dtype | None
) -> Found:
    """Similarities, masks and metrics of all scenes, under autocast to a type; None: in float32."""
    contrast, overlap = MeanScoreContrast(len(NOUNS)), ThresholdIoU(len(NOUNS))
    before, after, masks = [], [], []
    for some in batches(scenes):
        pixels = torch.from_numpy(np.stack([scene.image for scene in some])).permute(0, 3, 1, 2)
        with torch.autocast(backbone.device.type, dtype, enabled=dtype is not None):
            tokens = backbone.encode_image(backbone.preprocess(pixels.to(backbone.device)))
            before.append(surgery.similarity(tokens.patch_tokens, text).cpu())
            scores = surgery.feature_surgery(tokens.patch_tokens, tokens.class_token, text)
            maps = surgery.similarity_map(scores, tokens.grid, backbone.image_size).cpu()
            after.append(scores.cpu())
        kept = {tokens.class_token.dtype, tokens.patch_tokens.dtype, scores.dtype, maps.dtype}
        assert kept == {torch.float32}, f"something left float32: {kept}"
        for of, scene in zip(maps, some, strict=True):
            there = torch.tensor([NOUNS.index(noun) for noun in scene.nouns])
            label = torch.from_numpy(scene.label)
            truth = (label == (there + 1)[:, None, None], torch.ones_like(label, dtype=torch.bool))
            contrast.update(of[there], *truth, there)
            overlap.update(of[there], *truth, there)
            masks.append(of[there] >= 0.5)
    return Found(
        float(contrast.compute()),
        float(overlap.compute()),
        torch.cat(before),
        torch.cat(after),
        masks,
    )


def batches(scenes: list[Scene]) -> Iterator[list[Scene]]:
    for start in range(0, len(scenes), BATCH):
        yield scenes[start : start + BATCH]


def line(name: str, found: Found, exact: Found) -> dict[str, Any]:
    """A line of the table: one precision beside float32."""
    pairs = zip(found.masks, exact.masks, strict=True)
    changed = sum(int((own != its).sum()) for own, its in pairs)
    return {
        "precision": name,
        "mSC, %": 100 * found.contrast,
        "mIoU, %": 100 * found.overlap,
        "change of mSC, points": 100 * (found.contrast - exact.contrast),
        "of mIoU": 100 * (found.overlap - exact.overlap),
        "largest difference of cosines": float((found.before - exact.before).abs().max()),
        "after surgery": float((found.after - exact.after).abs().max()),
        "mask pixels changed, %": 100 * changed / sum(mask.numel() for mask in exact.masks),
    }


if __name__ == "__main__":
    sys.exit(main())
