"""Interactive segmentation without a person: texts become points, points become masks (Fig. 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from typing import Any, Literal

import numpy as np
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._samples import Batch, DatasetInfo, Sample
from surgery import encode_prompts
from surgery.methods import check_methods
from surgery.points import combined_points
from surgery.texts import empty_text
from tasks._draw import point_figure
from tasks._sam import SamTask, points_result
from tasks._task import DEFAULT_BACKBONE, BackboneConfig
from tasks._transfer import Copy, send_rows
from tasks.measures.interactive import InteractiveMeasures
from tasks.run.image import ImageResult
from tasks.run.results import ByMethod, Points
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
    measures_on_host = True  # where points are chosen

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
        everything = tuple(range(len(self.info.classes)))
        shown = [everything if s.positives is None else s.positives for s in batch.samples]
        arrived = self._on_host(batch, shown)
        results = []
        for sample, classes, scores, label, image in zip(
            batch.samples, shown, *arrived, strict=True
        ):
            size = sample.size
            prompts = {m: [self.points(s, size) for s in of] for m, of in scores.items()}
            # At once, so that SAM looks at the image once.
            original = None if sample.original is None else image
            masks = iter(self.segment(original, [p for of in prompts.values() for p in of]))
            scored = {method: list(islice(masks, len(of))) for method, of in prompts.items()}
            masked = {method: [mask for mask, _ in of] for method, of in scored.items()}
            measured = scores if self.measures.metrics else {}
            others = {
                method: [self.points(s, size, self.measures.other) for s in of]
                for method, of in measured.items()
            }
            self.measures.update(prompts, masked, others, label, classes)
            names = [self.info.classes[index] for index in classes]
            points = {
                method: points_result(size, names, classes, prompts[method], scored[method])
                for method in self.methods
            }
            draw = None
            if self.draws and image is not None:
                draw = partial(draw_points, image, points, classes)
            said = ByMethod({method: (of,) for method, of in points.items()})
            results.append(ImageResult(sample.key, (said,), draw))
        return results

    def _on_host(
        self, batch: Batch, shown: Sequence[tuple[int, ...]]
    ) -> tuple[list[dict[str, list[Tensor]]], list[Tensor | None], list[Tensor | None]]:
        """What points are found and measured with: points are few, and a choice after the other.

        Args:
            batch: of the images.
            shown: classes of each.

        Returns:
            Of each image: method -> similarities [M,h,w] of the words of each of its classes; its
            label; the image to draw on, or for SAM, if there is one.
        """
        methods = {name: {"alone": True} if name in ALONE else {} for name in self.methods}
        groups = texts_of(self.info)
        starts = [0, *accumulate(len(group) for group in groups)]
        words = [[w for k in of for w in range(starts[k], starts[k + 1])] for of in shown]
        wanted: list[Tensor] = []
        counts: list[int] = []
        for part in self.explain_batches(batch.images, methods):
            first = sum(counts)
            counts.append(len(part[self.methods[0]]))
            rows = [[i, w] for i in range(counts[-1]) for w in words[first + i]]
            images, columns = send_rows(rows, self.device).view(-1, 2).unbind(1)
            wanted += [of[images, columns] for of in part.values()]
        labels = [sample.label for sample in batch.samples]
        pictures = [self._picture(s, i) for s, i in zip(batch.samples, batch.images, strict=True)]
        there = [tensor for tensor in (*labels, *pictures) if tensor is not None]
        arrived = iter(Copy([*wanted, *there]).tensors())
        scores: list[dict[str, list[Tensor]]] = [{} for _ in shown]
        first = 0
        for count in counts:
            part_of = range(first, first := first + count)
            for method in self.methods:
                sizes = [len(groups[k]) for i in part_of for k in shown[i]]
                found = iter(next(arrived).split(sizes))
                for i in part_of:
                    scores[i][method] = list(islice(found, len(shown[i])))
        host_labels, host_pictures = (
            [None if tensor is None else next(arrived) for tensor in of]
            for of in (labels, pictures)
        )
        return scores, host_labels, host_pictures

    def _picture(self, sample: Sample, image: Tensor) -> Tensor | None:
        """What is drawn on, or shown to SAM; None where nothing is."""
        if self.segmenter is not None or self.draws:
            return image if sample.original is None and self.draws else sample.original
        return None

    def points(
        self, similarities: Tensor, size: tuple[int, int], down_sample: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Points [K,2] (x, y) of one class on an image of size (H, W), and their labels [K].

        Args:
            similarities: [M,h,w], of the words of its prompt.
            size: of the image.
            down_sample: in place of the task's.
        """
        return combined_points(
            similarities.flatten(1).T,
            (similarities.shape[1], similarities.shape[2]),
            size,
            threshold=self.threshold,
            down_sample=down_sample or self.down_sample,
        )


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
