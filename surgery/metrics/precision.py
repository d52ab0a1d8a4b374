"""mAP of multi-label recognition: how well each class's scores order the images."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanAveragePrecision(Metric):
    """Mean over classes of the average precision of their ranking of all images.

    AP is the sum over the different scores, from the highest down, of the rise in recall times the
    precision there: no interpolation, and images of equal score count together, so that the order
    in which shards were seen does not matter. The scores of all images are kept, 4 bytes each:
    a ranking has no state of fixed size.

    Args:
        num_classes: number of classes K.

    Example:
        >>> metric = MeanAveragePrecision(2)
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
        >>> metric.update(scores, torch.tensor([[1, 0], [0, 0], [1, 0]], dtype=torch.bool))
        >>> metric.per_class()
        tensor([0.8333,    nan], dtype=torch.float64)
        >>> metric.compute()
        tensor(0.8333, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    scores: list[Tensor]
    truth: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__(sync_on_compute=False)
        self.num_classes = num_classes
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("truth", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, truth: Tensor) -> None:
        """Add images.

        Args:
            scores: [B,K], of any scale.
            truth: bool [B,K], which classes each image shows.

        Raises:
            ValueError: other shapes.
        """
        if scores.shape != truth.shape or scores.shape[1:] != (self.num_classes,):
            raise ValueError(
                f"expected scores and truth [B, {self.num_classes}], "
                f"given {list(scores.shape)} and {list(truth.shape)}"
            )
        self.scores.append(scores.float())
        self.truth.append(truth.bool())

    def positives(self) -> Tensor:
        """[K] number of images that show each class."""
        if not self.truth:
            return torch.zeros(self.num_classes, dtype=torch.int64)
        return torch.cat(self.truth).sum(0)

    def per_class(self) -> Tensor:
        """[K] AP of each class; NaN for one that no image shows."""
        if not self.scores:
            return torch.full((self.num_classes,), torch.nan, dtype=torch.float64)
        columns = zip(torch.cat(self.scores).T, torch.cat(self.truth).T, strict=True)
        return torch.stack([_average_precision(scores, truth) for scores, truth in columns])

    def compute(self) -> Tensor:
        """Mean AP over the classes that occur; NaN if none does."""
        return self.per_class().nanmean()


def _average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """AP of one class from the scores [n] of all images and which of them show it, bool [n]."""
    if not len(scores):
        return torch.tensor(torch.nan, dtype=torch.float64, device=scores.device)
    ordered, order = scores.sort(descending=True)
    hits = truth[order].cumsum(0).double()
    # Precision and recall only exist where a cut can be made: at the last image of equal scores.
    cuts = torch.ones_like(truth)
    cuts[:-1] = ordered[1:] != ordered[:-1]
    hits, seen = hits[cuts], cuts.nonzero()[:, 0] + 1
    return (hits.diff(prepend=hits.new_zeros(1)) * hits / seen).sum() / hits[-1]
