"""What Interactive measures: whether points are on their objects, and the IoU of SAM's masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from datamodules._samples import DatasetInfo
from surgery.metrics import MaskIoU, PointAccuracy
from tasks.measures._measures import Measures, Report, label_masks, report_by_method


class InteractiveMeasures(Measures):
    """Point accuracy, and mIoU of masks; measures nothing where there is no truth.

    Args:
        info: the data set.
        sam: weights of SAM, if there are masks at all.
        methods: whose points they are, each measured by itself; the first gives the headline.
        down_sample: how many times smaller than the token grid their map is.
    """

    def __init__(
        self, info: DatasetInfo, sam: str | None, methods: Sequence[str], down_sample: int
    ) -> None:
        self.info = info
        self.other = 2 if down_sample == 1 else 1
        """Another ``down_sample``, whose points are measured beside."""
        self.methods = list(methods)
        measured = self.methods if info.labels == "mask" else []
        count = len(info.classes)
        self.points = {method: PointAccuracy(count) for method in measured}
        self.others = {method: PointAccuracy(count) for method in measured}
        self.iou = {method: MaskIoU(count) for method in measured if sam is not None}
        super().__init__(
            {f"{method}.points": metric for method, metric in self.points.items()}
            | {f"{method}.others": metric for method, metric in self.others.items()}
            | {f"{method}.iou": metric for method, metric in self.iou.items()}
        )

    def update(
        self,
        prompts: Mapping[str, list[tuple[Tensor, Tensor]]],
        masks: Mapping[str, list[Tensor]],
        others: Mapping[str, list[tuple[Tensor, Tensor]]],
        label: Tensor | None,
        classes: tuple[int, ...],
    ) -> None:
        """Add an image.

        Args:
            prompts: method -> points [K,2] (x, y) and their labels [K], of each class.
            masks: method -> bool [H,W] of each class, or none at all.
            others: like prompts, with the other ``down_sample``.
            label: the truth, see `label_masks`; without one, nothing is counted.
            classes: [P] class indices.
        """
        if label is None or not self.metrics or not classes:
            return
        foreground, valid = label_masks(label, classes, self.info)
        valid = valid.expand_as(foreground)
        for method in self.methods:
            for i, index in enumerate(classes):
                for metric, (points, labels) in (
                    (self.points[method], prompts[method][i]),
                    (self.others[method], others[method][i]),
                ):
                    metric.update(points, labels, foreground[i], valid[i], index)
                if masks[method]:
                    self.iou[method].update(masks[method][i], foreground[i], valid[i], index)

    def report(self) -> Report:
        """Point accuracy, and mIoU of SAM's masks, with the class-wise numbers."""
        if not self.metrics:
            return Report({})
        return report_by_method(
            self.info.classes,
            columns={method: self._columns(method) for method in self.methods},
            means={method: self._means(method) for method in self.methods},
            details={method: self._details(method) for method in self.methods},
            beside=("point_accuracy", "IoU"),
        )

    def _columns(self, method: str) -> dict[str, Tensor]:
        points = self.points[method]
        columns = {"point_accuracy": points.per_class(), "points": points.points.sum(1)}
        if method in self.iou:
            iou = self.iou[method]
            columns |= {"IoU": iou.per_class(), "images": iou.images}
        return columns

    def _means(self, method: str) -> dict[str, float]:
        points, others = self.points[method], self.others[method]
        values = {
            "point_accuracy": float(points.of(0, 1)),
            "point_accuracy_over_classes": float(points.over_classes()),
            f"point_accuracy_down_sample_{self.other}": float(others.of(0, 1)),
            f"point_accuracy_down_sample_{self.other}_over_classes": float(others.over_classes()),
        }
        if method in self.iou:
            values["mIoU"] = float(self.iou[method].per_class().nanmean())
        return values

    def _details(self, method: str) -> dict[str, float]:
        points = self.points[method]
        return {
            "positive_point_accuracy": float(points.of(1)),
            "negative_point_accuracy": float(points.of(0)),
        }
