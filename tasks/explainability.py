"""Explainability: a similarity map for every class, measured on the labels (Table 1 of the paper)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._samples import Batch
from surgery import METHODS, similarity_map
from surgery.enlarging import inside, min_max_inside, padded_maps
from surgery.features import min_max
from surgery.methods import check_methods
from tasks._draw import Look, heat_maps
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks._transfer import Copy, Group, Later, groups_of, send_rows
from tasks.measures.explainability import ExplainabilityMeasures
from tasks.run.image import ImageResult
from tasks.run.results import ByMethod, Facts, Masks, Similarities


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
            The other one is measured beside (``mIoU_order_paper``, ``mSC_order_paper``).
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
        methods: Sequence[str] | str = ("surgery",),
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

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Sequence[ImageResult]:
        """Maps and masks of the positive labels of each image, similarities of all classes."""
        options: dict[str, dict[str, Any]] = {
            "surgery": {"form": self.feature_surgery, "tau": self.tau},
            "surgery_paper": {"tau": self.tau},
        }
        methods = {name: options.get(name, {}) for name in self.methods}
        everything = tuple(range(len(self.info.classes)))
        shown = [everything if s.positives is None else s.positives for s in batch.samples]
        groups = groups_of(batch.samples, [len(classes) for classes in shown], self.device)
        # Of each map that is wanted: its image in the batch and in the group, and its class.
        pairs = [[(i, j, k) for j, i in enumerate(group) for k in shown[i]] for group in groups]
        flat = [pair for part in pairs for pair in part]
        rows = send_rows(flat, self.device).view(-1, 3).split([len(part) for part in pairs])
        explained = list(self.explain_batches(batch.images, methods))
        maps: list[dict[str, Tensor]] = []
        for group, wanted in zip(groups, rows, strict=True):
            images, places, classes = wanted.unbind(1)
            similarities = explained[0]
            if len(explained) > 1:  # each image by itself, as they differ in size
                similarities = {m: torch.cat([explained[i][m] for i in group]) for m in methods}
                images = places
            chosen = {m: of[images, classes] for m, of in similarities.items()}
            labels = [s.label for i in group if (s := batch.samples[i]).label is not None]
            code = {m: _maps(of, places, group.sizes) for m, of in chosen.items()}
            paper = {}
            if labels or self.order == "paper":
                paper = {m: _scaled(of, places, group.sizes) for m, of in code.items()}
            maps.append(code if self.order == "code" else paper)
            if labels:
                others = paper if self.order == "code" else code
                self.measures.update(maps[-1], others, labels, places, classes)
        return self._results(batch, shown, groups, explained, maps)

    def _results(
        self,
        batch: Batch,
        shown: Sequence[tuple[int, ...]],
        groups: Sequence[Group],
        explained: Sequence[dict[str, Tensor]],
        maps: Sequence[dict[str, Tensor]],
    ) -> Sequence[ImageResult]:
        """What is said of each image.

        Args:
            batch: of the images.
            shown: classes of each.
            groups: which of them are in each group.
            explained: method -> similarities [b,T,h,w], of all images in order.
            maps: method -> maps [P,H,W] of each group, image after image.
        """
        above = [values >= self.threshold for part in maps for values in part.values()]
        scores = [stored(m, values) for part in explained for m, values in part.items()]
        drawn = [values for part in maps for values in part.values()] if self.draws else []
        pictures = [
            image if sample.original is None else sample.original
            for image, sample in zip(batch.images, batch.samples, strict=True)
        ]
        copy = Copy([*above, *scores, *drawn, *(pictures if self.draws else [])])
        facts = [(sample.key, sample.size) for sample in batch.samples]
        counts = [len(part[self.methods[0]]) for part in explained]

        def make() -> list[ImageResult]:
            found = iter(copy.tensors())
            masks: list[dict[str, Masks]] = [{} for _ in facts]
            places = [(g, m) for g in groups for m in self.methods]
            for group, method in places:
                array = next(found).numpy()
                for i, here in cut(group, shown):
                    names = [self.info.classes[index] for index in shown[i]]
                    masks[i][method] = Masks(names, shown[i], array[here])
            similarities: list[dict[str, Similarities]] = []
            for count in counts:
                of = {method: next(found).numpy() for method in self.methods}
                similarities += [
                    {m: Similarities(a[i]) for m, a in of.items()} for i in range(count)
                ]
            draws: list[partial[dict[str, np.ndarray]] | None] = [None] * len(facts)
            if self.draws:
                heat: list[dict[str, Tensor]] = [{} for _ in facts]
                for group, method in places:
                    values = next(found)
                    for i, here in cut(group, shown):
                        heat[i][f"{method}."] = values[here]
                for i, image in enumerate(found):
                    drawn_maps, endings = heat[i], masks[i][self.methods[0]].endings()
                    if self.look.classes is not None:
                        drawn_maps, endings = self._best_maps(similarities[i], facts[i][1])
                    draws[i] = partial(draw_maps, image, drawn_maps, endings, self.look)
            results = []
            for i, (key, size) in enumerate(facts):
                said = {m: (masks[i][m], similarities[i][m]) for m in self.methods}
                more = Facts({"threshold": self.threshold, "size": list(size)})
                results.append(ImageResult(key, (ByMethod(said), more), draws[i]))
            return results

        return Later(len(facts), make)

    def _best_maps(
        self, similarities: dict[str, Similarities], size: tuple[int, int]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Maps of the classes with the highest similarities by the first method, and their endings."""
        peaks = similarities[self.methods[0]].values.max(axis=(1, 2))
        best = np.argsort(-peaks, kind="stable")[: self.look.classes].tolist()
        names = [self.info.classes[index] for index in best]
        maps = {}
        for method, of in similarities.items():
            scores = torch.from_numpy(of.values[best]).float()
            grid = (scores.shape[1], scores.shape[2])
            flat = scores.flatten(1).T[None]
            maps[f"{method}."] = similarity_map(flat, grid, size, order=self.order)[0]
        return maps, Masks(names, best, np.zeros((len(best), *size), bool)).endings()


