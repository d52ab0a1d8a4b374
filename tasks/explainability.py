"""Explainability: a similarity map for every class, measured on the labels (Table 1 of the paper)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor

from common.errors import InvalidSetting
from datamodules.samples import Batch
from surgery import feature_surgery, similarity, similarity_map
from tasks.base import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.draw import heat_maps
from tasks.measures.explainability import RAW, ExplainabilityMeasures
from tasks.run.results import Facts, ImageResult, Masks, Similarities

KINDS = {"": "map.", RAW: "raw."}
"""How the overlays of either are named."""


class Explainability(Task):
    """Where in the image is each class? Maps, masks, mSC and mIoU.

    Maps are those of the paper: architecture surgery in the backbone, feature surgery over all class
    texts, min-max per map. For each positive label a mask is written, and all classes' similarities
    on the token grid. With ``--model.backbone.attention raw --model.feature_surgery none`` the maps
    are plain CLIP's; ``baseline`` measures those beside.

    Args:
        backbone: which CLIP, and how it is read.
        feature_surgery: ``code`` as released, ``paper`` by Eq. 8-11, ``none`` for the plain cosine.
        tau: temperature of the class weights in feature surgery.
        order: ``code`` min-maxes on the token grid and then enlarges, ``paper`` (Eq. 1) enlarges first.
        threshold: map value from which a pixel belongs to the written mask; the stored similarities
            allow any other afterwards. The reported mIoU is at the best threshold of the whole run.
        void: what void pixels (255) count as in the metrics: ``ignore``, or ``background``, the
            literal reading of Eq. 12.
        baseline: also encode each image with plain CLIP, and report its metrics beside.
        text_features: features of the class texts from a file, see `Task`.
    """

    needs = ("classes",)

    measured_by = ExplainabilityMeasures
    measures: ExplainabilityMeasures

    redundant: Tensor | None

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        feature_surgery: Literal["code", "paper", "none"] = "code",
        tau: float = 2.0,
        order: Literal["code", "paper"] = "code",
        threshold: float = 0.5,
        void: Literal["ignore", "background"] = "ignore",
        baseline: bool = False,
        text_features: str | None = None,
    ) -> None:
        super().__init__(backbone, text_features)
        self.register_buffer("redundant", None, persistent=False)
        if not 0 <= threshold <= 1:
            raise InvalidSetting(f"--model.threshold is a map value in [0, 1], got {threshold}")
        self.feature_surgery: Any = feature_surgery
        self.tau = tau
        self.order = order
        self.threshold = threshold
        self.void = void
        self.baseline = baseline

    def setup(self, stage: str) -> None:
        """Load the backbone; the images at their own size are only read to be drawn on."""
        self.wants_originals = self.draws
        super().setup(stage)

    def configure_texts(self) -> None:
        """Class texts; a single class is compared with the empty text, there being no other."""
        super().configure_texts()
        if len(self.info.classes) == 1:
            empty = self.backbone.tokenizer([""])
            self.redundant = self.backbone.encode_text(empty)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """Maps and masks of the positive labels of each image, similarities of all classes."""
        results = []
        raw = self.encode_images(batch.images, "raw") if self.baseline else []
        encoded = self.encode_images(batch.images)
        for i, (sample, tokens) in enumerate(zip(batch.samples, encoded, strict=True)):
            scores = self._similarity(tokens.patch_tokens, tokens.class_token)
            shown = sample.positives
            shown = tuple(range(scores.shape[2])) if shown is None else shown
            enlarge = partial(self._maps, shown=shown, grid=tokens.grid, size=sample.size)
            maps = {"": enlarge(scores)}
            if raw and self.text is not None:
                maps[RAW] = enlarge(similarity(raw[i].patch_tokens, self.text))
            self.measures.update(maps, sample.label, shown)
            image = batch.images[i] if sample.original is None else sample.original
            results.append(self._result(sample.key, image, scores[0], tokens.grid, shown, maps))
        return results

    def _maps(
        self, scores: Tensor, shown: tuple[int, ...], grid: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        return similarity_map(scores[:, :, list(shown)], grid, size, order=self.order)[0]

    def _similarity(self, patch_tokens: Tensor, class_token: Tensor) -> Tensor:
        assert self.text is not None  # needs = ("classes",)
        if self.feature_surgery == "none":
            return similarity(patch_tokens, self.text)
        return feature_surgery(
            patch_tokens,
            class_token,
            self.text,
            redundant=self.redundant,
            tau=self.tau,
            form=self.feature_surgery,
        )

    def _result(
        self,
        key: str,
        image: Tensor,
        scores: Tensor,
        grid: tuple[int, int],
        shown: tuple[int, ...],
        maps: dict[str, Tensor],
    ) -> ImageResult:
        masks = Masks(
            [self.info.classes[index] for index in shown],
            shown,
            (maps[""] >= self.threshold).cpu().numpy(),
        )
        results = (
            masks,
            Facts({"threshold": self.threshold, "size": list(maps[""].shape[-2:])}),
            Similarities(scores.T.unflatten(1, grid).half().cpu().numpy()),
        )
        draw = partial(draw_maps, image.cpu(), maps, masks.endings()) if self.draws else None
        return ImageResult(key, results, draw)


def draw_maps(image: Tensor, maps: dict[str, Tensor], endings: list[str]) -> dict[str, np.ndarray]:
    """Maps over their image, each named after the file of its mask; plain CLIP's with ``raw``."""
    return {
        ending.replace("mask.", KINDS[kind]).replace(".png", ".jpg"): picture
        for kind, values in maps.items()
        for ending, picture in zip(endings, heat_maps(image, values), strict=True)
    }
