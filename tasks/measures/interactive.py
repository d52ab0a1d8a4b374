"""What Interactive measures: whether points are on their objects, and the IoU of SAM's masks."""

from __future__ import annotations

from torch import Tensor

from datamodules.samples import DatasetInfo
from surgery.metrics import MaskIoU, PointAccuracy
from tasks.measures.base import Measures, Report, by_class, label_masks


class InteractiveMeasures(Measures):
    """Point accuracy, and mIoU of masks; measures nothing where there is no truth.

    Args:
        info: the data set.
        sam: weights of SAM, if there are masks at all.
    """

    def __init__(self, info: DatasetInfo, sam: str | None) -> None:
        self.info = info
        self.has_masks = sam is not None
        self.points = PointAccuracy(len(info.classes))
        self.iou = MaskIoU(len(info.classes))
        measured = {"points": self.points} | ({"iou": self.iou} if self.has_masks else {})
        super().__init__(measured if info.labels == "mask" else {})

    def update(
        self,
        prompts: list[tuple[Tensor, Tensor]],
        masks: list[Tensor],
        label: Tensor | None,
        classes: tuple[int, ...],
    ) -> None:
        """Add an image.

        Args:
            prompts: points [K,2] (x, y) and their labels [K], of each class.
            masks: bool [H,W] of each class, or none at all.
            label: the truth, see `label_masks`; without one, nothing is counted.
            classes: [P] class indices.
        """
        if label is None or not self.metrics or not classes:
            return
        foreground, valid = (part.cpu() for part in label_masks(label, classes, self.info))
        valid = valid.expand_as(foreground)
        for i, index in enumerate(classes):
            self.points.update(*prompts[i], foreground[i], valid[i], index)
            if masks:
                self.iou.update(masks[i], foreground[i], valid[i], index)

    def report(self) -> Report:
        """Point accuracy, and mIoU of SAM's masks, with the class-wise numbers."""
        if not self.metrics:
            return Report({})
        values = {"point_accuracy": float(self.points.of(0, 1))}
        columns = {
            "point_accuracy": self.points.per_class(),
            "points": self.points.points.sum(1),
        }
        if self.has_masks:
            columns |= {"IoU": self.iou.per_class(), "images": self.iou.images}
            values["mIoU"] = float(columns["IoU"].nanmean())
        return Report(
            metrics=values,
            per_class=by_class(self.info.classes, columns),
            details={
                "positive_point_accuracy": float(self.points.of(1)),
                "negative_point_accuracy": float(self.points.of(0)),
            },
        )
