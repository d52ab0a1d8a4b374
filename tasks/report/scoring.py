"""How good a run's answer is for one image, by the metrics that the tasks use."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from datamodules._samples import DatasetInfo, Sample
from surgery.metrics import MaskIoU, MeanAveragePrecision, PointAccuracy
from tasks.measures._measures import label_masks
from tasks.measures.segmentation import SegmentationMeasures
from tasks.run.results import LabelMap, Masks, Points, Scores


@dataclass(frozen=True)
class Quality:
    """A number of an image, and of each class on it.

    Attributes:
        name: what is measured, such as IoU.
        value: of the image, a fraction.
        classes: class index -> the same of the class.
    """

    name: str
    value: float
    classes: dict[int, float] = field(default_factory=dict)


class Truth:
    """What is known to be true of an image.

    Args:
        sample: with a label map, masks, or positive labels alone.
        info: the data set.
        void: what void pixels count as, see `label_masks`.
    """

    def __init__(self, sample: Sample, info: DatasetInfo, void: str = "ignore") -> None:
        self.info = info
        self.label = sample.label
        self.positives = sample.positives
        self.masks: Tensor | None = None
        self.valid: Tensor | None = None
        if sample.label is not None and sample.positives is not None:
            self.masks, valid = label_masks(sample.label, sample.positives, info, void=void)
            self.valid = valid.expand_as(self.masks)

    def of_masks(self, masks: Masks) -> Quality | None:
        """Mean IoU over the positive labels that have a mask."""
        if self.masks is None or self.valid is None or masks.masks.shape[1:] != self.size:
            return None
        positives, numbers = self.positives or (), list(masks.numbers)
        metric = MaskIoU(len(positives))
        for i, index in enumerate(positives):
            if index in numbers:
                mask = torch.from_numpy(masks.masks[numbers.index(index)])
                metric.update(mask, self.masks[i], self.valid[i], i)
        return _mean("IoU", dict(zip(positives, metric.per_class().tolist(), strict=True)))

    def of_label_map(self, labels: LabelMap, measures: SegmentationMeasures) -> Quality | None:
        """Mean IoU over the classes that the image shows or is said to show.

        Args:
            labels: the answer.
            measures: empty ones of the run.
        """
        if self.label is None or labels.values.shape != self.size:
            return None
        values = torch.from_numpy(labels.values.astype(np.int64))
        measures.update(values[None], [self.label], [self.positives or ()])
        report = measures.report()
        measures.pop()
        numbers = {name: row["IoU"] for name, row in report.per_class.items()}
        found = {
            index: value
            for index, name in [(-1, "background"), *enumerate(self.info.classes)]
            if (value := numbers.get(name, np.nan)) == value
        }
        return _mean("IoU", found)

    def of_points(self, points: Points, index_of: dict[str, int]) -> Quality | None:
        """Share of the points of positive labels that are where they should be."""
        if self.masks is None or self.valid is None or points.size != self.size:
            return None
        metric = PointAccuracy(len(self.info.classes))
        for i, index in enumerate(self.positives or ()):
            name = self.info.classes[index]
            if points.points.get(name):
                place = torch.tensor(points.points[name])
                labels = torch.tensor(points.labels[name])
                metric.update(place, labels, self.masks[i], self.valid[i], index)
        of_classes = enumerate(metric.per_class().tolist())
        found = {index: value for index, value in of_classes if value == value}
        return Quality("point accuracy", float(metric.compute()), found) if found else None

    def of_scores(self, scores: Scores) -> Quality | None:
        """Average precision of the image's own ranking of classes: do its labels come first?"""
        if not self.positives:
            return None
        truth = torch.zeros(len(scores.names), 1, dtype=torch.bool)
        truth[list(self.positives)] = True
        values = torch.from_numpy(next(iter(scores.ways.values())))
        metric = MeanAveragePrecision(1)
        metric.update(values[:, None], truth)
        return Quality("AP of its classes", float(metric.compute()))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the label."""
        assert self.label is not None
        return self.label.shape[-2], self.label.shape[-1]


def _mean(name: str, values: dict[int, float]) -> Quality | None:
    found = {index: value for index, value in values.items() if value == value}
    return Quality(name, sum(found.values()) / len(found), found) if found else None
