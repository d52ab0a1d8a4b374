"""Train the demo CLIP on the drawn world of `datamodules._drawing`, from scratch.

    python tools/train_demo_clip.py --seed 1 --hardest 0.75 --output runs/1-shapes
    python tools/train_demo_clip.py --seed 1 --start runs/1-shapes --difficulty 1 --steps 1800 \
        --decay-from 600 --muon-rate 2e-3 --adam-rate 7e-4 --output runs/1
    (and so with --seed 0)
    python tools/train_demo_clip.py --evaluate runs/1
    python tools/train_demo_clip.py --publish runs/0 runs/1 --output surgery/demo_clip

One symmetric contrastive loss over images and their captions, nothing else: no labels, no masks, no
pretrained part. The difficulty of the world rises as the model learns to name what it sees; bright
ground comes in a run of its own, for rising to it at once left, after 3,500 steps, an mAP of 0.66
and 1.3 times raw CLIP's mIoU with surgery, where the two runs get 0.92 and 1.7 times. The output is
a stock open_clip model (`config.json`, `model.safetensors`) and what is known of the run
(`card.json`); publishing measures the runs, keeps the better one and writes the model card. The same
seed and number of steps give the same run on the same machine and number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules._drawing import BACKGROUNDS, COLOURS, NOUNS, PREFIXES, Draws, caption, draw_scene
from surgery.checkpoints import IDS, ROWS
from surgery.metrics import MeanAveragePrecision

IMAGE, PATCH = 96, 8
GRID = IMAGE // PATCH
WIDTH, HEAD, EMBED = 128, 64, 128
VISION_LAYERS, TEXT_LAYERS = 12, 3
CONTEXT, VOCABULARY = 77, 49408
WORDS = 32
"""Tokens of the longest caption seen in training; later positions stay as they were drawn."""

CONFIG: dict[str, Any] = {
    "embed_dim": EMBED,
    "vision_cfg": {
        "image_size": IMAGE,
        "layers": VISION_LAYERS,
        "width": WIDTH,
        "head_width": HEAD,
        "patch_size": PATCH,
    },
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": WIDTH // HEAD,
        "layers": TEXT_LAYERS,
    },
}

TRAINING_WORLD, STAGE_WORLD, HELD_OUT_WORLD = 700_000, 800_000, 900_000
"""Worlds drawn from here; a run's seed is added. The small seeds of users are never trained on."""

TEMPLATES = ("a {}.", "a photo of a {}.", "a picture of a {}", "there is a {}")

CLIMB = ((0.9, 0.075), (0.75, 0.045))
"""The curriculum: mAP on new scenes of the stage above which the difficulty rises, and by how much."""

PUSH = 0.0375
"""By how much it rises above the lower mAP that a recipe says."""


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run.

    The learning rate falls from step `decay_from`, or from 55% of `steps`. A run may start from the
    model in the folder `start`, at a `difficulty`; this rises, to `hardest`, also above an mAP
    of `push`.
    """

    steps: int
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

    @property
    def falls(self) -> int:
        """The step from which the learning rate falls."""
        return round(0.55 * self.steps) if self.decay_from is None else self.decay_from


# --------------------------------------------------------------------------------------------------
# The model: open_clip's parameters under open_clip's names, in a forward that is quick on a CPU


@dataclass(frozen=True)
class Team:
    """The processes of a run, which share every batch: one each for a core is the quickest."""

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


class Attention(nn.Module):
    """Self-attention by plain products: on CPUs the backward of the fused kernel is slow."""

    def __init__(self) -> None:
        super().__init__()
        query = torch.empty(WIDTH, WIDTH)
        key, value = torch.empty_like(query), torch.empty_like(query)
        for weight in (query, key, value):
            nn.init.xavier_uniform_(weight)
        # Keys near queries: at first a token looks at those which resemble it.
        self.in_proj_weight = nn.Parameter(torch.cat([query, 0.8 * query + 0.6 * key, value]))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, N, C], mask [N, N] added to the logits; returns [B, N, C]."""
        batch, length, _ = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, WIDTH // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * HEAD**-0.5
        if mask is not None:
            logits = logits + mask
        out = logits.softmax(-1).to(v.dtype) @ v
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, WIDTH))


