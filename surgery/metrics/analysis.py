"""Means over the images of a class, of any numbers that one image gives."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class ClassMean(Metric):
    """Mean of values over the images of each class, then over the classes that occur.

    Values may be numbers or arrays [*S] of any fixed number of dimensions; their sizes (such as the
    depth of a network) are learned from the first update.

    Args:
        num_classes: number of classes K.
        dims: number of dimensions of one image's values.

    Example:
        >>> metric = ClassMean(3, dims=1)
        >>> metric.update(torch.tensor([[1.0, 2.0], [5.0, 6.0]]), torch.tensor([0, 2]))
        >>> metric.update(torch.tensor([[3.0, 4.0]]), torch.tensor([0]))
        >>> metric.compute()
        tensor([3.5000, 4.5000], dtype=torch.float64)
    """

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, num_classes: int, dims: int = 0) -> None:
        super().__init__(sync_on_compute=False)
        # Sizes of 1 until the first update; zeros add to any shape.
        total = torch.zeros(num_classes, *[1] * dims, dtype=torch.float64)
        self.add_state("total", total, dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, classes: Tensor) -> None:
        """Add one image.

        Args:
            values: [P, *S], one row a positive label; rows that hold a NaN are left out.
            classes: [P] class indices, all different.
        """
        usable = ~values[..., None].isnan().flatten(1).any(dim=1)
        values, classes = values[usable].to(self.total), classes[usable.to(classes.device)]
        classes = classes.to(self.total.device).long()
        # One entry a class at most, so plain indexing adds deterministically.
        total = self.total.expand(-1, *values.shape[1:]).clone()
        total[classes] += values
        self.total = total
        self.images[classes] += 1

    def per_class(self) -> Tensor:
        """[K, *S] mean over the images of each class, NaN where none has it."""
        return self.total / self.images.view(-1, *[1] * (self.total.ndim - 1))

    def mean(self) -> Tensor:
        """[*S] mean over the classes that occur; NaN if none does."""
        return self.per_class().nanmean(dim=0)

    def compute(self) -> Tensor:
        """The same."""
        return self.mean()
