"""What Explainability measures: mSC, and IoU over thresholds (Table 1 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from datamodules._samples import VOID, DatasetInfo
from surgery.metrics import MeanScoreContrast, ThresholdIoU
from tasks.measures._measures import (
    Measures,
    Report,
    label_masks,
    other_reading,
    report_by_method,
    stack_truth,
)


class ExplainabilityMeasures(Measures):
    """How well maps fit the masks of their labels; measures nothing where there are none.

    Args:
        info: the data set.
        order: of min-max and enlarging in the maps; what the other one gives stands beside.
        threshold: map value in [0, 1] at which IoU is reported besides the best one.
        void: whether void pixels count not at all (``ignore``) or as ``background``.
        methods: what explains the images, each measured by itself; the first gives the headline.
    """

    def __init__(
        self, info: DatasetInfo, order: str, threshold: float, void: str, methods: Sequence[str]
    ) -> None:
        self.info = info
        self.other = other_reading(order)
        """The other order, whose maps are measured beside."""
        self.threshold = threshold
        self.void = void
        self.methods = list(methods)
        measured = self.methods if info.labels == "mask" else []
        count = len(info.classes)
        self.contrast = {method: MeanScoreContrast(count) for method in measured}
        self.iou = {method: ThresholdIoU(count) for method in measured}
        self.others = {
            method: (MeanScoreContrast(count), ThresholdIoU(count)) for method in measured
        }
        super().__init__(
            {
                name: metric
                for method in measured
                for name, metric in (
                    (f"{method}.contrast", self.contrast[method]),
                    (f"{method}.iou", self.iou[method]),
                    (f"{method}.other_contrast", self.others[method][0]),
                    (f"{method}.other_iou", self.others[method][1]),
                )
            }
        )

    def update(
        self,
        maps: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        labels: Sequence[Tensor],
        images: Tensor,
        classes: Tensor,
    ) -> None:
        """Add images, their maps on one canvas.

        Args:
            maps: method -> maps [P,H,W] in [0, 1], of all positive labels, image after image; as large
                as the largest image.
            others: the same in the other order.
            labels: the truth of each image, label maps or masks, see `label_masks`; without any,
                nothing is counted.
            images: int64 [P], place of each positive label's image among them.
            classes: int64 [P].
        """
        if not labels or not self.metrics or not len(classes):
            return
        own = None
        label = labels[0]
        several = len(labels) > 1
        if several:
            label, own = stack_truth(labels, VOID if label.ndim == 3 else self.info.void)
        foreground, valid = label_masks(
            label,
            classes,
            self.info,
            void=self.void,
            images=images if several and labels[0].ndim == 2 else None,
        )
        if own is not None:
            valid = valid & own[images]
        truth = (foreground, valid, classes)
        for method in maps:
            contrast, iou = self.others[method]
            both = [maps[method], others[method]]
            MeanScoreContrast.update_together([self.contrast[method], contrast], both, *truth)
            ThresholdIoU.update_together([self.iou[method], iou], both, *truth)

    def report(self) -> Report:
        """mIoU at the best threshold and mSC, with the class-wise numbers."""
        if not self.metrics:
            return Report({})
        columns = {method: self._columns(method) for method in self.methods}
        return report_by_method(
            self.info.classes,
            columns,
            means={method: self._means(method) for method in self.methods},
            details={method: self._details(method) for method in self.methods},
            beside=("IoU", "SC"),
        )

    def _columns(self, method: str) -> dict[str, Tensor]:
        contrast, iou = self.contrast[method], self.iou[method]
        return {"IoU": iou.per_class(), "SC": contrast.per_class(), "images": iou.images}

    def _details(self, method: str) -> dict[str, Any]:
        iou = self.iou[method]
        return {
            "threshold": iou.best_threshold(),
            "mIoU_at_fixed_threshold": float(iou.at(self.threshold)),
            "mIoU_per_image": float(iou.compute_per_image()),
            "mIoU_all_foreground": float(iou.at(0.0)),
        }

    def _means(self, method: str) -> dict[str, float]:
        contrast, iou = self.others[method]
        return {
            "mIoU": float(self.iou[method].per_class().nanmean()),
            "mSC": float(self.contrast[method].per_class().nanmean()),
            f"mIoU_order_{self.other}": float(iou.per_class().nanmean()),
            f"mSC_order_{self.other}": float(contrast.per_class().nanmean()),
        }
