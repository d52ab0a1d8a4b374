"""mSC: how much higher a map is on its object than off it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from surgery.metrics._counts import add_rows


class MeanScoreContrast(Metric):
    """Mean score contrast (mSC, Eq. 12 of the paper).

    For one map: its mean over foreground pixels minus its mean over background pixels. Averaged over
    the images of a class, then over the classes that occur. In [-1, 1]; the paper prints percent. A
    map whose label covers no, or every, pixel has no contrast and is left out.

    Args:
        num_classes: number of classes K.

    Example:
        >>> metric = MeanScoreContrast(2)
        >>> maps = torch.tensor([[[1.0, 0.5], [0.0, 0.0]]])
        >>> foreground = torch.tensor([[[True, True], [False, False]]])
        >>> metric.update(maps, foreground, torch.ones(2, 2, dtype=torch.bool), torch.tensor([1]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    contrast: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(sync_on_compute=False)
        # float64: the mean of a large data set must not depend on how it was cut into shards.
        self.add_state(
            "contrast", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum"
        )
        self.add_state("images", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

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
        metrics: Sequence[MeanScoreContrast],
        maps: Sequence[Tensor],
        foreground: Tensor,
        valid: Tensor,
        classes: Tensor,
    ) -> None:
        """Update several metrics, each by its own maps of the same truth, which is counted once.

        Args:
            metrics: which.
            maps: of each, see `update`.
            foreground: see `update`.
            valid: see `update`.
            classes: see `update`.
        """
        inside = foreground & valid
        inside_count = inside.sum((1, 2), dtype=torch.int32)
        outside_count = valid.expand_as(inside).sum((1, 2), dtype=torch.int32) - inside_count
        usable = (inside_count > 0) & (outside_count > 0)
        classes, counted = classes.long(), usable.long()
        for metric, values in zip(metrics, maps, strict=True):
            inside_sum = (values * inside).sum((1, 2), dtype=torch.float64)
            outside_sum = (values * valid).sum((1, 2), dtype=torch.float64) - inside_sum
            difference = inside_sum / inside_count - outside_sum / outside_count
            add_rows(metric.contrast, classes, torch.where(usable, difference, 0.0))
            add_rows(metric.images, classes, counted)

    def per_class(self) -> Tensor:
        """[K] contrast of each class, NaN where no image has it."""
        return self.contrast / self.images

    def compute(self) -> Tensor:
        """Mean over the classes that occur; NaN if none does."""
        return self.per_class().nanmean()
