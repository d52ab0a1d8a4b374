"""What Segmentation measures: the confusion matrix of all pixels (Table 5 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules._samples import VOID, DatasetInfo
from surgery.metrics import Confusion
from tasks.measures._measures import Measures, Report, by_class


class SegmentationMeasures(Measures):
    """mIoU and pixel accuracy; measures nothing where there are no masks.

    Args:
        info: the data set.
        background: words for what is no class; the data set's own if None.
        prob_thd: probability below which a pixel is background, if any.
    """

    def __init__(
        self, info: DatasetInfo, background: Sequence[str] | None, prob_thd: float | None
    ) -> None:
        self.info = info
        words = info.background_words if background is None else background
        self.background_is_a_class = bool(words) or prob_thd is not None
        self.confusion = Confusion(len(info.classes) + self.background_is_a_class)
        super().__init__({"confusion": self.confusion} if info.labels == "mask" else {})

    def update(
        self, predicted: Tensor, labels: Sequence[Tensor], positives: Sequence[tuple[int, ...]]
    ) -> None:
        """Add G images of one size.

        Args:
            predicted: label values int64 [G,H,W].
            labels: the truth of each, see `truth_map`; without any, nothing is counted.
            positives: class indices of each.
        """
        if not labels or not self.metrics:
            return
        first = 0 if self.background_is_a_class else self.info.label_value(0)
        if labels[0].ndim == 2:
            truth = truth_map(torch.stack([*labels]), (), self.info)
        else:
            pairs = zip(labels, positives, strict=True)
            truth = torch.stack(
                [truth_map(label, of, self.info, masks=True) for label, of in pairs]
            )
        self.confusion.update(predicted - first, truth - first)

    def report(self) -> Report:
        """mIoU and pixel accuracy of the whole data set, and each class's numbers."""
        if not self.metrics:
            return Report({})
        columns = {
            "IoU": self.confusion.per_class(),
            "accuracy": self.confusion.per_class_accuracy(),
            "pixels": self.confusion.pixels(),
        }
        names = [*(["background"] if self.background_is_a_class else []), *self.info.classes]
        return Report(
            metrics={
                "mIoU": float(columns["IoU"].nanmean()),
                "pixel_accuracy": float(self.confusion.pixel_accuracy()),
            },
            per_class=by_class(names, columns),
            details={
                "mean_accuracy": float(columns["accuracy"].nanmean()),
                "background_is_a_class": self.background_is_a_class,
            },
        )


def truth_map(
    label: Tensor, positives: tuple[int, ...], info: DatasetInfo, *, masks: bool = False
) -> Tensor:
    """Label values int64 [H,W] of a truth, -1 where void.

    Args:
        label: label map [H,W], or several [G,H,W]; or masks [P,H,W] in the order of ``positives``. Of
            masks, pixels that several claim are void, and those that none claims and none calls void
            are background.
        positives: [P] class indices of masks.
        info: the data set that the label values belong to.
        masks: whether they are masks.
    """
    if not masks:
        truth = label.long()
        return truth.where(truth != info.void, -1)
    truth = torch.full(label.shape[1:], 0 if info.zero_is_background else -1, device=label.device)
    truth[(label == VOID).any(0)] = -1
    claims = (label == 1).sum(0)
    for index, mask in zip(positives, label, strict=True):
        truth[(mask == 1) & (claims == 1)] = info.label_value(index)
    return truth.where(claims < 2, -1)
