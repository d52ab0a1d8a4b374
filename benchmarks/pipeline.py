"""Does `lightning predict` keep the model busy? Images/s of whole runs, from decoding to writing.

    python benchmarks/pipeline.py --output pipeline.json
    python benchmarks/pipeline.py --scaling --shards --batch-size 4
    python benchmarks/pipeline.py --profile --task Segmentation --image-size 512

Shards of drawn scenes of 500 x 375 pixels, in JPEGs as large as VOC's, go through the real command
line with a random network, in processes of their own; one callback, named on the command line,
notes when each batch is done. Contestants take turns; medians are shown.

    (default)   steady rate of a run over that of its model alone: `encode_image` of one batch again
                and again, in a fresh process of the same precision and threads
    --scaling   steady rate of two ranks over that of one, each of one thread and without workers
    --shards    seconds an image, with the merging at the end, of the same images in 1, 10, 100 shards
    --profile   where the time goes, in this process alone, without workers (on a GPU the times
                are those of waiting)

A steady rate begins after the first three batches and ends when the loader has no work left: until
there, workers make as many batches as the model takes.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import logging
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _timing import Timing, conclude, format_table
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

import surgery
from datamodules._convert import Members, Source, png_bytes, write_shards
from datamodules._drawing import draw_scene
from datamodules._samples import Batch
from datamodules.shapes import INFO

HEIGHT, WIDTH = 375, 500
QUALITY = 98
"""Drawn scenes compress well: at this quality a file has about 100 kB, as VOC's photographs have."""

PICTURES = 64
"""Different scenes; a longer run sees them again."""

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
FIRST = 2
"""The batch, from 0, whose end is where steady rates begin."""

RATE_GOAL = {"cpu": 0.90, "gpu": 0.85}
SCALING_GOAL, FLAT_GOAL = 1.9, 1.05


class Note(NamedTuple):
    """So many images were done at this moment, in seconds."""

    at: float
    images: int


class Clock(Callback):
    """Notes the end of every batch, and of the run, in one file a rank; given to the Trainer."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.notes: list[Note] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.notes.append(Note(time.time(), len(batch.keys)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The summary is written by now."""
        self.notes.append(Note(time.time(), 0))
        Path(f"{self.path}.{trainer.global_rank}").write_text(json.dumps(self.notes))