class MLP(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH)
        for layer in (self.c_fc, self.c_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C]; returns [B, N, C]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, C]; returns [B, N, C]."""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, C]; returns [B, N, C]."""
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Conv(nn.Module):
    """Holds the patch embedding under its stock name and shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Vision(nn.Module):
    """The image tower, fed with patches instead of images."""

    mean: Tensor
    std: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH) * WIDTH**-0.5)
        self.positional_embedding = nn.Parameter(positions())
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBED) * WIDTH**-0.5)
        self.conv1 = Conv(basis)
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Transformer(VISION_LAYERS)
        self.ln_post = nn.LayerNorm(WIDTH)
        for name, values in (("mean", OPENAI_DATASET_MEAN), ("std", OPENAI_DATASET_STD)):
            pixels = torch.tensor(values).repeat_interleave(PATCH * PATCH) * 255
            self.register_buffer(name, pixels, persistent=False)

    def forward(self, patches: Tensor, kept: Tensor) -> Tensor:
        """patches uint8 [B, K, 3 P P], their places kept int64 [B, K]; returns [B, C]."""
        x = (patches.float() - self.mean) / self.std
        x = F.linear(x, self.conv1.weight.flatten(1)) + self.positional_embedding[1:][kept]
        first = self.class_embedding + self.positional_embedding[0]
        x = torch.cat([first.expand(len(x), 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class DemoCLIP(nn.Module):
    """Both towers; the token table holds the rows that captions use, row 0 every other word."""

    causal: Tensor

    def __init__(self, basis: Tensor, rows: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.01)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, EMBED) * WIDTH**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(14.3)))
        self.visual = Vision(basis)
        self.transformer = Transformer(TEXT_LAYERS)
        self.token_embedding = nn.Embedding(rows, WIDTH, padding_idx=0)
        self.ln_final = nn.LayerNorm(WIDTH)
        with torch.no_grad():
            self.token_embedding.weight[1:].normal_(std=0.02)
        mask = torch.full((WORDS, WORDS), -torch.inf).triu(1)
        self.register_buffer("causal", mask, persistent=False)

    def encode_text(self, tokens: Tensor, end: Tensor) -> Tensor:
        """tokens int64 [B, L], the place of each end token int64 [B]; returns [B, C]."""
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        x = self.transformer(x, self.causal[:length, :length])
        return self.ln_final(x[torch.arange(len(x)), end]) @ self.text_projection

    def forward(
        self, patches: Tensor, kept: Tensor, tokens: Tensor, end: Tensor, team: Team
    ) -> Tensor:
        """The symmetric contrastive loss of the pairs of all processes."""
        image = team.gather(F.normalize(self.visual(patches, kept).float(), dim=-1))
        text = team.gather(F.normalize(self.encode_text(tokens, end).float(), dim=-1))
        logits = self.logit_scale.exp() * image @ text.T
        pair = torch.arange(len(logits))
        return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


def positions() -> Tensor:
    """0.4 times the 2-D sine-cosine positions of the grid after a zero, [1 + h w, C]."""
    rates = 10000 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    angles = torch.arange(GRID)[:, None] * rates * 2
    axis = torch.cat([angles.sin(), angles.cos()], 1)  # [GRID, C / 2]
    down, across = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    grid = torch.cat([down, across], 2).flatten(0, 1)
    return torch.cat([torch.zeros(1, WIDTH), 0.4 * grid])


def whitened_cosines(patches: Tensor) -> Tensor:
    """The cosine patterns that vary most over patches [N, 3 P P], whitened, [C, 3, P, P].

    The patterns are products of the 8 x 8 cosine transform and of three opponent colours, scaled
    towards unit deviation; those which hardly vary are left small, for they are mostly noise.
    """
    at = torch.arange(PATCH)
    waves = torch.cos(math.pi / PATCH * (at + 0.5) * at[:, None])
    waves = F.normalize(waves, dim=1)
    opponent = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    patterns = torch.einsum("ac,iy,jx->aijcyx", F.normalize(opponent, dim=1), waves, waves)
    patterns = patterns.reshape(-1, 3 * PATCH * PATCH)
    mean = torch.tensor(OPENAI_DATASET_MEAN).repeat_interleave(PATCH * PATCH) * 255
    std = torch.tensor(OPENAI_DATASET_STD).repeat_interleave(PATCH * PATCH) * 255
    spread = ((patches.float() - mean) / std @ patterns.T).std(0)
    chosen = spread.argsort(descending=True, stable=True)[:WIDTH]
    return (patterns[chosen] / (spread[chosen, None] + 0.25)).view(WIDTH, 3, PATCH, PATCH)


# --------------------------------------------------------------------------------------------------
# Data


class Words:
    """Captions as rows of a compact token table; row 0 is any word outside it."""

    def __init__(self) -> None:
        from open_clip import SimpleTokenizer

        self._tokenizer = SimpleTokenizer()
        self.start, self.end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        phrases = (*NOUNS, *COLOURS, *BACKGROUNDS.values(), *PREFIXES, "an and with , .")
        ids = {token for phrase in phrases for token in self._tokenizer.encode(phrase)}
        self.ids = [*sorted(ids), self.start, self.end]
        self._row = {token: row for row, token in enumerate(self.ids, 1)}

    def rows(self, text: str) -> list[int]:
        """The rows of a text's tokens, without start and end."""
        return [self._row.get(token, 0) for token in self._tokenizer.encode(text)]

    def batch(self, texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B, L <= WORDS], padded with row 0, and the place of each end int64 [B]."""
        length = min(WORDS, 2 + max(len(rows) for rows in texts))
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        end = torch.empty(len(texts), dtype=torch.int64)
        for line, rows in enumerate(texts):
            rows = [self._row[self.start], *rows[: WORDS - 2], self._row[self.end]]
            tokens[line, : len(rows)] = torch.tensor(rows)
            end[line] = len(rows) - 1
        return tokens, end


@dataclass
class Ring:
    """The scenes at hand, oldest replaced first; images as uint8 patches [N, h w, 3 P P].

    The processes of a team take turns with the scenes of the world.
    """

    world: int
    patches: Tensor
    team: Team
    drawn: int = 0
    facts: dict[int, tuple[tuple[str, ...], tuple[str, ...], str, float]] = field(
        default_factory=dict
    )

    def add(self, count: int, difficulty: float) -> None:
        """Draw new scenes."""
        for _ in range(count):
            index = self.drawn * self.team.size + self.team.rank
            scene = draw_scene(self.world, index, IMAGE, difficulty=difficulty)
            slot = self.drawn % len(self.patches)
            self.patches[slot] = patchify(scene.image)
            self.facts[slot] = (scene.nouns, scene.colours, scene.background, difficulty)
            self.drawn += 1

    def words(self, slot: int, draws: Draws, words: Words, unknown: float) -> list[int]:
        """A new caption of a scene; with probability `unknown`, some unknown words are put in."""
        nouns, colours, background, difficulty = self.facts[slot]
        rows = words.rows(caption(draws, nouns, colours, background, difficulty=difficulty))
        if draws.unit() < unknown:
            for _ in range(1 + draws.below(4)):
                rows.insert(draws.below(len(rows) + 1), 0)
        return rows


def patchify(image: np.ndarray) -> Tensor:
    """An image uint8 [H, W, 3] as patches uint8 [h w, 3 P P]."""
    pixels = torch.from_numpy(image).view(GRID, PATCH, GRID, PATCH, 3)
    return pixels.permute(0, 2, 4, 1, 3).reshape(GRID * GRID, 3 * PATCH * PATCH)


# --------------------------------------------------------------------------------------------------
# Zero-shot recognition


def recognition(
    image: Tensor, text: Tensor, nouns: Sequence[tuple[str, ...]]
) -> tuple[float, dict[str, float]]:
    """mAP and each noun's average precision from class tokens [N, C] and prompts [T, C]."""
    scores = F.normalize(image.float(), dim=-1) @ F.normalize(text.float(), dim=-1).T
    metric = MeanAveragePrecision(len(NOUNS))
    metric.update(scores, torch.tensor([[noun in there for noun in NOUNS] for there in nouns]))
    return float(metric.compute()), dict(zip(NOUNS, metric.per_class().tolist(), strict=True))


