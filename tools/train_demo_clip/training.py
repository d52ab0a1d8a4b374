"""Training: the contrastive loss, the curriculum, and the processes that share every batch."""

from __future__ import annotations

import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from common.files import write_atomically
from datamodules._drawing import NOUNS, Draws, draw_scene
from surgery.metrics import MeanAveragePrecision
from tools.train_demo_clip.model import (
    GRID,
    IMAGE,
    PATCH,
    DemoCLIP,
    load,
    patchify,
    save,
    whitened_cosines,
)
from tools.train_demo_clip.scenes import (
    HELD_OUT_WORLD,
    STAGE_WORLD,
    TRAINING_WORLD,
    Ring,
    Words,
)

TEMPLATES = ("a {}.", "a photo of a {}.", "a picture of a {}", "there is a {}")

CLIMB = ((0.9, 0.075), (0.75, 0.045))
"""The curriculum: mAP on new scenes of the stage above which the difficulty rises, and by how much."""

PUSH = 0.0375
"""By how much it rises above the lower mAP that a recipe says."""

STORED_EVERY, WRITTEN_EVERY = 250, 500
"""Steps between states from which a run can go on, and between models."""


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run.

    Args:
        steps: of the optimisers.
        seed: of the world, the captions and the first weights.
        batch: pairs of image and caption a step.
        ring: scenes at hand.
        fresh: new scenes a step.
        muon_rate: highest learning rate of the blocks' matrices.
        adam_rate: and of all other parameters.
        weight_decay: of all but vectors.
        clip: largest norm of the gradient.
        warm_up: steps in which the learning rate rises.
        decay_from: step from which it falls; by default at 55 % of all.
        start: folder of a model to start from.
        difficulty: of the world at first, in [0, 1].
        hardest: where the difficulty ends.
        push: mAP on new scenes above which it rises a little; above higher ones it rises by more.
        last_rate: the last learning rate, of the highest.
        patch_dropout: share of an image's patches that are left out.
        tail: share of the steps, the last ones, in which none is.
        unknown_words: share of the captions with words that no caption has.
        test_every: steps between tests on new scenes.
        test_scenes: how many these are.
        held_out: scenes that a model is tested on when it is written.
    """

    steps: int = 4200
    seed: int = 0
    batch: int = 96
    ring: int = 6144
    fresh: int = 48
    muon_rate: float = 3e-3
    adam_rate: float = 1e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    warm_up: int = 60
    decay_from: int | None = None
    start: str | None = None
    difficulty: float = 0.0
    hardest: float = 1.0
    push: float = 0.45
    last_rate: float = 0.01
    patch_dropout: float = 0.5
    tail: float = 0.05
    unknown_words: float = 0.15
    test_every: int = 50
    test_scenes: int = 192
    held_out: int = 512

    @property
    def falls(self) -> int:
        """The step from which the learning rate falls."""
        return round(0.55 * self.steps) if self.decay_from is None else self.decay_from

    def rate(self, step: int) -> float:
        """The learning rate as a fraction of its highest: up, constant, down along a cosine."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        past = max(0.0, (step - self.falls) / max(1, self.steps - self.falls))
        low = self.last_rate
        return low + (1 - low) * (1 + math.cos(math.pi * past)) / 2

    def climb(self, mean: float) -> float:
        """How much the difficulty rises after an mAP on new scenes of the present one."""
        return next((step for above, step in (*CLIMB, (self.push, PUSH)) if mean > above), 0.0)


