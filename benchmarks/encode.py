"""Is surgery for free? Encoding images with it, beside open_clip's own `encode_image`, in turns.

    python benchmarks/encode.py --output encode.json
    python benchmarks/encode.py --accelerator gpu --precisions bf16 --peak-tflops 989

All get the same weights, and must find the same class token before anything is measured:

    open_clip   the stock model; in bf16 and fp16 with its weights in that precision, the norms' in
                fp32 ("bf16") or not ("pure_bf16"), whichever is faster, fed images of that precision
    plain       our forward of plain CLIP: fused attention, weights converted once; under autocast
    surgery     the same with the recipe asked for

open_clip under CPU autocast is left out unless --open-clip-autocast asks for it: its attention then
takes a path that is slower by an order of magnitude, and comparing with that would flatter us. In
bf16 and fp16 the goal is against the plain forward, where that is faster than open_clip.

FLOPs are those of plain CLIP's image tower, whoever computes: with L = 1 + h w tokens of D channels,
patches of p x p pixels, m-fold wide MLPs and C channels at the end,
    2 h w 3 p^2 D  +  layers (8 L D^2 + 4 m L D^2 + 4 L^2 D)  +  2 D C.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from _timing import Timing, conclude, format_table, side_by_side
from torch import Tensor

import surgery
from surgery.batches import Batches
from surgery.softmax_attention import by_products, ratio
from surgery.towers import resize_positions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCHES = {("cpu", 224): 8, ("cpu", 512): 2, ("gpu", 224): 64, ("gpu", 512): 16}
"""Images at a time by default; other sizes get what the larger of these does."""

GOALS = {("fp32", 224): 0.95, ("bf16", 224): 1.00, ("fp32", 512): 1.02, ("bf16", 512): 1.05}
"""Time with surgery over the reference's, at most: ViT-B-16."""

AGREEMENT = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Class tokens of unit length that differ by more come from different computations."""

POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
SURGERY, PLAIN, COMPILED = "surgery", "plain", "surgery, compiled"


@dataclass(frozen=True)
class Setting:
    """What is encoded, and how."""

    size: int
    precision: str
    batch: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def __str__(self) -> str:
        return f"{self.size}, {self.precision}, batch {self.batch}"


Encode = Callable[[], Tensor]
"""Encodes the images of a setting; returns their class tokens [B, C]."""


def main() -> int:
    args = parse_args()
    logging.disable(logging.WARNING)  # that random weights mean nothing
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if args.accelerator == "gpu" else "cpu")
    backbone = surgery.load_backbone(args.model, None, attention=args.recipe).to(device)
    peaks = dict(zip(args.precisions, args.peak_tflops or (), strict=False))
    rows: list[dict[str, Any]] = []
    rates: list[dict[str, Any]] = []
    samples: dict[str, dict[str, tuple[float, ...]]] = {}
    for size in args.sizes:
        batch = args.batch or BATCHES[args.accelerator, 512 if size > 224 else 224]
        for precision in args.precisions:
            setting = Setting(size, precision, batch, device)
            contestants = enter(args, backbone, setting)
            differences = disagreement(contestants)
            print(f"{setting}: class tokens differ from plain CLIP's by at most", end=" ")
            print(", ".join(f"{value:.1e} ({name})" for name, value in differences.items()))
            if max(differences.values()) > AGREEMENT[precision]:
                print("These are not the same computation: nothing is measured.", file=sys.stderr)
                return 1
            taken = side_by_side(
                contestants, repeats=args.repeats, warmup=2, synchronize=device.type == "cuda"
            )
            taken = {name: timing.per(batch) for name, timing in taken.items()}
            samples[str(setting)] = {name: timing.samples for name, timing in taken.items()}
            rows += compare(args, setting, taken)
            work = flops(backbone, size)
            rates += [rate(setting, name, t, work, peaks) for name, t in taken.items()]
            del contestants
    found: dict[str, Any] = {"rates": rates, "samples": samples}
    if args.accelerator == "cpu":
        found["kernels"] = kernels_of(args.precisions)
    print(f"\n{format_table(rates)}\n\nseconds an image")
    names = ("model", "recipe", "sizes", "precisions", "accelerator", "repeats")
    return conclude(args, rows, names, found)


def kernels_of(precisions: list[str]) -> dict[str, float]:
    """What attention over many keys is computed with on this CPU, and the ratio that says so."""
    ratios = {name: ratio(DTYPES[name]) for name in precisions if name != "fp32"}
    for name, value in ratios.items():
        kernel = "products" if by_products(DTYPES[name]) else "the fused kernel"
        print(f"attention in {name}: {kernel}; products take {value:.2f} of the fused one's time")
    return ratios


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="ViT-B-16", help="as of load_backbone; random weights")
    parser.add_argument("--recipe", default="surgery", choices=sorted(surgery.RECIPES))
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512])
    parser.add_argument("--batch", type=int, help="8 (2 above 224), on a GPU 64 (16), by default")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, help="all but CPU's fp16")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; as many as it wants by default")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also time ours compiled (`static_batch` of load_backbone)",
    )
    parser.add_argument(
        "--open-clip-autocast", action="store_true", help="also time the stock model under autocast"
    )
    parser.add_argument(
        "--peak-tflops", type=float, nargs="+", help="the machine's, for each of --precisions"
    )
    parser.add_argument("--output", type=Path, help="also write tables and samples as json")
    args = parser.parse_args()
    if args.precisions is None:
        args.precisions = ["fp32", "bf16"] + ["fp16"] * (args.accelerator == "gpu")
    if args.peak_tflops and len(args.peak_tflops) != len(args.precisions):
        parser.error("give --peak-tflops once for each of --precisions, in their order")
    return args


def enter(
    args: argparse.Namespace, backbone: surgery.Backbone, setting: Setting
) -> dict[str, Encode]:
    """All contestants by name, each with the same images."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch, 3, setting.size, setting.size, generator=draw)
    images = images.to(setting.device)
    plain = backbone.with_attention("raw")
    contestants: dict[str, Encode] = {
        PLAIN: partial(encode_ours, plain.encode_image, images, setting),
        SURGERY: partial(encode_ours, backbone.encode_image, images, setting),
    }
    if args.compile:
        compiled = backbone.with_attention(args.recipe)
        compiled.batches = Batches(setting.batch, fixed=True)
        contestants[COMPILED] = partial(encode_ours, compiled.encode_image, images, setting)
    low = setting.precision != "fp32"
    for kind in (setting.precision, f"pure_{setting.precision}") if low else ("fp32",):
        model = stock_model(backbone, setting, kind)
        own = images.to(setting.dtype)
        contestants[f"open_clip {kind}"] = partial(encode_stock, model, own)
    if low and args.open_clip_autocast:
        model = stock_model(backbone, setting, "fp32")
        contestants["open_clip autocast"] = partial(encode_stock, model, images, setting.dtype)
    return contestants


