"""Interactive segmentation without a person: texts become points, points become masks (Fig. 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._samples import Batch, DatasetInfo
from surgery import encode_prompts
from surgery.methods import check_methods
from surgery.points import combined_points
from surgery.texts import empty_text
from tasks._draw import point_figure
from tasks._sam import SamTask, points_result
from tasks._task import DEFAULT_BACKBONE, BackboneConfig
from tasks.measures.interactive import InteractiveMeasures
from tasks.run.results import ByMethod, ImageResult, Points
from tasks.run.stored import slug

ALONE = ("surgery", "surgery_paper")
"""Methods that compare a text with all others unless they are told to take each alone."""


class Interactive(SamTask):
    """Where would one click for each text? Points, SAM's masks of them, and how good both are.

    One text at a time: its map is that of feature surgery with the empty text's feature as the
    redundant one, or that of another method. The map's strongest places become positive points and
    its weakest ones negative.
    Texts joined by ``+`` (``--data.names "[person+bench]"``) ask for their union, as in the released
    demo: positive points of each text's map, negative ones of the mean map.

    With ``sam``, the points of a text are given to SAM at once, on the image at its own size, and the
    mask that SAM thinks best is kept. Without, there are points and their accuracy.

    Args:
        backbone: which CLIP, and how it is read.
        methods: what explains the images, see ``lightning list methods``; each one's points are
            measured and written under its own name, and the first one gives the headline.
        sam: weights of SAM or SAM 2: a name on the Hugging Face hub (facebook/sam-vit-huge,
            facebook/sam2.1-hiera-large, ...) or a folder; needs the extra ``[sam]``.
        threshold: map value in [0, 1] from which a place is a positive point.
        down_sample: how many times smaller than the token grid the map is from which points are taken:
            2 as released, 1 as the paper may mean. The accuracy of the other one's points is reported
            beside.
        redundant: the empty text as it is (``empty``), or in all prompt templates (``templates``), as
            the released demo has it.
        text_features: features of the class texts from a file, see `Task`.
    """

    needs = ("classes",)

    measured_by = InteractiveMeasures
    measures: InteractiveMeasures

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        methods: Sequence[str] | str = ("surgery",),
        sam: str | None = None,
        threshold: float = 0.8,
        down_sample: int = 2,
        redundant: Literal["empty", "templates"] = "empty",
        text_features: str | None = None,
    ) -> None:
        super().__init__(backbone, text_features, sam)
        if not 0 <= threshold <= 1:
            raise InvalidSetting(f"--model.threshold is a map value in [0, 1], got {threshold}")
        if down_sample < 1:
            raise InvalidSetting(f"--model.down_sample must be at least 1, got {down_sample}")
        self.methods = check_methods(methods)
        self.threshold = threshold
        self.down_sample = down_sample
        self.redundant: Any = redundant

    def setup(self, stage: str) -> None:
        """Load the backbone and SAM; points are drawn on the images at their own size."""
        self.wants_originals = self.draws
        super().setup(stage)

    def words(self, info: DatasetInfo) -> list[str]:
        """The words of all prompts; one with ``+`` has several."""
        return [word for group in texts_of(info) for word in group]

    def configure_texts(self) -> None:
        """Features of all words, and of the empty text."""
        super().configure_texts()
        assert self.texts is not None  # needs = ("classes",)
        empty = empty_text(self.backbone)
        if self.redundant == "templates":
            empty = encode_prompts(self.backbone, self.backbone.tokenizer, [""])
        self.texts = replace(self.texts, empty=empty)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """Points, and masks with SAM, of the positive labels of each image."""
        methods = {name: {"alone": True} if name in ALONE else {} for name in self.methods}
        results = []
        explained = self.explain_images(batch.images, methods)
        for i, (sample, similarities) in enumerate(zip(batch.samples, explained, strict=True)):
            shown, size = sample.positives, sample.size
            shown = tuple(range(len(self.info.classes))) if shown is None else shown
            prompts = {
                method: [self.points(scores, index, size) for index in shown]
                for method, scores in similarities.items()
            }
            # At once, so that SAM looks at the image once.
            masks = iter(self.segment(sample.original, [p for of in prompts.values() for p in of]))
            scored = {method: list(islice(masks, len(of))) for method, of in prompts.items()}
            masked = {method: [mask for mask, _ in of] for method, of in scored.items()}
            measured = similarities if self.measures.metrics else {}
            others = {
                method: [self.points(scores, index, size, self.measures.other) for index in shown]
                for method, scores in measured.items()
            }
            self.measures.update(prompts, masked, others, sample.label, shown)
            names = [self.info.classes[index] for index in shown]
            points = {
                method: points_result(size, names, shown, prompts[method], scored[method])
                for method in self.methods
            }
            image = batch.images[i] if sample.original is None else sample.original
            draw = partial(draw_points, image.cpu(), points, shown) if self.draws else None
            said = ByMethod({method: (of,) for method, of in points.items()})
            results.append(ImageResult(sample.key, (said,), draw))
        return results

    def points(
        self,
        similarities: Tensor,
        index: int,
        size: tuple[int, int],
        down_sample: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Points [K,2] (x, y) of one class on an image of size (H, W), and their labels [K].

        Args:
            similarities: [T,h,w], of all words of all prompts.
            index: of the class.
            size: of the image.
            down_sample: in place of the task's.
        """
        groups = texts_of(self.info)
        first = sum(len(group) for group in groups[:index])
        scores = similarities[first : first + len(groups[index])]
        grid = (scores.shape[1], scores.shape[2])
        points, labels = combined_points(
            scores.flatten(1).T,
            grid,
            size,
            threshold=self.threshold,
            down_sample=down_sample or self.down_sample,
        )
        return points.cpu(), labels.cpu()


def draw_points(
    image: Tensor, by_method: dict[str, Points], numbers: Sequence[int]
) -> dict[str, np.ndarray]:
    """Each method's points of each text on the image, with its mask if there is one."""
    pictures = {}
    for method, points in by_method.items():
        for i, (name, number) in enumerate(zip(points.points, numbers, strict=True)):
            mask = points.masks.masks[i] if points.masks else None
            pictures[f"{method}.points.{number:03d}-{slug(name)}.jpg"] = point_figure(
                image, points.size, points.points[name], points.labels[name], mask
            )
    return pictures


def texts_of(info: DatasetInfo) -> list[list[str]]:
    """The words of each class's prompt, which ``+`` joins."""
    return [[word.strip() for word in prompt.split("+")] for prompt in info.prompts]
