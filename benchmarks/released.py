"""Against the authors' released code: the same images, weights and texts, in turns, in one run.

    python benchmarks/released.py --reference CLIP_Surgery --output table.json

--reference is a clone of github.com/xmed-lab/CLIP_Surgery; nothing of it is in this repository.
Both get the same random weights, and their maps must agree before anything is measured:

    end to end       normalised images to tokens, feature surgery, maps of all classes in image size
    feature surgery  alone, from tokens and texts
    peak memory      of an end-to-end call in a process of its own, above what it held before
                     (Linux; on a GPU, its allocator's), on one image, and on a batch, of which
                     most are then the maps of all classes that both return

Their tokens are normalised over channels, as the paper says (their demo's `norm(dim=1)` runs over
tokens). Their feature surgery takes one image at a time, so it gets one at a time; so do maps.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _timing import Timing, conclude, side_by_side
from torch import Tensor

import surgery

BATCH = {224: 8, 512: 2}
"""Images at a time; 2 for other sizes."""

GOALS = {
    ("fp32", 224): 1.5,
    ("fp32", 512): 2.5,
    ("bf16", 224): 4.0,
    ("bf16", 512): 6.0,
    ("surgery", 224): 100.0,
    ("surgery", 512): 100.0,
    ("memory", 512): 3.0,
}
"""At least so many times better: ViT-B-16 with 171 classes, on CPU."""

CONTESTANTS = ("released", "ours", "ours in bf16")
AGREEMENT = 1e-3
"""Maps in [0, 1] that differ by more come from different computations, not from rounding."""


class Row(NamedTuple):
    """One line of the table; `ratio` says how many times better ours is."""

    what: str
    unit: str
    released: float
    ours: float
    ratio: float
    quartiles: str
    goal: float | None
    met: bool | None


class Released:
    """The clone's model and functions, called as its demo calls them."""

    def __init__(self, reference: Path, backbone: surgery.Backbone, model: str) -> None:
        self.clip, build_model = import_released(reference)
        # The names of the weights are OpenAI's in both; a strict load confirms it.
        self.model = build_model("CS-" + model, dict(backbone.model.state_dict()))
        self.model.to(backbone.device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        tokens = self.model.encode_image(images)
        return tokens / tokens.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def surgery(self, tokens: Tensor, text: Tensor) -> list[Tensor]:
        return [self.clip.clip_feature_surgery(own, text) for own in tokens.split(1)]

    @torch.no_grad()
    def explain(self, images: Tensor, text: Tensor) -> list[Tensor]:
        """Maps [1, H, W, T] of each image."""
        size = (images.shape[2], images.shape[3])
        found = self.surgery(self.encode(images), text)
        return [self.clip.get_similarity_map(own[:, 1:], size) for own in found]


class Ours:
    """This project's backbone and functions; `bf16`: under autocast."""

    def __init__(self, backbone: surgery.Backbone, *, bf16: bool = False) -> None:
        self.backbone, self.bf16 = backbone, bf16

    @torch.inference_mode()
    def encode(self, images: Tensor) -> surgery.ImageTokens:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self.backbone.encode_image(images)

    @torch.inference_mode()
    def surgery(self, tokens: surgery.ImageTokens, text: Tensor) -> Tensor:
        return surgery.feature_surgery(tokens.patch_tokens, tokens.class_token, text)

    @torch.inference_mode()
    def explain(self, images: Tensor, text: Tensor) -> Tensor:
        """Maps [B, T, H, W]."""
        tokens = self.encode(images)
        size = (images.shape[2], images.shape[3])
        return surgery.similarity_map(self.surgery(tokens, text), tokens.grid, size)


def main() -> int:
    args = parse_args()
    logging.getLogger("surgery").setLevel(logging.ERROR)  # that random weights mean nothing
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure_memory:
        print(peak_growth(args, args.sizes[0], args.measure_memory))
        return 0

    rows: list[Row] = []
    samples: dict[str, dict[str, Timing]] = {}
    agreement: dict[str, dict[int, float]] = {"fp32": {}, "bf16": {}}
    for size in args.sizes:
        images, text, released, ours, fast = prepare(args, size)
        for name, contestant in (("fp32", ours), ("bf16", fast)):
            difference = disagreement(released, contestant, images[:1], text)
            agreement[name][size] = difference
            print(f"{size}: maps differ from the released code's by {difference:.1e} in {name}")
        if agreement["fp32"][size] > AGREEMENT:
            print("These are not the same computation: nothing is measured.", file=sys.stderr)
            return 1

        def add(kind: str, what: str, theirs: Timing, own: Timing, size: int = size) -> None:
            times, batch = theirs.over(own), BATCH.get(size, 2)
            theirs, own = theirs.per(batch), own.per(batch)
            samples[f"{what}, {size}"] = {"released": theirs, "ours": own}
            spread = "{:.3g}-{:.3g}".format(*times.quartiles)
            values = (theirs.median, own.median, times.median, spread)
            rows.append(row(args, kind, f"{what}, {size}", size, "s/image", *values))

        taken = measure(
            args,
            {
                "released": lambda i=images, t=text, c=released: c.explain(i, t),
                "fp32": lambda i=images, t=text, c=ours: c.explain(i, t),
                "bf16": lambda i=images, t=text, c=fast: c.explain(i, t),
            },
        )
        add("fp32", "end to end, fp32", taken["released"], taken["fp32"])
        add("bf16", "end to end, bf16 against fp32", taken["released"], taken["bf16"])
        tokens, own_tokens = released.encode(images), ours.encode(images)
        taken = measure(
            args,
            {
                "released": lambda x=tokens, t=text, c=released: c.surgery(x, t),
                "fp32": lambda x=own_tokens, t=text, c=ours: c.surgery(x, t),
            },
        )
        add("surgery", "feature surgery alone", taken["released"], taken["fp32"])
        del images, released, ours, fast, tokens, own_tokens

    for size in args.sizes:
        for batch in (1, BATCH.get(size, 2)):
            theirs, own, own_bf16 = (fresh_peak_growth(size, batch, name) for name in CONTESTANTS)
            goal = "memory" if batch == 1 else "-"
            for kind, what, peak in ((goal, "fp32", own), ("-", "bf16 against fp32", own_bf16)):
                name = f"peak memory, {what}, {size}, batch {batch}"
                rows.append(row(args, kind, name, size, "MB", theirs, peak, theirs / peak, "-"))

    print()
    results = {
        "largest_difference_of_maps": agreement,
        "samples": {
            what: {name: timing.samples for name, timing in both.items()}
            for what, both in samples.items()
        },
    }
    settings = ("model", "sizes", "classes", "repeats")
    more = {
        "accelerator": args.accelerator,
        "batch": {size: BATCH.get(size, 2) for size in args.sizes},
    }
    return conclude(args, [own._asdict() for own in rows], settings, results, **more)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--reference", type=Path, required=True, help="clone of the released code")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 512])
    parser.add_argument("--classes", type=int, default=171)
    parser.add_argument("--model", default="ViT-B-16", help="any of OpenAI's, as open_clip says it")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; as many as it wants by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the table as json")
    parser.add_argument("--measure-memory", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--memory-batch", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def import_released(reference: Path) -> tuple[Any, Callable[[str, dict[str, Tensor]], Any]]:
    """The clone's package `clip`, and how it builds a model from a state dict."""
    if not (reference / "clip" / "clip_surgery_model.py").is_file():
        sys.exit(f"--reference {reference}: expected a clone of xmed-lab/CLIP_Surgery there")
    try:
        importlib.import_module("pkg_resources")
    except ModuleNotFoundError:
        # It takes `packaging` from there, which setuptools no longer has.
        stand_in: Any = types.ModuleType("pkg_resources")
        stand_in.packaging = importlib.import_module("packaging")
        importlib.import_module("packaging.version")
        sys.modules["pkg_resources"] = stand_in
    sys.path.insert(0, str(reference))
    package = importlib.import_module("clip")
    return package, importlib.import_module("clip.build_model").build_model


def prepare(args: argparse.Namespace, size: int) -> tuple[Tensor, Tensor, Released, Ours, Ours]:
    """Images [B, 3, size, size], texts [T, C] of unit length, and who is to explain them.

    The released model stretches its position embeddings in place: it serves one size.
    """
    backbone = surgery.load_backbone(
        args.model, None, image_size=size, quick_gelu=True, class_token="released"
    )
    device = torch.device("cuda" if args.accelerator == "gpu" else "cpu")
    backbone.to(device)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH.get(size, 2), 3, size, size, generator=draw).to(device)
    text = torch.randn(args.classes, backbone.embed_dim, generator=draw).to(device)
    text = torch.nn.functional.normalize(text, dim=-1)
    released = Released(args.reference, backbone, args.model)
    return images, text, released, Ours(backbone), Ours(backbone, bf16=True)


def disagreement(released: Released, ours: Ours, images: Tensor, text: Tensor) -> float:
    """Largest difference of the maps of both."""
    theirs = torch.cat(released.explain(images, text)).permute(0, 3, 1, 2)
    return float((theirs - ours.explain(images, text)).abs().max())


def measure(args: argparse.Namespace, contestants: dict[str, Callable[[], object]]) -> Any:
    """Two rounds of warming up: the first one also pays for memory that is touched first."""
    synchronize = args.accelerator == "gpu"
    return side_by_side(contestants, repeats=args.repeats, warmup=2, synchronize=synchronize)


def row(args: argparse.Namespace, kind: str, what: str, size: int, *values: Any) -> Row:
    """A line of the table, with its goal where there is one for these settings."""
    usual = (args.model, args.classes, args.accelerator) == ("ViT-B-16", 171, "cpu")
    goal = GOALS.get((kind, size)) if usual else None
    return Row(what, *values, goal, None if goal is None else values[3] >= goal)


def fresh_peak_growth(size: int, batch: int, contestant: str) -> float:
    """`peak_growth` in a process of its own, started with this one's arguments."""
    command = [sys.executable, *sys.argv, "--sizes", str(size), "--measure-memory", contestant]
    command += ["--memory-batch", str(batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def peak_growth(args: argparse.Namespace, size: int, contestant: str) -> float:
    """Megabytes that an end-to-end call takes at its peak above what was held before it."""
    images, text, *all_three = prepare(args, size)
    images = images[: args.memory_batch]
    explain = all_three[CONTESTANTS.index(contestant)].explain
    explain(images[:1, :, :32, :32], text[:2])  # what is set up once is no part of it
    if args.accelerator == "gpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        maps = explain(images, text)
        peak = torch.cuda.max_memory_allocated()
        del maps
        return (peak - before) / 1e6
    # Not getrusage's ru_maxrss: it remembers the loading of the weights, which took more.
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    before = high_water()
    maps = explain(images, text)
    peak = high_water()
    del maps
    return (peak - before) / 1e6


def high_water() -> int:
    """Peak of this process's resident memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status: peak memory is measured on Linux only")


if __name__ == "__main__":
    sys.exit(main())