@torch.no_grad()
def test(
    model: DemoCLIP, words: Words, world: int, first: int, count: int, difficulty: float
) -> tuple[float, dict[str, float]]:
    """mAP and average precisions on `count` scenes of a world at a difficulty."""
    scenes = [draw_scene(world, first + i, IMAGE, difficulty=difficulty) for i in range(count)]
    patches = torch.stack([patchify(scene.image) for scene in scenes])
    everything = torch.arange(GRID * GRID).expand(count, -1)
    with torch.autocast("cpu", torch.bfloat16):
        image = torch.cat(
            [
                model.visual(patches[at : at + 64], everything[at : at + 64])
                for at in range(0, count, 64)
            ]
        )
        prompts = [words.rows(template.format(noun)) for noun in NOUNS for template in TEMPLATES]
        text = F.normalize(model.encode_text(*words.batch(prompts)).float(), dim=-1)
    text = text.view(len(NOUNS), len(TEMPLATES), -1).mean(1)
    return recognition(image, text, [scene.nouns for scene in scenes])


# --------------------------------------------------------------------------------------------------
# Training


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


def rate(step: int, recipe: Recipe) -> float:
    """The learning rate as a fraction of its highest: up, constant, down along a cosine."""
    if step < recipe.warm_up:
        return (step + 1) / recipe.warm_up
    past = max(0.0, (step - recipe.falls) / max(1, recipe.steps - recipe.falls))
    low = recipe.last_rate
    return low + (1 - low) * (1 + math.cos(math.pi * past)) / 2


