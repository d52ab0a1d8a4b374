"""What a trained model can do, by the project's own tasks on scenes that training never showed."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
from datamodules import Shapes
from datamodules._convert import write_shards
from tools.train_demo_clip.model import IMAGE
from tools.train_demo_clip.scenes import HELD_OUT_WORLD

METHODS = ("surgery", "architecture", "clip")
"""What explains the scenes, see ``lightning list methods``; the first has the headline."""


@dataclass(frozen=True)
class Scores:
    """Measured on so many held-out ``scenes``; see `tasks.Run.summary`.

    Attributes:
        scenes: how many.
        explainability: summary of a run of the task with all of `METHODS`.
        recognition: summary of a run of the task.
    """

    scenes: int
    explainability: dict[str, Any]
    recognition: dict[str, Any]

    def mean(self, method: str, metric: str) -> float:
        """mIoU or mSC of a method, a fraction."""
        return _number(self.explainability["methods"][method][metric])

    def of_noun(self, noun: str, method: str, metric: str) -> float:
        """IoU or SC of a noun by a method, a fraction; NaN where no scene has it."""
        prefix = "" if method == METHODS[0] else f"{method}."
        return _number(self.explainability["per_class"].get(noun, {}).get(prefix + metric))

    def precision(self, way: str, noun: str | None = None) -> float:
        """Average precision of a noun, or the mean of all, with classes ranked in some way.

        Args:
            way: what the columns of Recognition end in: cosine, code, paper, ...
            noun: one of them; NaN where no scene has it.
        """
        form = self.recognition["details"]["form"]
        ending = "" if way == form else f"_{way}"
        if noun is None:
            return _number(self.recognition["metrics"][f"mAP{ending}"])
        return _number(self.recognition["per_class"].get(noun, {}).get(f"AP{ending}"))

    @property
    def whole_image(self) -> float:
        """mIoU of masks of the whole image."""
        return _number(self.explainability["details"]["mIoU_all_foreground"])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def score(
    model: Path, *, scenes: int = 256, background: str | None = None, blocks: int = 6
) -> Scores:
    """Run Explainability and Recognition on held-out scenes at full difficulty, on the CPU.

    Args:
        model: folder of its config.json and model.safetensors.
        scenes: how many.
        background: one for all scenes; by default all that were shown in training.
        blocks: that are reformed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Shapes.source(scenes, HELD_OUT_WORLD, IMAGE, background)
        write_shards(source, folder / "shards", shard_size=64, workers=1)
        backbone = {
            "model": str(model / "config.json"),
            "pretrained": str(model / "model.safetensors"),
            "blocks": blocks,
        }

        def summary(task: str, **fields: Any) -> dict[str, Any]:
            run = tasks.predict(
                {
                    "model": {"class_path": task, "init_args": {"backbone": backbone, **fields}},
                    "data": {"class_path": "Shapes", "init_args": {"num_workers": 0}},
                    "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
                },
                **{"data.shards": str(folder / "shards"), "writer.output": str(folder / task)},
            )
            return run.summary

        return Scores(
            scenes, summary("Explainability", methods=list(METHODS)), summary("Recognition")
        )
