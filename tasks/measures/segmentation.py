"""What Segmentation measures: the confusion matrix of all pixels (Table 5 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules._samples import VOID, DatasetInfo
from surgery.metrics import Confusion
from tasks._transfer import send_rows
from tasks.measures._measures import Measures, Report, by_class, stack_truth


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
        """Add G images.

        Args:
            predicted: label values int64 [G,H,W], as large as the largest image.
            labels: the truth of each, see `truth_maps`; without any, nothing is counted.
            positives: class indices of each.
        """
        if not labels or not self.metrics:
            return
        first = 0 if self.background_is_a_class else self.info.label_value(0)
        truth = truth_maps(labels, positives, self.info)
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


def truth_maps(
    labels: Sequence[Tensor], positives: Sequence[tuple[int, ...]], info: DatasetInfo
) -> Tensor:
    """Label values of the truth of G images, [G,H,W] as large as the largest of them; -1 where void.

    Args:
        labels: label map [H,W] of each; or its masks [P,H,W] in the order of ``positives``. Of masks,
            pixels that several claim are void, and those that none claims and none calls void are
            background.
        positives: [P] class indices of each image's masks.
        info: the data set that the label values belong to.
    """
    masks = labels[0].ndim == 3
    label, own = stack_truth(labels, VOID if masks else info.void)
    if not masks:
        truth = label.long()
        return truth.where(truth != info.void, -1)
    rows = [[i, info.label_value(k)] for i, of in enumerate(positives) for k in of]
    images, values = send_rows(rows, label.device).view(-1, 2).unbind(1)
    empty = torch.zeros(len(labels), *label.shape[1:], dtype=torch.int32, device=label.device)
    claimed = (label == 1).int()
    claims = empty.index_add(0, images, claimed)
    void = empty.index_add(0, images, (label == VOID).int())
    truth = empty.index_add(0, images, claimed * values.int()[:, None, None])
    nothing = 0 if info.zero_is_background else -1
    truth = truth.where(claims == 1, torch.where(void > 0, -1, nothing))
    truth = truth.where(claims < 2, -1)
    return truth if own is None else truth.where(own, -1)