def main() -> int:
    args = parse_args()
    if args.measure_model:
        logging.disable(logging.WARNING)  # that random weights mean nothing
        print(model_seconds(args))
        return 0
    rows: list[dict[str, Any]] = []
    samples: dict[str, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The first run fills it, the others' start is quick.
        os.environ["CLIP_SURGERY_CACHE"] = str(folder / "cache")
        if args.profile:
            print(format_table(profile(args, folder)))
        for part in parts(args):
            more, taken = part(args, folder)
            rows += more
            samples |= {name: timing.samples for name, timing in taken.items()}
    settings = ("model", "task", "image_size", "precision", "batch_size", "workers", "images")
    settings += ("fields", "threads", "repeats", "accelerator")
    return conclude(args, rows, settings, {"s_per_image": samples})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--shards", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--model", default="ViT-B-16", help="as of load_backbone; random weights")
    parser.add_argument("--task", default="Explainability", help="any that fits the drawn world")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--precision", choices=AUTOCAST, default="32-true")
    parser.add_argument("--batch-size", type=int, help="8, on a GPU 64, by default")
    parser.add_argument("--workers", type=int, default=2, help="the loader's, of the first part")
    parser.add_argument("--images", type=int, help="rounded up to what fits; 40 batches by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; as many as it wants by default")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--fields",
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="of the run besides, such as data.decoder=torchcodec or model.backbone.compile=true",
    )
    parser.add_argument("--output", type=Path, help="also write the table and all runs as json")
    parser.add_argument("--measure-model", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch_size = args.batch_size or {"cpu": 8, "gpu": 64}[args.accelerator]
    args.images = args.images or 40 * args.batch_size
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes started from here
    return args


Part = Callable[[argparse.Namespace, Path], tuple[list[dict[str, Any]], dict[str, Timing]]]
"""Measures something; rows of the table, and seconds an image of all contestants."""


def parts(args: argparse.Namespace) -> list[Part]:
    chosen: list[Part] = [scaling] * args.scaling + [flatness] * args.shards
    return chosen if chosen or args.profile else [rate]


def rate(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """The whole run beside its model alone."""
    shards = draw_shards(args, folder, whole(args.images, 10 * args.batch_size), 10)
    taken = in_turns(
        {
            "model": fresh_model_seconds,
            "run": lambda: steady(predict(args, folder, shards), args.workers),
        },
        args.repeats,
    )
    ratio = taken["model"].over(taken["run"]).median
    goal = RATE_GOAL[args.accelerator]
    what = f"images/s of {describe(args)}, {args.workers} workers; reference: its model alone"
    values = [1 / taken[name].median for name in ("model", "run")]
    return [row(what, *values, ratio, f">= {goal}", ratio >= goal)], taken


def scaling(
    args: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """Two ranks beside one."""
    images = whole(args.images, 20 * args.batch_size)  # both ranks have as many shards
    shards = draw_shards(args, folder, images, 10)
    taken = in_turns(
        {
            name: lambda ranks=ranks: steady(predict(args, folder, shards, ranks=ranks), 0)
            for name, ranks in (("one rank", 1), ("two ranks", 2))
        },
        args.repeats,
    )
    ratio = taken["one rank"].over(taken["two ranks"]).median
    what = f"images/s of {describe(args)}, two ranks of one thread; reference: one"
    values = [1 / taken[name].median for name in ("one rank", "two ranks")]
    return [row(what, *values, ratio, f">= {SCALING_GOAL}", ratio >= SCALING_GOAL)], taken


def flatness(
    args: argparse.Namespace, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Timing]]:
    """The same images in ever more shards."""
    batches = whole(args.images, 100 * args.batch_size) // args.batch_size
    counts = (1, 10, 100)
    cut = {
        count: draw_shards(args, folder, batches * args.batch_size, batches // count)
        for count in counts
    }
    taken = in_turns(
        {
            f"{count} shards": lambda shards=shards: to_the_end(predict(args, folder, shards))
            for count, shards in cut.items()
        },
        args.repeats,
    )
    rows = []
    for count in counts[1:]:
        own, one = taken[f"{count} shards"], taken["1 shards"]
        ratio = own.over(one).median
        what = f"s/image of {describe(args)}, {count} shards; reference: 1"
        goal = (f"<= {FLAT_GOAL}", ratio <= FLAT_GOAL)
        rows.append(row(what, one.median, own.median, ratio, *goal))
    return rows, taken


def in_turns(contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, Timing]:
    """What contestants say of themselves, called in turns; who begins changes every time."""
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repeats):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(contestants[name]())
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


def draw_shards(args: argparse.Namespace, folder: Path, images: int, batches: int) -> Path:
    """Shards of so many batches each, in a folder of their own."""
    pictures: list[Members] = []
    for index in range(min(PICTURES, images)):
        scene = draw_scene(0, index, (HEIGHT, WIDTH), background="clouds")
        jpeg = io.BytesIO()
        Image.fromarray(scene.image).save(jpeg, "JPEG", quality=QUALITY)
        label = png_bytes(scene.label, INFO.flat_palette())
        pictures.append({"jpg": jpeg.getvalue(), "label.png": label, "txt": scene.caption.encode()})

    def read(index: int) -> Members:
        return {"__key__": f"{index:08d}", **pictures[index % len(pictures)]}

    output = Path(tempfile.mkdtemp(prefix="shards", dir=folder))
    source = Source(INFO, "drawn", range(images), read)
    write_shards(source, output, shard_size=batches * args.batch_size, workers=1)
    return output


def predict(
    args: argparse.Namespace, folder: Path, shards: Path, *, ranks: int | None = None
) -> list[list[Note]]:
    """Notes of every rank of a run; where `ranks` are given, each has one thread and no workers."""
    output = Path(tempfile.mkdtemp(prefix="run", dir=folder))
    env, words = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parent)}, []
    if ranks is not None:
        env["OMP_NUM_THREADS"] = "1"
        words += [f"--trainer.devices={ranks}"] + ["--trainer.strategy=ddp"] * (ranks > 1)
    clock = {"class_path": "pipeline.Clock", "init_args": {"path": f"{output}.notes"}}
    workers = args.workers if ranks is None else 0
    command = [sys.executable, "-m", "tasks", "predict", *options(args, shards, output, workers)]
    command += [f"--trainer.callbacks={json.dumps([clock])}", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")
    files = [Path(f"{output}.notes.{rank}") for rank in range(ranks or 1)]
    return [[Note(*note) for note in json.loads(file.read_text())] for file in files]


def options(args: argparse.Namespace, shards: Path, output: Path, workers: int) -> list[str]:
    """The command line of a run."""
    pretrained = "demo" if args.model == "demo" else "null"
    return [
        *(f"--model={args.task}", f"--model.backbone.model={args.model}"),
        f"--model.backbone.pretrained={pretrained}",
        f"--model.backbone.image_size={args.image_size}",
        *("--data=Shapes", f"--data.shards={shards}", f"--data.batch_size={args.batch_size}"),
        *(f"--data.num_workers={workers}", f"--writer.output={output}"),
        *(f"--trainer.accelerator={args.accelerator}", f"--trainer.precision={args.precision}"),
        "--trainer.enable_progress_bar=false",
        *(f"--{field}" for field in args.fields),
    ]


def steady(ranks: list[list[Note]], workers: int) -> float:
    """Seconds an image while all ranks were at work, and their loaders too."""
    ahead = 2 * workers  # torch's prefetch_factor
    windows = [notes[FIRST : len(notes) - 1 - ahead] for notes in ranks]
    if min(map(len, windows)) < 5:
        sys.exit("too few batches for a steady rate: give more --images, or fewer --workers")
    begin, end = max(w[0].at for w in windows), min(w[-1].at for w in windows)
    rates = []
    for window in windows:
        inside = [note for note in window if begin <= note.at <= end]
        images = sum(note.images for note in inside[1:])
        rates.append(images / (inside[-1].at - inside[0].at))
    return 1 / sum(rates)


def to_the_end(ranks: list[list[Note]]) -> float:
    """Seconds an image of a single rank until all is written and merged, but for its start."""
    (notes,) = ranks
    later = notes[FIRST:]
    return (later[-1].at - later[0].at) / sum(note.images for note in later[1:])


def model_seconds(args: argparse.Namespace) -> float:
    """Seconds an image of `encode_image` alone, over as many batches as a run has."""
    weights = "demo" if args.model == "demo" else None
    static = args.batch_size if "model.backbone.compile=true" in args.fields else None
    backbone = surgery.load_backbone(
        args.model, weights, image_size=args.image_size, static_batch=static
    )
    device = torch.device("cuda" if args.accelerator == "gpu" else "cpu")
    backbone.to(device)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    dtype, moments = AUTOCAST[args.precision], []
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
        for _ in range(-(-args.images // args.batch_size)):
            backbone.encode_image(images)
            if args.accelerator == "gpu":
                torch.cuda.synchronize()
            moments.append(time.perf_counter())
    steps = moments[FIRST:]
    return (steps[-1] - steps[0]) / (len(steps) - 1) / args.batch_size


def fresh_model_seconds() -> float:
    """`model_seconds` in a process of its own, started with this one's arguments."""
    command = [sys.executable, *sys.argv, "--measure-model"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def profile(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds an image of each step of a run in this process."""
    from tasks.commands import predict as command

    if args.threads:
        torch.set_num_threads(args.threads)
    images = whole(args.images, 10 * args.batch_size)
    shards = draw_shards(args, folder, images, 10)
    profiler = cProfile.Profile()
    code = profiler.runcall(command.main, options(args, shards, folder / "profiled", 0))
    assert code == 0, f"predict ended with {code}"
    calls: Any = pstats.Stats(profiler)

    def spent(file: str, *functions: str) -> float:
        """Seconds within functions of a file, or of a folder's files, and all that they call."""
        return sum(
            values[3]
            for (path, _, name), values in calls.stats.items()
            if file in Path(path).as_posix() and name in functions
        )

    whole_run = spent("lightning/pytorch/loops/prediction_loop.py", "run")
    resize = spent("PIL/Image.py", "resize")
    sample = spent("datamodules/_decode.py", "__call__")
    loader = spent("datamodules/_shards.py", "_batch", "_entries")
    inside = {
        "preprocess": spent("surgery/backbone.py", "preprocess"),
        "encode": spent("surgery/backbone.py", "encode_image"),
        "similarity, surgery": spent("surgery/features.py", "similarity", "feature_surgery"),
        "maps": spent("surgery/features.py", "similarity_map")
        + spent("surgery/labels.py", "label_maps"),
        "metrics": spent("surgery/metrics/", "update", "update_together"),
    }
    table = {
        "decode": sample - resize,
        "resize": resize,
        "index shards, collate": loader - sample,
        "decode and resize on the device": spent("datamodules/_device_decode.py", "decode_pending"),
        **inside,
        "the rest of the step": spent("/tasks/", "predict_step") - sum(inside.values()),
        "write": spent("tasks/run/callback.py", "write_on_batch_end"),
        "merge at the end": spent("tasks/run/folder.py", "summarise"),
    }
    table["start, Lightning, transfer"] = whole_run - sum(table.values())
    table["all"] = whole_run
    return [
        {"what": what, "ms/image": 1000 * seconds / images, "share": f"{seconds / whole_run:.1%}"}
        for what, seconds in table.items()
    ]


def describe(args: argparse.Namespace) -> str:
    settings = [args.task, args.image_size, args.precision, f"batch {args.batch_size}"]
    return ", ".join(map(str, [*settings, *args.fields]))


def whole(count: int, unit: int) -> int:
    """The least multiple of a unit that is not below a count."""
    return -(-count // unit) * unit


def row(
    what: str, reference: float, ours: float, ratio: float, goal: str, met: bool
) -> dict[str, Any]:
    return {
        "what": what,
        "reference": reference,
        "ours": ours,
        "ratio": ratio,
        "goal": goal,
        "met": met,
    }


if __name__ == "__main__":
    sys.exit(main())
