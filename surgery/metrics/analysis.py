"""Means of what the paper's analyses measure: over samples, classes or images; and a survival curve."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassMean(Metric):
    """Mean of values over the samples of each class, then over the classes that occur.

    A sample is one positive label of one image. Values may be numbers or arrays [*S] of any fixed
    number of dimensions; their sizes are learned from the first update.

    Args:
        num_classes: number of classes K.
        dims: number of dimensions of one sample's values.

    Example:
        >>> metric = ClassMean(3, dims=1)
        >>> metric.update(torch.tensor([[1.0, 2.0], [5.0, 6.0]]), torch.tensor([0, 2]))
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
        >>> metric.compute()
        tensor([3.5000, 4.5000], dtype=torch.float64)
        >>> metric.over_samples()
        tensor([3., 4.], dtype=torch.float64)
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self, num_classes: int, dims: int = 0) -> None:
        super().__init__(sync_on_compute=False)
        # Sizes of 1 until the first update; zeros add to any shape.
        total = torch.zeros(num_classes, *[1] * dims, dtype=torch.float64)
        self.add_state("total", total, dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, classes: Tensor) -> None:
        """Add one image.

        Args:
            values: [P, *S], one row a positive label.
            classes: [P] class indices, all different.
        """
        values, classes = values.to(self.total), classes.to(self.total.device).long()
        # One entry a class at most, so plain indexing adds deterministically.
        total = self.total.expand(-1, *values.shape[1:]).clone()
        total[classes] += values
        self.total = total
        self.samples[classes] += 1

    def per_class(self) -> Tensor:
        """[K, *S] mean over the samples of each class, NaN where there are none."""
        return self.total / self.samples.view(-1, *[1] * (self.total.ndim - 1))

    def over_samples(self) -> Tensor:
        """[*S] mean over all samples, whatever their classes; NaN if there are none."""
        return self.total.sum(0) / self.samples.sum()

    def mean(self) -> Tensor:
        """[*S] mean over the classes that occur; NaN if none does."""
        return self.per_class().nanmean(dim=0)

    def compute(self) -> Tensor:
        """The same."""
        return self.mean()


class ImageMean(Metric):
    """Mean of values [*S] over images; NaN means that an image has no such value.

    Args:
        dims: number of dimensions of one image's values; sizes are learned from the first update.

    Example:
        >>> metric = ImageMean(dims=1)
        >>> metric.update(torch.tensor([1.0, 2.0]))
        >>> metric.update(torch.tensor([3.0, torch.nan]))
        >>> metric.compute()
        tensor([2., 2.], dtype=torch.float64)
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, dims: int = 0) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("total", torch.zeros([1] * dims, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros([1] * dims, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add one image's values [*S]."""
        values = values.to(self.total)
        self.total = self.total + values.nan_to_num(0.0)
        self.images = self.images + ~values.isnan()

    def mean(self) -> Tensor:
        """[*S] means, NaN where no image has the value."""
        return self.total / self.images

    def compute(self) -> Tensor:
        """The same."""
        return self.mean()


class Survival(Metric):
    """For each threshold in [0, 1], the share of samples whose value is above it (Fig. 4b).

    Args:
        series: how many values a sample has, a curve each.
        steps: thresholds are 0, 1/steps, ..., 1.

    Example:
        >>> metric = Survival(1, steps=2)
        >>> metric.update(torch.tensor([[0.4], [0.6], [1.0]]))
        >>> metric.compute()
        tensor([[1.0000, 0.6667, 0.0000]], dtype=torch.float64)
    """

    full_state_update = False
    above: Tensor
    samples: Tensor

    def __init__(self, series: int, steps: int = 100) -> None:
        super().__init__(sync_on_compute=False)
        self.steps = steps
        above = torch.zeros(series, steps + 1, dtype=torch.int64)
        self.add_state("above", above, dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def thresholds(self) -> Tensor:
        """[steps + 1], from 0 to 1."""
        return torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        """Add samples.

        Args:
            values: [P, series] in [0, 1].
        """
        values = values.to(self.above.device, torch.float64)
        above = values[..., None] > self.thresholds().to(values.device)
        self.above += above.sum(0)
        self.samples += len(values)

    def curves(self) -> Tensor:
        """[series, steps + 1] shares; NaN without samples."""
        return self.above.double() / self.samples

    def compute(self) -> Tensor:
        """The same."""
        return self.curves()
