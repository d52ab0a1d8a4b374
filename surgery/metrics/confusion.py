"""mIoU and pixel accuracy of label maps, from one confusion matrix over the whole data set."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from surgery.metrics._counts import count_codes


class Confusion(Metric):
    """How often each true class was taken for each other one.

    All numbers follow from the counts of the whole data set; a mean of the images' own IoUs is
    another number, and not what segmentation benchmarks report.

    Args:
        num_classes: number of classes K, a background class included.

    Example:
        >>> metric = Confusion(3)
        >>> metric.update(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [1, 255]]))
        >>> metric.per_class()
        tensor([0.5000, 0.5000,    nan], dtype=torch.float64)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
        >>> metric.pixel_accuracy()
        tensor(0.6667, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    matrix: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(sync_on_compute=False)
        counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", counts, dist_reduce_fx="sum")

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        """Add the pixels of one image.

        Args:
            predicted: class indices 0 ... K-1, integers of any shape.
            truth: class indices of the same shape; pixels of any value outside of 0 ... K-1 (void, or
                a background that is no class) are left out.
        """
        count = len(self.matrix)
        truth = truth.int()
        codes = truth * count + predicted.int()
        pairs = count_codes(codes, (truth >= 0) & (truth < count), count * count)
        self.matrix += pairs.view(count, count).to(self.matrix.device)

    def pixels(self) -> Tensor:
        """[K] true pixels of each class."""
        return self.matrix.sum(1)

    def per_class(self) -> Tensor:
        """[K] IoU of each class; NaN for one that neither occurs nor was predicted."""
        hits = self.matrix.diagonal().double()
        return hits / (self.pixels() + self.matrix.sum(0) - hits)

    def per_class_accuracy(self) -> Tensor:
        """[K] share of each class's pixels that were found; NaN for one that does not occur."""
        return self.matrix.diagonal().double() / self.pixels()

    def pixel_accuracy(self) -> Tensor:
        """Share of all pixels that got their class; NaN without any pixel."""
        return self.matrix.diagonal().sum().double() / self.matrix.sum()

    def compute(self) -> Tensor:
        """Mean IoU over the classes that occur or were predicted; NaN if none does."""
        return self.per_class().nanmean()
