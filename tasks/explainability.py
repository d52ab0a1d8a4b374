"""Explainability: a similarity map for every class, measured on the labels (Table 1 of the paper)."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from datamodules.samples import Batch
from surgery import feature_surgery, similarity, similarity_map
from surgery.visualize import heat_map
from tasks.base import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.measures.explainability import RAW, ExplainabilityMeasures
from tasks.run.results import ImageResult

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
        super().setup(stage)
        self.wants_originals = self.draws

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
        for i, tokens in enumerate(self.encode_images(batch.images)):
            scores = self._similarity(tokens.patch_tokens, tokens.class_token)
            shown = batch.positives[i]
            shown = tuple(range(scores.shape[2])) if shown is None else shown
            enlarge = partial(self._maps, shown=shown, grid=tokens.grid, size=batch.sizes[i])
            maps = {"": enlarge(scores)}
            if raw and self.text is not None:
                maps[RAW] = enlarge(similarity(raw[i].patch_tokens, self.text))
            self.measures.update(maps, batch.labels[i], shown)
            original = batch.originals[i]
            image = batch.images[i] if original is None else original
            results.append(self._result(batch.keys[i], image, scores[0], tokens.grid, shown, maps))
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
        names = self.info.classes
        files = {index: f"mask.{index:03d}-{slug(names[index])}.png" for index in shown}
        members: dict[str, Any] = {
            "scores.npy": scores.T.unflatten(1, grid).half().cpu().numpy(),
            "json": {
                "labels": {names[index]: files[index] for index in shown},
                "threshold": self.threshold,
                "size": list(maps[""].shape[-2:]),
                "grid": list(grid),
            },
        }
        masks = (maps[""] >= self.threshold).to(torch.uint8).cpu().numpy()
        for index, mask in zip(shown, masks, strict=True):
            members[files[index]] = mask * self.info.label_type(self.info.label_value(index))
        if not self.draws:  # what draws keeps all the maps in memory until it is written
            return ImageResult(key, members)
        draw = partial(draw_overlays, image.cpu(), maps, list(files.values()))
        return ImageResult(key, members, draw)


def slug(name: str) -> str:
    """A class name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "class"


def draw_overlays(
    image: Tensor, maps: dict[str, Tensor], masks: list[str]
) -> dict[str, np.ndarray]:
    """Heat maps over the image: uint8 [3,S,S'], brought to the size of the maps, each [P,H,W].

    Each is named after the file of its mask; plain CLIP's with ``raw`` in place of ``map``.
    """
    size = maps[""].shape[-2:]
    large = F.interpolate(image[None].float(), size=size, mode="bilinear", antialias=True)
    picture = large[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return {
        mask.replace("mask.", KINDS[prefix]).replace(".png", ".jpg"): heat_map(
            picture, one.cpu()
        ).numpy()
        for prefix, values in maps.items()
        for mask, one in zip(masks, values, strict=True)
    }
