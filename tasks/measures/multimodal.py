"""What Multimodal measures: how often each token is among the best of its caption (Fig. 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from datamodules._samples import DatasetInfo
from surgery.metrics import TokenRanks
from tasks.measures._measures import Cell, Measures, Report, Table

TOP = 3
RANKS = ("first", "second", "third")
REPORTED = 20


class MultimodalMeasures(Measures):
    """Counts of tokens by rank.

    Args:
        info: the data set.
        backbone: the backbone's settings, whose ``model`` names the tokenizer.
    """

    def __init__(self, info: DatasetInfo, backbone: Mapping[str, Any]) -> None:
        self.model = str(backbone["model"])
        self.ranks = TokenRanks(TOP)
        super().__init__({"tokens": self.ranks})

    def update(self, ranked: Tensor, lengths: Tensor, vocabulary: int) -> None:
        """Add captions.

        Args:
            ranked: [B,L] token ids of each from the best on.
            lengths: int64 [B], how many of them are the caption's.
            vocabulary: how many tokens there are.
        """
        self.ranks.update(ranked, lengths, vocabulary)

    def report(self) -> Report:
        """How often each token ranks first to third, and [end]'s share of these ranks."""
        from surgery.sources import load_tokenizer  # open_clip's: tokens are stored as numbers
        from surgery.tokens import END, START, piece

        tokenizer = load_tokenizer(self.model)
        ids = tokenizer([""])[0]
        start, end = int(ids[0]), int(ids.max())
        special = {start: START, end: END}
        rows: list[tuple[Cell, ...]] = [
            (special.get(token) or piece(tokenizer, token), *counts)
            for token, counts in self.ranks.counted()
        ]
        shares = zip(RANKS, self.ranks.share(end).tolist(), strict=True)
        return Report(
            metrics={f"end_{rank}": share for rank, share in shares},
            details={
                "captions": int(self.ranks.texts),
                "tokens": {
                    str(row[0]): dict(zip(RANKS, row[1:], strict=True)) for row in rows[:REPORTED]
                },
            },
            tables={"tokens": Table(("token", *RANKS), rows)},
        )
