"""What Explainability measures: mSC, and IoU over thresholds (Table 1 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.samples import DatasetInfo
from surgery.metrics import MeanScoreContrast, ThresholdIoU
from tasks.measures.base import Measures, Report, by_class, label_masks

RAW = "raw_"
"""Prefix of the metrics of plain CLIP."""


class ExplainabilityMeasures(Measures):
    """How well maps fit the masks of their labels; measures nothing where there are none.

    Args:
        info: the data set.
        threshold: map value in [0, 1] at which IoU is reported besides the best one.
        void: whether void pixels count not at all (``ignore``) or as ``background``.
        baseline: whether plain CLIP's maps are measured beside.
    """

    def __init__(self, info: DatasetInfo, threshold: float, void: str, baseline: bool) -> None:
        self.info = info
        self.threshold = threshold
        self.void = void
        self.baseline = baseline
        kinds = (("", RAW) if baseline else ("",)) if info.labels == "mask" else ()
        count = len(info.classes)
        self.contrast = {kind: MeanScoreContrast(count) for kind in kinds}
        self.iou = {kind: ThresholdIoU(count) for kind in kinds}
        super().__init__(
            {
                name: metric
                for kind in kinds
                for name, metric in (
                    (f"{kind}contrast", self.contrast[kind]),
                    (f"{kind}iou", self.iou[kind]),
                )
            }
        )

    def update(
        self, maps: dict[str, Tensor], label: Tensor | None, classes: tuple[int, ...]
    ) -> None:
        """Add an image.

        Args:
            maps: kind ("", or ``RAW``) -> maps [P,H,W] in [0, 1].
            label: the truth, see `label_masks`; without one, nothing is counted.
            classes: [P] class indices.
        """
        if label is None or not self.metrics or not classes:
            return
        foreground, valid = label_masks(label, classes, self.info, void=self.void)
        for kind, values in maps.items():
            indices = torch.tensor(classes, device=values.device)
            self.contrast[kind].update(values, foreground, valid, indices)
            self.iou[kind].update(values, foreground, valid, indices)

    def report(self) -> Report:
        """mIoU at the best threshold and mSC, with the class-wise numbers."""
        if not self.metrics:
            return Report({})
        columns, iou = self._columns(""), self.iou[""]
        return Report(
            metrics=_means(columns),
            baseline=_means(self._columns(RAW)) if self.baseline else {},
            per_class=by_class(self.info.classes, columns),
            details={
                "threshold": iou.best_threshold(),
                "mIoU_at_fixed_threshold": float(iou.at(self.threshold)),
                "mIoU_per_image": float(iou.compute_per_image()),
                "mIoU_all_foreground": float(iou.at(0.0)),
            },
        )

    def _columns(self, kind: str) -> dict[str, Tensor]:
        contrast, iou = self.contrast[kind], self.iou[kind]
        return {"IoU": iou.per_class(), "SC": contrast.per_class(), "images": iou.images}


def _means(columns: dict[str, Tensor]) -> dict[str, float]:
    return {f"m{name}": float(columns[name].nanmean()) for name in ("IoU", "SC")}
