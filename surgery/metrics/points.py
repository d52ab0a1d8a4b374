"""How good prompt points are, and the masks that an interactive segmenter makes of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class PointAccuracy(Metric):
    """Share of points that are where they should be: positive ones on the mask, negative ones off it.

    Over all points of the data set (``compute``), so that a text with many points counts for more; or
    the mean over classes (``over_classes``): the paper doesn't say which it means.

    Args:
        num_classes: number of classes K.

    Example:
        >>> metric = PointAccuracy(1)
        >>> mask = torch.tensor([[True, False], [False, False]])
        >>> points = torch.tensor([[0, 0], [1, 0], [1, 1]])
        >>> metric.update(points, torch.tensor([1, 1, 0]), mask, torch.ones(2, 2) > 0, 0)
        >>> metric.compute()
        tensor(0.6667, dtype=torch.float64)
        >>> metric.of(1), metric.of(0)
        (tensor(0.5000, dtype=torch.float64), tensor(1., dtype=torch.float64))
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    points: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(sync_on_compute=False)
        counts = torch.zeros(num_classes, 2, dtype=torch.int64)
        self.add_state("right", counts, dist_reduce_fx="sum")
        self.add_state("points", counts.clone(), dist_reduce_fx="sum")

    def update(
        self, points: Tensor, labels: Tensor, foreground: Tensor, valid: Tensor, index: int
    ) -> None:
        """Add the points of one text on one image.

        Args:
            points: [K,2] as (x, y) in pixels of the mask.
            labels: [K], 1 positive and 0 negative.
            foreground: bool [H,W].
            valid: bool [H,W]; points on other pixels are not counted.
            index: of the class.
        """
        x, y = points.unbind(1)
        counted = valid[y, x]
        labels = labels[counted].long()
        right = foreground[y, x][counted] == (labels == 1)
        total = torch.bincount(labels, minlength=2)
        self.points[index] += total.to(self.points.device)
        self.right[index] += torch.bincount(labels[right], minlength=2).to(self.right.device)

    def per_class(self) -> Tensor:
        """[K] accuracy of each class's points, NaN where it has none."""
        return self.right.sum(1).double() / self.points.sum(1)

    def of(self, *labels: int) -> Tensor:
        """Accuracy of the positive (1), of the negative (0), or of both (0, 1) points."""
        return self.right[:, labels].sum().double() / self.points[:, labels].sum()

    def over_classes(self) -> Tensor:
        """Mean over classes of the accuracy of their points; NaN without any."""
        return self.per_class().nanmean()

    def compute(self) -> Tensor:
        """Accuracy over all points; NaN without any."""
        return self.of(0, 1)


class MaskIoU(Metric):
    """IoU of one mask a positive label, each label by itself.

    IoU of a class is the sum of its intersections over the sum of its unions; ``compute`` is the mean
    over classes.

    Args:
        num_classes: number of classes K.

    Example:
        >>> metric = MaskIoU(2)
        >>> mask = torch.tensor([[True, True], [False, False]])
        >>> truth = torch.tensor([[True, False], [False, False]])
        >>> metric.update(mask, truth, torch.ones(2, 2) > 0, 0)
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    intersection: Tensor
    union: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(sync_on_compute=False)
        for name in ("intersection", "union", "images"):
            counts = torch.zeros(num_classes, dtype=torch.int64)
            self.add_state(name, counts, dist_reduce_fx="sum")

    def update(self, mask: Tensor, foreground: Tensor, valid: Tensor, index: int) -> None:
        """Add the mask of one label of one image.

        Args:
            mask: bool [H,W].
            foreground: bool [H,W], the truth.
            valid: bool [H,W]; other pixels are not counted.
            index: of the class.
        """
        self.intersection[index] += (mask & foreground & valid).sum().to(self.union.device)
        self.union[index] += ((mask | foreground) & valid).sum().to(self.union.device)
        self.images[index] += 1

    def per_class(self) -> Tensor:
        """[K] IoU of each class, NaN where no image has it."""
        return self.intersection.double() / self.union

    def compute(self) -> Tensor:
        """Mean IoU over the classes that occur; NaN if none does."""
        return self.per_class().nanmean()