def cut(
    group: Group, shown: Sequence[tuple[int, ...]]
) -> Iterator[tuple[int, tuple[slice, slice, slice]]]:
    """Each image of a group, and where its maps are among those of all, [P,H,W]."""
    end = 0
    for i, (height, width) in zip(group, group.sizes, strict=True):
        rows = slice(end, end := end + len(shown[i]))
        yield i, (rows, slice(height), slice(width))


def _maps(scores: Tensor, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Maps [P,H,W] of similarities [P,h,w] of images [P], as released, on a canvas of all sizes."""
    if len({*sizes}) > 1:
        return padded_maps(scores, images, sizes)
    grid = (scores.shape[1], scores.shape[2])
    return similarity_map(scores.flatten(1).T[None], grid, sizes[0])[0]


def _scaled(maps: Tensor, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Maps of the released order as those of the paper's."""
    if len({*sizes}) > 1:
        return min_max_inside(maps, inside(sizes, maps.device)[images])
    return min_max(maps)


def stored(method: str, scores: Tensor) -> Tensor:
    """Similarities in the precision that they are written in: as few bits as hold them."""
    return scores.half() if METHODS[method].cosines else scores.float()


def draw_maps(
    image: Tensor, maps: dict[str, Tensor], endings: list[str], look: Look
) -> dict[str, np.ndarray]:
    """Maps over their image, each named after the file of its mask.

    Args:
        image: see `tasks._draw`.
        maps: what names begin with, such as ``surgery.`` -> maps [P,H,W] in [0, 1].
        endings: of the files of the P masks.
        look: how they are drawn.
    """
    return {
        f"{prefix}{ending.replace('mask.', 'map.').replace('.png', '.jpg')}": picture
        for prefix, values in maps.items()
        for ending, picture in zip(endings, heat_maps(image, values, look), strict=True)
    }
