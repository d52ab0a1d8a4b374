"""Train the demo CLIP, measure what was trained, publish the best of several runs.

    python -m tools.train_demo_clip train --output runs/1-shapes --recipe.seed 1 --recipe.hardest 0.75
    python -m tools.train_demo_clip train --output runs/1 --recipe.seed 1 --recipe.start runs/1-shapes \
        --recipe.difficulty 1 --recipe.steps 1800 --recipe.decay_from 600 \
        --recipe.muon_rate 2e-3 --recipe.adam_rate 7e-4
    (and so with seed 0, in runs/0)
    python -m tools.train_demo_clip score --model runs/1
    python -m tools.train_demo_clip publish --runs "[runs/0, runs/1]" --output surgery/demo_clip

From the project's folder.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from jsonargparse import auto_cli

from tools.train_demo_clip import card, scoring, training


def train(
    output: Path,
    recipe: training.Recipe = training.Recipe(),  # noqa: B008  (frozen)
    processes: int = 2,
    threads: int = 1,
    resume: Path | None = None,
) -> None:
    """Train a model; a recipe gives the same one on the same machine, processes and threads.

    Args:
        output: folder of a stock open_clip model (config.json, model.safetensors) and of what is
            known of its training (card.json).
        recipe: the hyperparameters.
        processes: that share every batch: one for each core is the quickest.
        threads: of each process.
        resume: folder of a run that was broken off, to go on where it stopped.
    """
    training.run(recipe, output, processes, threads, resume)


def score(model: Path, scenes: int = 256, background: str | None = None, blocks: int = 6) -> None:
    """Print what a model can do on held-out scenes, as json.

    Args:
        model: its folder.
        scenes: how many.
        background: one for all; by default all that were shown in training.
        blocks: that are reformed.
    """
    found = scoring.score(model, scenes=scenes, background=background, blocks=blocks)
    print(json.dumps(asdict(found), indent=2))


def publish(runs: list[Path], output: Path, scenes: int = 256) -> None:
    """Measure models, copy the one with the best mIoU of surgery, and write the card of all.

    Args:
        runs: their folders.
        output: where the model and its card, README.md, go.
        scenes: held-out scenes to measure on.
    """
    card.publish(runs, output, scenes=scenes)


if __name__ == "__main__":
    auto_cli([train, score, publish], as_positional=False)
