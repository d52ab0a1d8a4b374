"""Text opinions: the words CLIP itself would say of an image, and where it sees them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._samples import Batch
from surgery import Texts, encode_prompts, feature_surgery, similarity_map
from surgery.opinions import Ascent, ascend, mean_feature, seed_from, views, word_frequencies
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.explainability import draw_maps
from tasks.measures.opinions import OpinionsMeasures
from tasks.run.results import Facts, ImageResult, Masks, Similarities


class Opinions(Task):
    """Which words would CLIP itself say of each image, and where does it see them?

    Sequences of random tokens climb the gradient of their cosine with views of the image; the words
    that they hold in the second half of the climb are counted, and the most frequent ones are
    explained as if they were class names. Follows from the image's key and ``seed`` alone, not from
    the batch or the rank; the last digits, and so now and then a word, depend on the kind of device.

    Args:
        backbone: which CLIP, and how it is read.
        steps: steps of gradient ascent; the originators recommend 100 to 400.
        sequences: token sequences that climb.
        length: tokens in each.
        lr: what a step adds to the foremost logit of each token; the logits begin with a standard
            deviation of 1.
        views: the image, and slightly turned and shifted copies of it, whose mean cosine counts.
        seed: random numbers; another seed, another opinion.
        micro_batch: sequences, or views, that are in memory at a time.
        explained: how many of the most frequent words get a map.
    """

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        steps: int = 100,
        sequences: int = 8,
        length: int = 5,
        lr: float = 1.0,
        views: int = 16,
        seed: int = 0,
        micro_batch: int = 16,
        explained: int = 8,
    ) -> None:
        super().__init__(backbone)
        positive = {
            "steps": steps,
            "sequences": sequences,
            "length": length,
            "lr": lr,
            "views": views,
            "micro_batch": micro_batch,
            "explained": explained,
        }
        for name, value in positive.items():
            if value <= 0:
                raise InvalidSetting(f"--model.{name} must be above 0, got {value}")
        self.steps = steps
        self.sequences = sequences
        self.length = length
        self.lr = lr
        self.views = views
        self.seed = seed
        self.micro_batch = micro_batch
        self.explained = explained

    measured_by = OpinionsMeasures
    measures: OpinionsMeasures

    def configure_texts(self) -> None:
        """There are none yet: the words are found image by image."""

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """Words of each image, and maps of the most frequent."""
        return [
            self._opinion(sample.key, image, sample.size)
            for sample, image in zip(batch.samples, batch.images, strict=True)
        ]

    def _opinion(self, key: str, image: Tensor, size: tuple[int, int]) -> ImageResult:
        seed = seed_from(self.seed, key)
        target = mean_feature(self.backbone, views(image, self.views, seed), self.micro_batch)
        ascent = ascend(
            self.backbone,
            self.backbone.tokenizer,
            target,
            sequences=self.sequences,
            length=self.length,
            steps=self.steps,
            lr=self.lr,
            seed=seed,
            micro_batch=self.micro_batch,
        )
        frequencies = word_frequencies(self.backbone.tokenizer, ascent.ids[self.steps // 2 :])
        self.measures.update(frequencies, ascent.scores.max())
        record = {
            "key": key,
            "frequencies": frequencies,
            "opinions": self._best_texts(ascent),
            "size": list(size),
        }
        top = list(frequencies)[: self.explained]
        if not top:
            return ImageResult(key, (Facts({**record, "words": {}}),))
        scores, grid = self._similarity(image, top)
        maps = similarity_map(scores, grid, size)[0]
        masks = Masks(top, range(len(top)), (maps >= 0.5).cpu().numpy(), words=True)
        results = (
            Facts(record),
            Similarities(scores[0].T.unflatten(1, grid).half().cpu().numpy()),
            masks,
        )
        draw = None
        if self.draws:
            first, endings = maps[: self.look.classes].cpu(), masks.endings()
            endings = endings[: self.look.classes]  # the most frequent words come first
            draw = partial(draw_maps, image.cpu(), {"": first}, endings, self.look)
        return ImageResult(key, results, draw)

    def _best_texts(self, ascent: Ascent) -> list[dict[str, Any]]:
        """Each sequence at the best of its steps, the best sequence first."""
        scores, steps = ascent.scores.max(dim=0)
        best = ascent.ids[steps, torch.arange(len(steps), device=steps.device)]
        texts = [self.backbone.tokenizer.decode(ids).strip() for ids in best.tolist()]
        order = scores.argsort(descending=True, stable=True).tolist()
        return [{"text": texts[i], "score": round(float(scores[i]), 6)} for i in order]

    def _similarity(self, image: Tensor, words: list[str]) -> tuple[Tensor, tuple[int, int]]:
        """Similarities [1,N,T] of an image uint8 [3,S,S'] and words; the grid."""
        tokens = self.backbone.encode_image(self.backbone.preprocess(image[None]))
        text = encode_prompts(self.backbone, self.backbone.tokenizer, words, cache_dir=False)
        redundant = Texts(text).redundant(self.backbone)
        scores = feature_surgery(tokens.patch_tokens, tokens.class_token, text, redundant=redundant)
        return scores, tokens.grid
