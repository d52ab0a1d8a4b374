"""Text opinions: the words CLIP itself would say of an image, and where it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._samples import Batch, Sample
from surgery import Texts, encode_prompts, explain, similarity_map
from surgery.methods import check_methods, check_towers
from surgery.opinions import (
    LEARNING_RATES,
    Ascent,
    Optimiser,
    ascend_all,
    fresh_features,
    mean_feature,
    seed_from,
    views,
    word_frequencies,
)
from surgery.points import combined_points
from surgery.texts import warn_of_unknown
from tasks._draw import Look
from tasks._sam import SamTask, points_result
from tasks._task import DEFAULT_BACKBONE, BackboneConfig
from tasks.explainability import draw_maps, stored
from tasks.interactive import draw_points
from tasks.measures.opinions import OpinionsMeasures
from tasks.run.image import ImageResult
from tasks.run.results import ByMethod, Facts, Masks, Points, Result, Similarities

SURGERY = "surgery"
"""The method whose maps of the words are the task's own."""


class Opinions(SamTask):
    """Which words would CLIP itself say of each image, and where does it see them?

    Sequences of random tokens climb the gradient of their cosine with views of the image; the words
    that they hold in the second half of the climb are counted, and the most frequent ones are
    explained together, as if they were class names. Follows from the image's key and ``seed`` alone,
    not from the batch or the rank; the last digits, and so now and then a word, depend on the kind of
    device.

    Args:
        backbone: which CLIP, and how it is read.
        steps: steps of gradient ascent; the originators recommend 100 to 400.
        sequences: token sequences that climb.
        length: tokens in each.
        prompt: words before the tokens of every sequence, such as "a photo of"; they stay as they
            are, and are not counted.
        optimiser: ``momentum``, where a step changes the foremost logit of each token by ``lr``, or
            the fork's ``adam``.
        lr: of the optimiser; by default 1 for momentum and 5 for Adam. The logits begin with a
            standard deviation of 1.
        views: the image, and slightly turned and shifted copies of it, whose mean cosine counts.
        fresh_views: draw them anew in every step, as the fork does: so many times the encoding.
        seed: random numbers; another seed, another opinion.
        micro_batch: sequences, or views, that are in memory at a time.
        explained: how many of the most frequent words get a map; null: all of them.
        min_count: a word gets a map if it was counted so often: once a sequence and step of the
            second half of the climb.
        beside: other methods, see ``lightning list methods``, whose maps of these words are written
            beside, under their own names; plain CLIP's by default.
        sam: weights of SAM or SAM 2, see `Interactive`: its mask of each word, by the points of the
            word's map alone; needs the extra ``[sam]``.
    """

    measured_by = OpinionsMeasures
    measures: OpinionsMeasures

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        steps: int = 100,
        sequences: int = 8,
        length: int = 5,
        prompt: str = "",
        optimiser: Optimiser = "momentum",
        lr: float | None = None,
        views: int = 16,
        fresh_views: bool = False,
        seed: int = 0,
        micro_batch: int = 64,
        explained: int | None = 8,
        min_count: int = 1,
        beside: Sequence[str] = ("clip",),
        sam: str | None = None,
    ) -> None:
        super().__init__(backbone, sam=sam)
        self.lr = LEARNING_RATES[optimiser] if lr is None else lr
        positive: dict[str, float | None] = {
            "steps": steps,
            "sequences": sequences,
            "length": length,
            "lr": self.lr,
            "views": views,
            "micro_batch": micro_batch,
            "explained": explained,
            "min_count": min_count,
        }
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise InvalidSetting(f"--model.{name} must be above 0, got {value}")
        self.steps = steps
        self.sequences = sequences
        self.length = length
        self.prompt = prompt
        self.optimiser = optimiser
        self.views = views
        self.fresh_views = fresh_views
        self.seed = seed
        self.micro_batch = micro_batch
        self.explained = explained
        self.min_count = min_count
        self.beside = check_methods(beside) if beside else []

    def setup(self, stage: str) -> None:
        """Load the networks; refuse methods that are not for this one."""
        super().setup(stage)
        check_towers(self.beside, self.backbone)

    def configure_texts(self) -> None:
        """There are none yet: the words are found image by image."""
        if self.prompt:
            warn_of_unknown(self.backbone, [self.prompt])

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """Words of each image, and maps of the most frequent."""
        if not batch.samples:
            return []
        seeds = [seed_from(self.seed, sample.key) for sample in batch.samples]
        targets = [self._target(*pair) for pair in zip(batch.images, seeds, strict=True)]
        ascents = ascend_all(
            self.backbone,
            self.backbone.tokenizer,
            targets,
            seeds=seeds,
            sequences=self.sequences,
            length=self.length,
            steps=self.steps,
            micro_batch=self.micro_batch,
            prompt=self.prompt,
            optimiser=self.optimiser,
            lr=self.lr,
        )
        found = zip(batch.samples, batch.images, ascents, strict=True)
        return [self._opinion(sample, image, ascent) for sample, image, ascent in found]

    def _opinion(self, sample: Sample, image: Tensor, ascent: Ascent) -> ImageResult:
        frequencies = word_frequencies(self.backbone.tokenizer, ascent.ids[self.steps // 2 :])
        self.measures.update(frequencies, ascent.scores.max())
        facts = Facts(
            {
                "key": sample.key,
                "frequencies": frequencies,
                "opinions": self._best_texts(ascent),
                "size": list(sample.size),
            }
        )
        counted = [word for word, times in frequencies.items() if times >= self.min_count]
        words = counted[: self.explained]
        if not words:
            return ImageResult(sample.key, (facts, Facts({"words": {}})))
        return self._explained(sample, image, facts, words)

    def _target(self, image: Tensor, seed: int) -> Tensor:
        """What the texts of an image climb towards: the mean of its views, or one for each step."""
        if self.fresh_views:
            return fresh_features(
                self.backbone, image, self.views, self.steps, seed, self.micro_batch
            )
        return mean_feature(self.backbone, views(image, self.views, seed), self.micro_batch)

    def _explained(
        self, sample: Sample, image: Tensor, facts: Facts, words: list[str]
    ) -> ImageResult:
        """Maps of words by all methods, masks, and SAM's masks, of an image uint8 [3,S,S']."""
        encoded = encode_prompts(self.backbone, self.backbone.tokenizer, words, cache_dir=False)
        texts, numbers = Texts(encoded), range(len(words))
        pixels = self.backbone.preprocess(image[None])
        with self.backbone.encoding_once(pixels):
            scores, *others = (
                explain(self.backbone, pixels, texts, name)[0] for name in (SURGERY, *self.beside)
            )
            alone = None
            if self.segmenter:
                alone = explain(self.backbone, pixels, texts, SURGERY, alone=True)[0]
        maps, masks = _maps(scores, words, sample.size)
        beside: dict[str, tuple[Result, ...]] = {}
        drawn = {"": maps}
        for name, of in zip(self.beside, others, strict=True):
            drawn[f"{name}."], its_masks = _maps(of, words, sample.size)
            beside[name] = its_masks, Similarities(stored(name, of).cpu().numpy())
        points = None
        if alone is not None:
            grid = (alone.shape[1], alone.shape[2])
            found = [combined_points(of.flatten()[:, None], grid, sample.size) for of in alone]
            prompts = [(places.cpu(), labels.cpu()) for places, labels in found]
            segmented = self.segment(sample.original, prompts)
            points = points_result(sample.size, words, numbers, prompts, segmented, words=True)
            beside["sam"] = (points,)
        results = (
            facts,
            Similarities(stored(SURGERY, scores).cpu().numpy()),
            masks,
            *([ByMethod(beside)] if beside else []),
        )
        draw = None
        if self.draws:
            # The most frequent words come first.
            first = {name: values[: self.look.classes].cpu() for name, values in drawn.items()}
            endings = masks.endings()[: self.look.classes]
            picture = image if sample.original is None else sample.original
            draw = partial(draw_words, picture.cpu(), first, endings, points, self.look)
        return ImageResult(sample.key, results, draw)

    def _best_texts(self, ascent: Ascent) -> list[dict[str, Any]]:
        """Each sequence at the best of its steps, the best sequence first."""
        scores, steps = ascent.scores.max(dim=0)
        best = ascent.ids[steps, torch.arange(len(steps), device=steps.device)]
        found = [self.backbone.tokenizer.decode(ids).strip() for ids in best.tolist()]
        texts = [f"{self.prompt} {text}".strip() for text in found]
        order = scores.argsort(descending=True, stable=True).tolist()
        return [{"text": texts[i], "score": round(float(scores[i]), 6)} for i in order]


def _maps(scores: Tensor, words: list[str], size: tuple[int, int]) -> tuple[Tensor, Masks]:
    """Similarities [T,h,w] as maps [T,H,W], and the masks of these."""
    grid = (scores.shape[1], scores.shape[2])
    maps = similarity_map(scores.flatten(1).T[None], grid, size)[0]
    return maps, Masks(words, range(len(words)), (maps >= 0.5).cpu().numpy(), words=True)


def draw_words(
    image: Tensor, maps: dict[str, Tensor], endings: list[str], points: Points | None, look: Look
) -> dict[str, np.ndarray]:
    """Maps of words over their image, see `draw_maps`, and SAM's masks of them."""
    pictures = draw_maps(image, maps, endings, look)
    if points is not None:
        pictures |= draw_points(image, {"sam": points}, range(len(points.points)))
    return pictures
