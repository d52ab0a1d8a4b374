"""Which text tokens fit their images best, counted over a data set."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from surgery.metrics._counts import add_rows


class TokenRanks(Metric):
    """How often each token of a vocabulary ranks first, second, ... in its text (Fig. 11).

    Args:
        top: ranks that are counted.

    Example:
        >>> metric = TokenRanks(top=2)
        >>> metric.update(torch.tensor([[4, 1], [4, 0]]), torch.tensor([2, 1]), vocabulary=5)
        >>> metric.counts[4], metric.share(4)
        (tensor([2, 0]), tensor([1., 0.], dtype=torch.float64))
    """

    full_state_update = False
    counts: Tensor
    texts: Tensor

    def __init__(self, top: int = 3) -> None:
        super().__init__(sync_on_compute=False)
        # One row until the first update tells the size of the vocabulary; zeros add to any shape.
        self.add_state("counts", torch.zeros(1, top, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("texts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, ranked: Tensor, lengths: Tensor, vocabulary: int) -> None:
        """Add texts.

        Args:
            ranked: [B,L] token ids of each text from the best on; those after the first ``top`` are
                ignored.
            lengths: int64 [B], how many of them are the text's own; the others are ignored.
            vocabulary: number V of tokens there are, the same in all calls.
        """
        top = self.counts.shape[1]
        if len(self.counts) == 1:
            self.counts = self.counts.new_zeros(vocabulary, top)
        ranked = ranked[:, :top]
        ranks = torch.arange(ranked.shape[1], device=ranked.device)
        counted = (ranks < lengths[:, None]).long()
        add_rows(self.counts.view(-1), (ranked * top + ranks).flatten(), counted.flatten())
        self.texts += len(ranked)

    def share(self, token: int) -> Tensor:
        """[top] share of the texts in which ``token`` has each rank, in [0, 1]; NaN without texts."""
        row = self.counts[token] if token < len(self.counts) else torch.zeros_like(self.counts[0])
        return row.double() / self.texts

    def counted(self) -> list[tuple[int, tuple[int, ...]]]:
        """(token, its count at each rank) of the tokens that have any, the most frequent first."""
        found = self.counts.any(dim=1).nonzero()[:, 0].tolist()
        rows = [(int(token), tuple(self.counts[token].tolist())) for token in found]
        return sorted(rows, key=lambda row: (tuple(-n for n in row[1]), row[0]))

    def compute(self) -> Tensor:
        """[V, top] counts."""
        return self.counts
