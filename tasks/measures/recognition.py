"""What Recognition measures: mAP of each way of scoring (Tables 3 and 6 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from datamodules._samples import DatasetInfo
from surgery.metrics import MeanAveragePrecision
from tasks.measures._measures import Measures, Report, by_class, other_reading


class RecognitionMeasures(Measures):
    """One mAP for each way of scoring.

    Args:
        info: the data set.
        form: of feature surgery; the other one is measured beside.
    """

    def __init__(self, info: DatasetInfo, form: str) -> None:
        self.info = info
        self.form = form
        ways = ("", other_reading(form), "softmax", "cosine")
        self.precision = {way: MeanAveragePrecision(len(info.classes)) for way in ways}
        super().__init__({way or "surgery": metric for way, metric in self.precision.items()})

    def update(self, scores: Mapping[str, Tensor], truth: Tensor) -> None:
        """Add images: way -> scores [B,K], and which classes they show, bool [B,K]."""
        for way, metric in self.precision.items():
            metric.update(scores[way], truth)

    def report(self) -> Report:
        """mAP each way, AP of each class; classes without positives are named and left out."""
        columns = {
            f"AP_{way}".rstrip("_"): metric.per_class() for way, metric in self.precision.items()
        }
        counted = self.precision[""]
        positives = counted.positives()
        values = {f"m{name}": float(column.nanmean()) for name, column in columns.items()}
        return Report(
            metrics=values,
            per_class=by_class(self.info.classes, columns | {"positives": positives}),
            details={
                "form": self.form,
                "images_with_labels": sum(len(part) for part in counted.truth),
                "classes_without_positives": [
                    name
                    for name, count in zip(self.info.classes, positives.tolist(), strict=True)
                    if not count
                ],
            },
        )