@dataclass(frozen=True)
class Team:
    """The processes of a run, which share every batch."""

    rank: int = 0
    size: int = 1

    def gather(self, features: Tensor) -> Tensor:
        """The features [B, C] of all processes, [size B, C]; only one's own carry gradients."""
        if self.size == 1:
            return features
        parts = [torch.empty_like(features) for _ in range(self.size)]
        dist.all_gather(parts, features.detach())
        parts[self.rank] = features
        return torch.cat(parts)

    def add_gradients(self, model: DemoCLIP) -> None:
        """Each process has the gradient by its own features: their sum is the batch's."""
        if self.size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, total in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(total.view_as(gradient))
        if model.logit_scale.grad is not None:  # known in full to every process
            model.logit_scale.grad /= self.size

    def agree(self, value: float) -> float:
        """The first process's value."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)


def optimisers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest; no decay of vectors."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "resblocks" in name and p.ndim == 2]
    others = [p for name, p in named if "resblocks" not in name and p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    decay = recipe.weight_decay
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.muon_rate,
            momentum=0.95,
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": others, "weight_decay": decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.adam_rate,
            betas=(0.9, 0.98),
        ),
    ]


class Training:
    """A run in one of its processes: the model, the scenes at hand, and how far it has come.

    Args:
        recipe: the hyperparameters.
        output: folder of the model.
        team: this process among the others.
    """

    def __init__(self, recipe: Recipe, output: Path, team: Team) -> None:
        self.recipe, self.output, self.team = recipe, output, team
        self.began = time.monotonic()
        torch.manual_seed(recipe.seed)
        self.words = Words()
        sample = [draw_scene(STAGE_WORLD - 1, i, IMAGE).image for i in range(128)]
        basis = whitened_cosines(torch.cat([patchify(image) for image in sample]))
        self.model = DemoCLIP(basis, 1 + len(self.words.ids))
        self.optimisers = optimisers(self.model, recipe)
        self.groups = [group for each in self.optimisers for group in each.param_groups]
        self.highest = [group["lr"] for group in self.groups]
        self.held, self.batch, self.fresh = (
            total // team.size for total in (recipe.ring, recipe.batch, recipe.fresh)
        )
        pixels = torch.empty((self.held, GRID * GRID, 3 * PATCH * PATCH), dtype=torch.uint8)
        self.ring = Ring(TRAINING_WORLD + recipe.seed, pixels, team.rank, team.size)
        self.draws = Draws(recipe.seed, TRAINING_WORLD, team.rank)
        torch.manual_seed(recipe.seed + 1000 * team.rank)
        self.stages: list[dict[str, Any]] = []
        self.difficulty, self.tested, self.step, self.losses = recipe.difficulty, 0, 0, 0.0
        if recipe.start:
            load(self.model, self.words.ids, Path(recipe.start))
            card = json.loads((Path(recipe.start) / "card.json").read_text())
            self.stages = card["stages"]
            self.ring.drawn = sum(stage["scenes"] for stage in self.stages) // team.size
            self.tested = 100_000

    def train(self, resume: Path | None = None) -> None:
        """Run the recipe; write the model and its card, also on the way.

        With a folder where another run left its state on the way, go on from there. As long as both
        have a constant rate up to there, this is the same as running the recipe from the start.
        """
        recipe = self.recipe
        if resume:
            self._take(resume)
        else:
            self.ring.add(self.held, self.difficulty)
        self._print(f"ready after {self._seconds():.0f} s: {len(self.words.ids)} tokens")
        while self.step < recipe.steps:
            self._learn()
            self.step += 1
            last = self.step == recipe.steps
            if self.step % recipe.test_every == 0:
                self._test()
            if self.step % STORED_EVERY == 0 and not last:
                self._store()
            if self.team.rank == 0 and (last or self.step % WRITTEN_EVERY == 0):
                self._write()

    def _learn(self) -> None:
        """One step."""
        recipe, model = self.recipe, self.model
        for group, top in zip(self.groups, self.highest, strict=True):
            group["lr"] = top * recipe.rate(self.step)
        self.ring.add(self.fresh, self.difficulty)
        slots = torch.randperm(self.held)[: self.batch]
        captions = [
            self.ring.words(int(slot), self.draws, self.words, recipe.unknown_words)
            for slot in slots
        ]
        tokens, end = self.words.batch(captions)
        patches, count = self.ring.patches[slots], GRID * GRID
        kept = torch.arange(count).expand(self.batch, -1)
        if self.step < recipe.steps * (1 - recipe.tail):
            left = round(count * (1 - recipe.patch_dropout))
            kept = torch.rand(self.batch, count).argsort(1)[:, :left].contiguous()
            patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
        with torch.autocast("cpu", torch.bfloat16):
            image, text = (
                self.team.gather(features) for features in model(patches, kept, tokens, end)
            )
            loss = contrastive_loss(image, text, model.logit_scale)
        loss.backward()
        self.team.add_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        self.losses += float(loss.detach())

    def _test(self) -> None:
        """Test on new scenes as hard as the present ones; raise the difficulty."""
        recipe, found = self.recipe, 0.0
        if self.team.rank == 0:
            scenes = Scenes(STAGE_WORLD + recipe.seed, self.tested, recipe.test_scenes)
            found = float(recognition(self.model, self.words, scenes, self.difficulty).compute())
        found = self.team.agree(found)
        self.tested += recipe.test_scenes
        self._print(
            f"step {self.step:5d}  difficulty {self.difficulty:.2f}  "
            f"loss {self.losses / recipe.test_every:.3f}  mAP {found:.3f}  "
            f"scale {float(self.model.logit_scale.exp().detach()):.1f}  "
            f"{self.step * self.batch * self.team.size / self._seconds():.0f} samples/s  "
            f"{self._seconds():.0f} s"
        )
        self.losses = 0.0
        risen = min(recipe.hardest, self.difficulty + recipe.climb(found))
        self.difficulty = max(self.difficulty, risen)

    def _write(self) -> None:
        """Write the model and its card."""
        recipe, done = self.recipe, sum(stage["scenes"] for stage in self.stages)
        found = recognition(
            self.model, self.words, Scenes(HELD_OUT_WORLD, 0, recipe.held_out), difficulty=1.0
        )
        mean, each = float(found.compute()), found.per_class().tolist()
        self._print(f"step {self.step:5d}  held-out mAP {mean:.4f}")
        stage = {
            "recipe": asdict(recipe),
            "steps_done": self.step,
            "difficulty": self.difficulty,
            "scenes": self.ring.drawn * self.team.size - done,
            "seconds": round(self._seconds()),
            "processes": self.team.size,
            "threads": torch.get_num_threads(),
        }
        card = {
            "seed": recipe.seed,
            "stages": [*self.stages, stage],
            "mAP": mean,
            "AP": dict(zip(NOUNS, each, strict=True)),
        }
        save(self.model, self.words.ids, self.output)
        write_atomically(self.output / "card.json", json.dumps(card, indent=2) + "\n")

    def _store(self) -> None:
        """Write all that `_take` needs to go on from here."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "progress": (self.ring, self.draws, self.difficulty, self.tested, self.step),
            "seconds": self._seconds(),
            "random": torch.get_rng_state(),
        }
        self.output.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.output / f"state_{self.team.rank}.pt")

    def _take(self, folder: Path) -> None:
        # Written by `_store`, and more than tensors.
        state = torch.load(folder / f"state_{self.team.rank}.pt", weights_only=False)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.groups = [group for each in self.optimisers for group in each.param_groups]
        self.ring, self.draws, self.difficulty, self.tested, self.step = state["progress"]
        self.began -= state["seconds"]
        torch.set_rng_state(state["random"])

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _print(self, line: str) -> None:
        if self.team.rank == 0:
            print(line, flush=True)


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric loss of the pairs of unit features [B, C] and [B, C]."""
    logits = logit_scale.exp() * image @ text.T
    pair = torch.arange(len(logits))
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


@dataclass(frozen=True)
class Scenes:
    """So many scenes of a world, from one on."""

    world: int
    first: int
    count: int


@torch.no_grad()
def recognition(
    model: DemoCLIP, words: Words, scenes: Scenes, difficulty: float
) -> MeanAveragePrecision:
    """How well nouns are found in scenes: the curriculum's signal, quick and in bfloat16."""
    drawn = [
        draw_scene(scenes.world, scenes.first + i, IMAGE, difficulty=difficulty)
        for i in range(scenes.count)
    ]
    patches = torch.stack([patchify(scene.image) for scene in drawn])
    everything = torch.arange(GRID * GRID).expand(scenes.count, -1)
    with torch.autocast("cpu", torch.bfloat16):
        image = torch.cat(
            [
                model.visual(part, kept)
                for part, kept in zip(patches.split(64), everything.split(64), strict=True)
            ]
        )
        prompts = [words.rows(template.format(noun)) for noun in NOUNS for template in TEMPLATES]
        text = F.normalize(model.encode_text(*words.batch(prompts)).float(), dim=-1)
    text = F.normalize(text.view(len(NOUNS), len(TEMPLATES), -1).mean(1), dim=-1)
    metric = MeanAveragePrecision(len(NOUNS))
    truth = torch.tensor([[noun in scene.nouns for noun in NOUNS] for scene in drawn])
    metric.update(F.normalize(image.float(), dim=-1) @ text.T, truth)
    return metric


def run(recipe: Recipe, output: Path, processes: int, threads: int, resume: Path | None) -> None:
    """Train in some processes of some threads each; see `Training.train`."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (recipe, output, processes, threads, resume, f"{folder}/meet")
        if processes > 1:
            torch.multiprocessing.spawn(member, arguments, nprocs=processes)
        else:
            member(0, *arguments)


def member(
    rank: int, recipe: Recipe, output: Path, size: int, threads: int, resume: Path | None, meet: str
) -> None:
    """One process of a run; they find each other by the file ``meet``."""
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    Training(recipe, output, Team(rank, size)).train(resume)
    if size > 1:
        dist.destroy_process_group()
