"""Explainability: a similarity map for every class, measured on the labels (Table 1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._samples import Batch
from surgery import METHODS, similarity_map
from surgery.methods import check_methods
from tasks._draw import heat_maps
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.measures.explainability import ExplainabilityMeasures
from tasks.run.results import ByMethod, Facts, ImageResult, Masks, Similarities


class Explainability(Task):
    """Where in the image is each class? Maps, masks, mSC and mIoU.

    Maps are those of the paper: architecture surgery in the backbone, feature surgery over all class
    texts, min-max per map; or of other methods, each of which is measured and written under its own
    name. For each positive label a mask is written, and all classes' similarities on the token grid.

    Args:
        backbone: which CLIP, and how it is read.
        methods: what explains the images, see ``lightning list methods``; the first one gives the
            headline.
        feature_surgery: of the method surgery: ``code`` as released, ``paper`` by Eq. 8-11, ``none``
            for the plain cosine.
        tau: of the method surgery: temperature of the class weights in feature surgery.
        order: ``code`` min-maxes on the token grid and then enlarges, ``paper`` (Eq. 1) enlarges first.
        threshold: map value from which a pixel belongs to the written mask; the stored similarities
            allow any other afterwards. The reported mIoU is at the best threshold of the whole run.
        void: what void pixels (255) count as in the metrics: ``ignore``, or ``background``, the
            literal reading of Eq. 12.
        text_features: features of the class texts from a file, see `Task`.
    """

    needs = ("classes",)

    measured_by = ExplainabilityMeasures
    measures: ExplainabilityMeasures

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        methods: Sequence[str] = ("surgery",),
        feature_surgery: Literal["code", "paper", "none"] = "code",
        tau: float = 2.0,
        order: Literal["code", "paper"] = "code",
        threshold: float = 0.5,
        void: Literal["ignore", "background"] = "ignore",
        text_features: str | None = None,
    ) -> None:
        super().__init__(backbone, text_features)
        if not 0 <= threshold <= 1:
            raise InvalidSetting(f"--model.threshold is a map value in [0, 1], got {threshold}")
        self.methods = check_methods(methods)
        self.feature_surgery = feature_surgery
        self.tau = tau
        self.order = order
        self.threshold = threshold
        self.void = void

    def setup(self, stage: str) -> None:
        """Load the backbone; the images at their own size are only read to be drawn on."""
        self.wants_originals = self.draws
        super().setup(stage)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """Maps and masks of the positive labels of each image, similarities of all classes."""
        options: dict[str, dict[str, Any]] = {
            "surgery": {"form": self.feature_surgery, "tau": self.tau},
            "surgery_paper": {"tau": self.tau},
        }
        methods = {name: options.get(name, {}) for name in self.methods}
        results = []
        explained = self.explain_images(batch.images, methods)
        for i, (sample, similarities) in enumerate(zip(batch.samples, explained, strict=True)):
            shown = sample.positives
            shown = tuple(range(len(self.info.classes))) if shown is None else shown
            maps = {
                name: self._maps(scores[list(shown)], sample.size)
                for name, scores in similarities.items()
            }
            self.measures.update(maps, sample.label, shown)
            image = batch.images[i] if sample.original is None else sample.original
            results.append(self._result(sample.key, image, similarities, shown, maps))
        return results

    def _maps(self, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """Similarities [P,h,w] as maps [P,H,W]."""
        grid = (scores.shape[1], scores.shape[2])
        return similarity_map(scores.flatten(1).T[None], grid, size, order=self.order)[0]

    def _result(
        self,
        key: str,
        image: Tensor,
        similarities: dict[str, Tensor],
        shown: tuple[int, ...],
        maps: dict[str, Tensor],
    ) -> ImageResult:
        names = [self.info.classes[index] for index in shown]
        masks = {
            method: Masks(names, shown, (values >= self.threshold).cpu().numpy())
            for method, values in maps.items()
        }
        found = {
            method: (masks[method], Similarities(stored(method, scores).cpu().numpy()))
            for method, scores in similarities.items()
        }
        size = next(iter(maps.values())).shape[-2:]
        facts = Facts({"threshold": self.threshold, "size": list(size)})
        endings = masks[self.methods[0]].endings()
        drawn = {f"{method}.": values for method, values in maps.items()}
        draw = partial(draw_maps, image.cpu(), drawn, endings) if self.draws else None
        return ImageResult(key, (ByMethod(found), facts), draw)


def stored(method: str, scores: Tensor) -> Tensor:
    """Similarities in the precision that they are written in: as few bits as hold them."""
    return scores.half() if METHODS[method].cosines else scores.float()


def draw_maps(image: Tensor, maps: dict[str, Tensor], endings: list[str]) -> dict[str, np.ndarray]:
    """Maps over their image, each named after the file of its mask.

    Args:
        image: see `tasks._draw`.
        maps: what names begin with, such as ``surgery.`` -> maps [P,H,W] in [0, 1].
        endings: of the files of the P masks.
    """
    return {
        f"{prefix}{ending.replace('mask.', 'map.').replace('.png', '.jpg')}": picture
        for prefix, values in maps.items()
        for ending, picture in zip(endings, heat_maps(image, values), strict=True)
    }