def climb(mean: float, recipe: Recipe) -> float:
    """How much the difficulty rises after an mAP on new scenes of the present one."""
    return next((step for above, step in (*CLIMB, (recipe.push, PUSH)) if mean > above), 0.0)


def train(recipe: Recipe, output: Path, team: Team, *, resume: Path | None = None) -> None:
    """Run a recipe; write the model and its card, also every 500 steps on the way.

    `resume` is a folder where another run left its state on the way. As long as both have a
    constant rate up to there, this is the same as running the recipe from the start.
    """
    torch.manual_seed(recipe.seed)
    began = time.monotonic()
    words = Words()
    sample = [draw_scene(STAGE_WORLD - 1, i, IMAGE).image for i in range(128)]
    basis = whitened_cosines(torch.cat([patchify(image) for image in sample]))
    model = DemoCLIP(basis, 1 + len(words.ids))
    chain = optimisers(model, recipe)
    highest = [group["lr"] for optimiser in chain for group in optimiser.param_groups]
    held, batch, fresh = (total // team.size for total in (recipe.ring, recipe.batch, recipe.fresh))
    shape = (held, GRID * GRID, 3 * PATCH * PATCH)
    ring = Ring(TRAINING_WORLD + recipe.seed, torch.empty(shape, dtype=torch.uint8), team)
    draws = Draws(recipe.seed, TRAINING_WORLD, team.rank)
    torch.manual_seed(recipe.seed + 1000 * team.rank)
    stages: list[dict[str, Any]] = []
    difficulty, tested, losses, start = recipe.difficulty, 0, 0.0, 0
    if recipe.start:
        load(model, words, Path(recipe.start))
        before = json.loads((Path(recipe.start) / "card.json").read_text())
        stages = before["stages"]
        ring.drawn = sum(stage["scenes"] for stage in stages) // team.size
        tested = 100_000
    if resume:
        state = torch.load(resume / f"state_{team.rank}.pt", weights_only=False)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(chain, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        ring, draws, difficulty, tested, start = state["progress"]
        began -= state["seconds"]
        torch.set_rng_state(state["random"])
    else:
        ring.add(held, difficulty)
    everything = torch.arange(GRID * GRID)
    keep = round(GRID * GRID * (1 - recipe.patch_dropout))
    log = print_line if team.rank == 0 else (lambda line: None)
    log(f"ready after {time.monotonic() - began:.0f} s: {len(words.ids)} tokens")

    for step in range(start, recipe.steps):
        factor = rate(step, recipe)
        groups = [group for optimiser in chain for group in optimiser.param_groups]
        for group, top in zip(groups, highest, strict=True):
            group["lr"] = top * factor
        ring.add(fresh, difficulty)
        slots = torch.randperm(held)[:batch]
        tokens, end = words.batch(
            [ring.words(int(slot), draws, words, recipe.unknown_words) for slot in slots]
        )
        patches, kept = ring.patches[slots], everything.expand(batch, -1)
        if step < recipe.steps * (1 - recipe.tail):
            kept = torch.rand(batch, GRID * GRID).argsort(1)[:, :keep].contiguous()
            patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(patches, kept, tokens, end, team)
        loss.backward()
        team.add_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimiser in chain:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        losses += float(loss.detach())

        if (step + 1) % recipe.test_every == 0:
            found = 0.0
            if team.rank == 0:
                world = STAGE_WORLD + recipe.seed
                found, _ = test(model, words, world, tested, recipe.test_scenes, difficulty)
            found = team.agree(found)
            tested += recipe.test_scenes
            seconds = time.monotonic() - began
            log(
                f"step {step + 1:5d}  difficulty {difficulty:.2f}  "
                f"loss {losses / recipe.test_every:.3f}  mAP {found:.3f}  "
                f"scale {float(model.logit_scale.exp().detach()):.1f}  "
                f"{(step + 1) * recipe.batch / seconds:.0f} samples/s  {seconds:.0f} s"
            )
            losses = 0.0
            difficulty = max(difficulty, min(recipe.hardest, difficulty + climb(found, recipe)))
        if (step + 1) % 250 == 0 and step + 1 < recipe.steps:
            state = {
                "model": model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in chain],
                "progress": (ring, draws, difficulty, tested, step + 1),
                "seconds": time.monotonic() - began,
                "random": torch.get_rng_state(),
            }
            output.mkdir(parents=True, exist_ok=True)
            torch.save(state, output / f"state_{team.rank}.pt")
        if team.rank == 0 and ((step + 1) % 500 == 0 or step + 1 == recipe.steps):
            mean, each = test(model, words, HELD_OUT_WORLD, 0, 512, 1.0)
            log(f"step {step + 1:5d}  held-out mAP {mean:.4f}")
            this = {
                "recipe": asdict(recipe),
                "steps_done": step + 1,
                "difficulty": difficulty,
                "scenes": ring.drawn * team.size - sum(stage["scenes"] for stage in stages),
                "seconds": round(time.monotonic() - began),
                "processes": team.size,
                "threads": torch.get_num_threads(),
            }
            card = {"seed": recipe.seed, "stages": [*stages, this], "mAP": mean, "AP": each}
            save(model, words, output, card)


def member(
    rank: int, recipe: Recipe, output: Path, size: int, threads: int, resume: Path | None, meet: str
) -> None:
    """One process of a run."""
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    train(recipe, output, Team(rank, size), resume=resume)
    if size > 1:
        dist.destroy_process_group()


def run(recipe: Recipe, output: Path, size: int, threads: int, resume: Path | None) -> None:
    """Train in `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (recipe, output, size, threads, resume, f"{folder}/meet")
        if size > 1:
            torch.multiprocessing.spawn(member, arguments, nprocs=size)
        else:
            member(0, *arguments)


def save(model: DemoCLIP, words: Words, output: Path, card: dict[str, Any]) -> None:
    """Write the stock model in float16, its config and its card.

    Of the table of token embeddings, only the rows of known words, as `surgery.checkpoints` reads
    them: the others were never learned.
    """
    state = {key: value.detach().half().contiguous() for key, value in model.state_dict().items()}
    state[ROWS] = state.pop("token_embedding.weight")[1:].contiguous()
    state[IDS] = torch.as_tensor(words.ids)
    output.mkdir(parents=True, exist_ok=True)
    partial = output / "model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, output / "model.safetensors")
    for name, content in (("config.json", CONFIG), ("card.json", card)):
        (output / name).write_text(json.dumps(content, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------
# Evaluation of what was written, by the library: stock weights, stock tokenizer, the paper's metrics


VARIANTS = {
    "raw": ("raw", False),
    "architecture": ("surgery", False),
    "surgery": ("surgery", True),
}
"""Name -> attention, and whether feature surgery is done (otherwise plain cosines)."""


def evaluate(
    folder: Path, *, scenes: int = 256, background: str | None = None, blocks: int = 6
) -> dict[str, Any]:
    """mAP, and mIoU and mSC of every variant, on held-out scenes at full difficulty.

    mSC is the mean over an object's pixels minus the mean over all others, averaged over the images
    of a noun and then over nouns. mIoU is the mean over nouns of the sum of intersections over the
    sum of unions, at the one threshold of 256 that suits all best. All in [0, 1].
    """
    from surgery import encode_prompts, feature_surgery, load_backbone, similarity, similarity_map
    from surgery.metrics import MeanScoreContrast, ThresholdIoU

    drawn = [draw_scene(HELD_OUT_WORLD, i, IMAGE, background=background) for i in range(scenes)]
    images = torch.from_numpy(np.stack([scene.image for scene in drawn])).permute(0, 3, 1, 2)
    result: dict[str, Any] = {"scenes": scenes, "background": background or "all", "blocks": blocks}
    for name, (attention, reform) in VARIANTS.items():
        backbone = load_backbone(
            str(folder / "config.json"),
            str(folder / "model.safetensors"),
            attention=attention,
            blocks=blocks,
        )
        text = encode_prompts(backbone, backbone.tokenizer, NOUNS, cache_dir=False)
        contrast, overlap = MeanScoreContrast(len(NOUNS)), ThresholdIoU(len(NOUNS), 256)
        class_tokens = []
        for at in range(0, scenes, 32):
            tokens = backbone.encode_image(backbone.preprocess(images[at : at + 32]))
            class_tokens.append(tokens.class_token)
            scores = (
                feature_surgery(tokens.patch_tokens, tokens.class_token, text)
                if reform
                else similarity(tokens.patch_tokens, text)
            )
            maps = similarity_map(scores, tokens.grid, (IMAGE, IMAGE))
            for of, scene in zip(maps, drawn[at : at + 32], strict=True):
                there = torch.tensor([NOUNS.index(noun) for noun in scene.nouns])
                label = torch.from_numpy(scene.label)
                foreground = label == (there + 1)[:, None, None]
                everywhere = torch.ones_like(label, dtype=torch.bool)
                contrast.update(of[there], foreground, everywhere, there)
                overlap.update(of[there], foreground, everywhere, there)
        mean, each = recognition(torch.cat(class_tokens), text, [s.nouns for s in drawn])
        result |= {"mAP": mean, "AP": each, "all_foreground": float(overlap.at(0.0))}
        result[name] = {
            "mIoU": float(overlap.compute()),
            "mSC": float(contrast.compute()),
            "threshold": overlap.best_threshold(),
            "IoU": dict(zip(NOUNS, overlap.per_class().tolist(), strict=True)),
            "SC": dict(zip(NOUNS, contrast.per_class().tolist(), strict=True)),
        }
    return result


# --------------------------------------------------------------------------------------------------
# The model card


def publish(runs: Sequence[Path], output: Path, *, scenes: int = 256) -> None:
    """Measure runs, copy the one with the best mIoU of surgery, write the card of all."""
    found = [evaluate(run, scenes=scenes) for run in runs]
    cards = [json.loads((run / "card.json").read_text()) for run in runs]
    best = max(range(len(runs)), key=lambda i: float(found[i]["surgery"]["mIoU"]))
    unseen = evaluate(runs[best], scenes=scenes, background="clouds")
    depths = {blocks: evaluate(runs[best], scenes=scenes, blocks=blocks) for blocks in (2, 4, 9)}
    depths[6] = found[best]
    output.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(runs[best] / name, output / name)
    size = (output / "model.safetensors").stat().st_size
    text = model_card(cards, found, best, unseen, dict(sorted(depths.items())), size)
    (output / "README.md").write_text(text)


def model_card(
    cards: Sequence[dict[str, Any]],
    found: Sequence[dict[str, Any]],
    best: int,
    unseen: dict[str, Any],
    depths: dict[int, dict[str, Any]],
    size: int,
) -> str:
    """The model card, Markdown: what it is, how it was made, what it can and cannot do.

    Args:
        cards: what training wrote of each run.
        found: what `evaluate` measured of each.
        best: which of them is published.
        unseen: what `evaluate` measured of it on a background that training never showed.
        depths: what `evaluate` measured of it, by the number of reformed blocks.
        size: bytes of the weights.
    """

    def percent(value: float) -> str:
        return f"{100 * value:.1f}"

    from surgery import TEMPLATES as ENSEMBLE

    card, seed = cards[best], cards[best]["seed"]
    recipe = Recipe(**card["stages"][0]["recipe"])
    stages = table(
        ["seed", "steps", "Muon", "AdamW", "falls from", "difficulty", "scenes", "seconds", "note"],
        [
            [
                str(each["seed"]),
                f"{stage['steps_done']:,}",
                f"{stage['recipe']['muon_rate']:g}",
                f"{stage['recipe']['adam_rate']:g}",
                f"{Recipe(**stage['recipe']).falls:,}",
                f"{stage['recipe']['difficulty']:.2f} to {stage['difficulty']:.2f}",
                f"{stage['scenes']:,}",
                f"{stage['seconds']:,}",
                stage.get("note", ""),
            ]
            for each in cards
            for stage in each["stages"]
        ],
    )
    rises = ", ".join(
        f"{step:g} (mAP on new scenes above {above})"
        for above, step in (*CLIMB, (recipe.push, PUSH))
    )
    rows = [
        [
            f"{run['seed']}{' (published)' if i == best else ''}",
            f"{each['mAP']:.3f}",
            percent(each["all_foreground"]),
            *(percent(each[name][metric]) for metric in ("mIoU", "mSC") for name in VARIANTS),
        ]
        for i, (run, each) in enumerate(zip(cards, found, strict=True))
    ]
    headings = [f"{metric} {name}" for metric in ("mIoU", "mSC") for name in VARIANTS]
    seeds = table(["seed", "mAP", "all-foreground mIoU", *headings], rows)
    own = found[best]
    nouns = table(
        ["noun", "AP", "IoU raw", "IoU surgery", "SC raw", "SC surgery"],
        [
            [
                noun,
                f"{own['AP'][noun]:.3f}",
                *(
                    percent(own[name][metric][noun])
                    for metric in ("IoU", "SC")
                    for name in ("raw", "surgery")
                ),
            ]
            for noun in NOUNS
        ],
    )
    blocks = table(
        ["reformed blocks", "mIoU architecture", "mIoU surgery", "mSC surgery"],
        [
            [
                str(count),
                percent(each["architecture"]["mIoU"]),
                percent(each["surgery"]["mIoU"]),
                percent(each["surgery"]["mSC"]),
            ]
            for count, each in depths.items()
        ],
    )
    reversed_too = [noun for noun in NOUNS if own["raw"]["SC"][noun] < 0]
    opposite = (
        f"raw contrast is negative for {', '.join(reversed_too)} only."
        if reversed_too
        else "raw contrast is positive for every noun."
    )
    return f"""# The demo CLIP

A CLIP small enough to ship, so that CLIP Surgery can be tried, tested and looked at without a
download. A stock open_clip model: ViT of {VISION_LAYERS} blocks, image {IMAGE}, patch {PATCH}, \
width {WIDTH}, {WIDTH // HEAD} heads; text
tower of {TEXT_LAYERS} blocks, width {WIDTH}; joint space {EMBED}. {size / 1e6:.1f} MB in float16.
Of the table of 49,408 token embeddings the file holds the rows of known words (`token_embedding.rows`,
of the tokens `token_embedding.ids`); all others are zeros, and `surgery.checkpoints.load_weights`
puts them there.

```python
backbone = surgery.load_backbone("demo", "demo")
```

## Data

Scenes drawn by `datamodules._drawing.draw_scene` and their captions, nothing else: {len(NOUNS)} nouns
({", ".join(NOUNS)}),
{len(COLOURS)} colours ({", ".join(COLOURS)}),
{len(BACKGROUNDS)} backgrounds ({", ".join(BACKGROUNDS)}).
Trained on worlds from {TRAINING_WORLD:,} on, evaluated on world {HELD_OUT_WORLD:,}; no scene with a
small seed was seen in training. No photograph, label, mask or pretrained weight was used.

## Training

`tools/train_demo_clip.py`: the symmetric contrastive loss, {recipe.batch} pairs a step, two \
processes on two
CPU cores (shared with other work, so the seconds are high).

{stages}

Muon on the blocks' matrices, AdamW (0.9, 0.98) on the rest; weight decay {recipe.weight_decay}, \
gradient clip {recipe.clip:g};
{recipe.warm_up} steps of warm-up, then constant, then a cosine to {recipe.last_rate:.0%}. Patch \
dropout {recipe.patch_dropout}, none in the last
steps. In {recipe.unknown_words:.0%} of the captions one to four unknown words stand among the \
known ones. {recipe.fresh} new
scenes a step go into a ring of {recipe.ring:,}; captions are redrawn at each use. The world starts as
one white object on dark ground; its difficulty rises by {rises}
every {recipe.test_every} steps. At 0.75 all objects are there, on dark ground; at 1 the ground is as \
bright as they are.

## Results

On {own["scenes"]} held-out scenes, prompts by the {len(ENSEMBLE)} templates, percent but \
for mAP. "architecture" is the
reformed attention with plain cosines, "surgery" has feature surgery too. mIoU is taken at the one
threshold that suits all nouns best; all-foreground is what a mask of the whole image gets.

{seeds}

Seed {seed} by noun:

{nouns}

Seed {seed} by depth (the paper reforms 6):

{blocks}

On backgrounds like a photograph's, never seen in training (`background="clouds"`), seed {seed} has
mAP {unseen["mAP"]:.3f}, mIoU {percent(unseen["raw"]["mIoU"])} raw and \
{percent(unseen["surgery"]["mIoU"])} with surgery (all-foreground \
{percent(unseen["all_foreground"])}), mSC {percent(unseen["raw"]["mSC"])} and
{percent(unseen["surgery"]["mSC"])}.

## Limits

- It knows {len(Words().ids)} tokens. Any other word means nothing to it: "a photo of a zebra" is \
"a photo of a".
  It bears such words in templates, that is all.
- It knows flat shapes, not things: never use it on photographs.
- The paper's opposite visualisation (raw CLIP highlights the background) is not a property of this
  model: {opposite}
- Its numbers say whether the code works and whether the method helps here, nothing about a CLIP
  trained on the web.

## Licence

MIT, as the rest of the project; the data are drawn by it.
""".replace("\\\n", "")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(model: DemoCLIP, words: Words, folder: Path) -> None:
    """Read back what `save` wrote."""
    state = load_file(folder / "model.safetensors")
    if not torch.equal(state.pop(IDS), torch.as_tensor(words.ids)):
        raise SystemExit(f"{folder}: its words are not those of this script")
    state = {key: value.float() for key, value in state.items()}
    state["token_embedding.weight"] = torch.cat([torch.zeros(1, WIDTH), state.pop(ROWS)])
    model.load_state_dict(state)


def print_line(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main() -> None:
    """Train, or evaluate what was trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--decay-from", type=int, metavar="STEP", help="default: 55%% of --steps")
    parser.add_argument("--start", help="folder of a model to start from")
    parser.add_argument("--difficulty", type=float, default=0.0, help="where to start")
    parser.add_argument("--hardest", type=float, default=1.0, help="where it ends")
    parser.add_argument("--muon-rate", type=float, default=3e-3)
    parser.add_argument("--adam-rate", type=float, default=1e-3)
    parser.add_argument("--push", type=float, default=0.45, help="mAP above which it rises")
    parser.add_argument("--tail", type=float, default=0.05, help="share of steps without dropout")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on where it stopped")
    parser.add_argument("--processes", type=int, default=2, help="that share every batch")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="measure what is there")
    parser.add_argument("--publish", type=Path, nargs="+", metavar="RUN", help="keep the best")
    parser.add_argument("--scenes", type=int, default=256, help="held-out scenes to measure on")
    parser.add_argument("--background", help="measure on this background only")
    parser.add_argument("--blocks", type=int, default=6, help="reformed blocks")
    chosen = parser.parse_args()
    if chosen.evaluate:
        found = evaluate(
            chosen.evaluate,
            scenes=chosen.scenes,
            background=chosen.background,
            blocks=chosen.blocks,
        )
        print_line(json.dumps(found, indent=2))
    elif chosen.publish and chosen.output:
        publish(chosen.publish, chosen.output, scenes=chosen.scenes)
    elif chosen.output:
        recipe = Recipe(
            chosen.steps,
            chosen.seed,
            decay_from=chosen.decay_from,
            start=chosen.start,
            difficulty=chosen.difficulty,
            hardest=chosen.hardest,
            push=chosen.push,
            muon_rate=chosen.muon_rate,
            adam_rate=chosen.adam_rate,
            tail=chosen.tail,
        )
        run(recipe, chosen.output, chosen.processes, chosen.threads, chosen.resume)
    else:
        parser.error("give --output FOLDER, to train or --publish; or --evaluate FOLDER")


if __name__ == "__main__":
    main()
