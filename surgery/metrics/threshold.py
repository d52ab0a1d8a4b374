"""mIoU of binarised maps at the one threshold that suits the whole data set best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from surgery.metrics._counts import add_rows, count_codes


class ThresholdIoU(Metric):
    """IoU of each positive label by itself, for all thresholds in one pass.

    A map is foreground where it is >= t. Its values are counted in a histogram, so the cost does not
    depend on the number of thresholds. The paper does not state t (the first version of its
    preprint: by grid search): here one t serves the whole data set, the one that gives the best mean
    over classes. IoU of a class is the sum of its intersections over the sum of its unions
    (``compute``); the mean of the IoUs of its images is kept too (``compute_per_image``), since the
    paper does not say which it means.

    Args:
        num_classes: number of classes K.
        thresholds: number of thresholds: 0, 1/n, ..., (n-1)/n. Threshold 0 is the all-foreground mask.

    Example:
        >>> metric = ThresholdIoU(1, thresholds=4)
        >>> maps = torch.tensor([[[1.0, 0.6], [0.5, 0.0]]])
        >>> foreground = torch.tensor([[[True, True], [False, False]]])
        >>> metric.update(maps, foreground, torch.ones(2, 2, dtype=torch.bool), torch.tensor([0]))
        >>> metric.curve()
        tensor([0.5000, 0.6667, 0.6667, 0.5000], dtype=torch.float64)
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    inside: Tensor
    outside: Tensor
    image_iou: Tensor
    images: Tensor

    def __init__(self, num_classes: int, thresholds: int = 256) -> None:
        super().__init__(sync_on_compute=False)
        self.thresholds = thresholds
        counts = torch.zeros(num_classes, thresholds, dtype=torch.int64)
        self.add_state("inside", counts, dist_reduce_fx="sum")
        self.add_state("outside", counts.clone(), dist_reduce_fx="sum")
        self.add_state("image_iou", counts.double(), dist_reduce_fx="sum")
        self.add_state("images", counts[:, 0].clone(), dist_reduce_fx="sum")

    def update(self, maps: Tensor, foreground: Tensor, valid: Tensor, classes: Tensor) -> None:
        """Add maps of one or more images of a size.

        Args:
            maps: [P,H,W] in [0, 1], one a positive label.
            foreground: bool [P,H,W].
            valid: bool [H,W] or [P,H,W]; pixels that count as foreground or background.
            classes: [P] class indices.
        """
        self.update_together([self], [maps], foreground, valid, classes)

    @staticmethod
    def update_together(
        metrics: Sequence[ThresholdIoU],
        maps: Sequence[Tensor],
        foreground: Tensor,
        valid: Tensor,
        classes: Tensor,
    ) -> None:
        """Update several metrics of as many thresholds, each by its own maps of the same truth.

        Args:
            metrics: which.
            maps: of each, see `update`; their codes are in memory at once, 4 bytes a pixel.
            foreground: see `update`.
            valid: see `update`.
            classes: see `update`.
        """
        bins, classes = metrics[0].thresholds, classes.long()
        # Bin b holds the values that are >= threshold b and < threshold b + 1.
        codes = (torch.stack([*maps]).float() * bins).int().clamp_(0, bins - 1)
        codes += foreground.int() * bins
        rows = torch.arange(len(metrics) * len(classes), dtype=torch.int32, device=codes.device)
        codes += rows.view(len(metrics), -1, 1, 1) * 2 * bins
        histogram = count_codes(codes, valid, len(rows) * 2 * bins)
        outside, inside = histogram.view(len(metrics), -1, 2, bins).unbind(2)
        ious, ones = _iou(inside, outside).nan_to_num(0.0), torch.ones_like(classes)
        for i, metric in enumerate(metrics):
            add_rows(metric.inside, classes, inside[i])
            add_rows(metric.outside, classes, outside[i])
            add_rows(metric.image_iou, classes, ious[i])
            add_rows(metric.images, classes, ones)

    def per_class(self) -> Tensor:
        """[K] IoU of each class at the best threshold, NaN where no image has it."""
        return _iou(self.inside, self.outside)[:, self.best_bin()]

    def curve(self) -> Tensor:
        """[n] mean IoU over the classes that occur, for every threshold."""
        return _iou(self.inside, self.outside).nanmean(0)

    def best_bin(self) -> int:
        """Number of the threshold with the best mean IoU (the lowest of equals)."""
        return int(self.curve().nan_to_num(-1.0).argmax())

    def best_threshold(self) -> float:
        """The threshold with the best mean IoU."""
        return self.best_bin() / self.thresholds

    def at(self, threshold: float) -> Tensor:
        """Mean IoU at a fixed threshold, rounded down to the grid."""
        return self.curve()[min(int(threshold * self.thresholds), self.thresholds - 1)]

    def compute(self) -> Tensor:
        """Mean IoU over the classes that occur at the best threshold; NaN if none does."""
        return self.per_class().nanmean()

    def compute_per_image(self) -> Tensor:
        """The same with the mean of the images' IoUs in place of the class's, at its best threshold."""
        curve = (self.image_iou / self.images.unsqueeze(1)).nanmean(0)
        return curve[curve.nan_to_num(-1.0).argmax()]


def _iou(inside: Tensor, outside: Tensor) -> Tensor:
    """[..., n] IoU at every threshold from the histograms of values on and off the object."""
    hits = inside.flip(-1).cumsum(-1).flip(-1).double()
    false = outside.flip(-1).cumsum(-1).flip(-1)
    return hits / (inside.sum(-1, keepdim=True) + false)
