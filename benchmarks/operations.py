"""What would a GPU wait for? Operations and waits of the host an image, counted without a GPU.

    python -m benchmarks.operations --batch-size 64

One batch of random pictures goes through ``predict_step`` on a GPU that is pretended: the numbers are
made by the CPU, and whoever mixes devices is refused. What the encoder does for it is left out.

An operation is what starts work on the GPU, some 5 microseconds of the host's time each; a wait, some 25,
is where the host needs a number of the GPU's, or copies without a promise. The sizes of the pictures are
spread as VOC's are: half are 500 x 375, a fifth have a size that no other has.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks._pretended_gpu import CPU, CUDA, PretendedGPU
from datamodules import Shapes
from datamodules._samples import Batch, Sample
from tasks import Analysis, Explainability, Interactive, Multimodal, Recognition, Segmentation
from tasks._task import BackboneConfig, Task

GOALS = {
    "Explainability": 12,
    "Segmentation": 7,
    "Recognition": 2,
    "Multimodal": 7,
    "Interactive": 2,
    "Analysis": 16,
}
"""Operations an image beyond the encoder's, in batches of 16 or more, whatever sizes the images have."""

MOST_WAITS = 2
"""Of the host, a batch."""

TASKS: dict[str, Callable[..., Task]] = {
    "Explainability": Explainability,
    "Segmentation": Segmentation,
    "Recognition": Recognition,
    "Multimodal": Multimodal,
    "Interactive": Interactive,
    "Analysis": Analysis,
}
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 7, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
COMMON = ((38, 50),) * 16 + ((50, 38),) * 5 + ((33, 50),) * 4 + ((50, 33),)
"""(height, width) of 26 of 32 pictures; a tenth of VOC's."""


@dataclass(frozen=True)
class Count:
    """Of one batch.

    Attributes:
        images: how many it has.
        operations: name -> how many, beyond those of encoding the batch.
        waits: reason -> how often the host waited.
    """

    images: int
    operations: Counter[str]
    waits: Counter[str]

    @property
    def an_image(self) -> float:
        """Operations an image, the batch's own shared among all."""
        return self.operations.total() / self.images


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--all-different", action="store_true", help="no two pictures of one size")
    parser.add_argument("--which", action="store_true", help="also name the operations and waits")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # that random weights mean nothing
    missed = False
    print(f"{'task':16}{'operations an image':>20}{'goal':>6}{'waits a batch':>15}{'goal':>6}")
    for name in args.tasks:
        found = count(name, args.batch_size, all_different=args.all_different)
        goal, waits = GOALS[name], found.waits.total()
        print(f"{name:16}{found.an_image:>20.1f}{goal:>6}{waits:>15}{MOST_WAITS:>6}")
        missed |= found.an_image > goal or waits > MOST_WAITS
        if args.which:
            print(f"    {dict(found.operations.most_common())}\n    {dict(+found.waits)}")
    return int(missed)


def count(name: str, images: int, *, all_different: bool = False, **settings: Any) -> Count:
    """Take one batch through a task on a pretended GPU.

    Args:
        name: of the task.
        images: in the batch.
        all_different: no two of them have one size.
        settings: of the task.
    """
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        task = make_task(name, Path(folder), **settings)
        batch = random_batch(task, images, all_different=all_different)
        return counted(task, batch)


def counted(task: Task, batch: Batch) -> Count:
    """Count what a task does with a batch of the host."""
    with PretendedGPU() as gpu:
        gpu.put(task)
        task._device = CUDA
        task.on_predict_start()
        there = batch.to(CUDA, non_blocking=True)
        task.predict_step(there)  # what is made once and kept is no part of a batch
        task.measures.pop()
        gpu.clear()
        task.encode_images(there.images)
        encoding = Counter(gpu.operations)
        gpu.clear()
        list(task.predict_step(there))
        return Count(len(batch.samples), gpu.operations - encoding, +gpu.waits)


def make_task(name: str, folder: Path, **settings: Any) -> Task:
    """A task with a tiny random network, set up for the drawn world without any shards."""
    config = folder / "tiny.json"
    config.write_text(json.dumps(TINY))
    os.environ.setdefault("CLIP_SURGERY_CACHE", str(folder / "cache"))
    task = TASKS[name](BackboneConfig(str(config), None), **settings)
    strategy = SimpleNamespace(root_device=CPU, broadcast=lambda found, src: found)
    trainer = SimpleNamespace(
        datamodule=Shapes("none"), strategy=strategy, is_global_zero=True, world_size=1
    )
    task._trainer = trainer  # type: ignore[assignment]  # a stand-in
    task.setup("predict")
    return task


def random_batch(task: Task, images: int, *, all_different: bool = False) -> Batch:
    """Samples with two classes each, and void pixels between them."""
    torch.manual_seed(0)
    height, width = task.backbone.image_size
    classes = len(task.info.classes)
    samples = []
    for i in range(images):
        size = (20 + i, 40) if all_different else (*COMMON, *[(20 + i, 40)] * 6)[i % 32]
        positives = (i % (classes - 1), i % (classes - 1) + 1)
        label = torch.randint(0, 2, size, dtype=torch.uint8) * (positives[1] + 1)
        label[: size[0] // 3] = positives[0] + 1
        label[0] = task.info.void
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        caption = f"a {i % 7} of {i}" + " x" * (i % 5)
        samples.append(Sample(f"{i:06d}", image, size, label, positives, caption, {}))
    return Batch.collate("000000", 0, images, samples, [])


if __name__ == "__main__":
    raise SystemExit(main())