@torch.inference_mode()
def encode_ours(
    encode: Callable[[Tensor], surgery.ImageTokens], images: Tensor, setting: Setting
) -> Tensor:
    low = setting.precision != "fp32"
    with torch.autocast(setting.device.type, setting.dtype if low else None, enabled=low):
        return encode(images).class_token


@torch.inference_mode()
def encode_stock(model: Any, images: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        return model.encode_image(images)


def stock_model(backbone: surgery.Backbone, setting: Setting, precision: str) -> Any:
    """open_clip's own model of the same config and weights, made for images of one size."""
    with tempfile.TemporaryDirectory() as name:
        config = Path(name) / "open_clip_config.json"
        config.write_text(json.dumps({"model_cfg": backbone.config}))
        model = open_clip.create_model(
            f"local-dir:{name}",
            precision=precision,
            device=setting.device,
            force_image_size=setting.size,
        )
    weights = dict(backbone.model.state_dict())
    size = (setting.size, setting.size)
    native, grid = (cells(backbone, pixels) for pixels in (backbone.image_size, size))
    for key in weights.keys() & set(POSITIONS):
        weights[key] = resize_positions(weights[key], native, grid, backbone.recipe.position)
    model.load_state_dict(weights)
    return model.eval()


def cells(backbone: surgery.Backbone, size: tuple[int, int]) -> tuple[int, int]:
    """The grid of an image size."""
    rows, columns = (side // patch for side, patch in zip(size, backbone.patch_size, strict=True))
    return rows, columns


def disagreement(contestants: dict[str, Encode]) -> dict[str, float]:
    """Largest difference of each contestant's class tokens, of unit length, from plain CLIP's."""
    tokens = {name: F.normalize(run().float(), dim=-1) for name, run in contestants.items()}
    plain = tokens.pop(PLAIN)
    return {name: float((own - plain).abs().max()) for name, own in tokens.items()}


def compare(
    args: argparse.Namespace, setting: Setting, taken: dict[str, Timing]
) -> list[dict[str, Any]]:
    """Ours over both references; which of them the goal is against is said at the top."""
    stock = min((n for n in taken if n.startswith("open_clip")), key=lambda n: taken[n].median)
    fastest = min((stock, PLAIN), key=lambda name: taken[name].median)
    judge = stock if setting.precision == "fp32" else fastest
    usual = (args.model, args.recipe) == ("ViT-B-16", "surgery")
    goal = GOALS.get((setting.precision, setting.size)) if usual else None
    found = []
    for own in (SURGERY, COMPILED):
        for reference in (stock, PLAIN) if own in taken else ():
            ratio = taken[own].over(taken[reference]).median
            judged = goal is not None and own == SURGERY and reference == judge
            found.append(
                {
                    "what": f"{own} against {reference}: {setting}",
                    "reference": taken[reference].median,
                    "ours": taken[own].median,
                    "ratio": ratio,
                    "goal": f"<= {goal:.2f}" if judged else None,
                    "met": ratio <= goal if judged else None,
                }
            )
    return found


def flops(backbone: surgery.Backbone, size: int) -> float | None:
    """Floating-point operations of plain CLIP's image tower for an image; None for a ResNet."""
    vision = backbone.config["vision_cfg"]
    if not isinstance(vision["layers"], int):
        return None
    rows, columns = cells(backbone, (size, size))
    tokens, width = rows * columns + 1, vision["width"]
    linear = (8 + 4 * vision.get("mlp_ratio", 4.0)) * tokens * width**2
    attention = 4 * tokens**2 * width
    patches = 2 * (tokens - 1) * 3 * backbone.patch_size[0] * backbone.patch_size[1] * width
    return patches + vision["layers"] * (linear + attention) + 2 * width * backbone.embed_dim


def rate(
    setting: Setting, name: str, taken: Timing, work: float | None, peaks: dict[str, float]
) -> dict[str, Any]:
    """A line of the second table: how fast a contestant is by itself."""
    speed = None if work is None else work / taken.median / 1e12
    peak = peaks.get(setting.precision)
    return {
        "setting": str(setting),
        "contestant": name,
        "images/s": 1 / taken.median,
        "TFLOP/s": speed,
        "of peak": None if speed is None or peak is None else speed / peak,
    }


if __name__ == "__main__":
    sys.exit(main())
