"""What Opinions measures: the words, and how near the best sequence comes to its image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules._samples import DatasetInfo
from surgery.metrics import ClassMean, WordCounts
from tasks.measures._measures import Measures, Report, Table

LONGEST = 100
"""So many of the longest words are listed, however short they are."""

LONG = 10
"""Letters from which on all words are listed."""


class OpinionsMeasures(Measures):
    """Words counted over the images, and the mean of the best cosines.

    Args:
        info: the data set.
    """

    def __init__(self, info: DatasetInfo) -> None:
        self.words = WordCounts()
        self.score = ClassMean(1)
        super().__init__({"words": self.words, "score": self.score})

    def update(self, frequencies: Mapping[str, int], best: Tensor) -> None:
        """Add an image: word -> how often it was found, and the best sequence's cosine, a number."""
        self.words.update(frequencies)
        self.score.update(best[None], torch.tensor([0]))

    def report(self) -> Report:
        """The mean of the images' best cosines, all words, and the long ones among them."""
        found = self.words.found()
        common = sorted(found, key=lambda word: (-found[word][0], -found[word][1], word))
        by_length = sorted(found, key=lambda word: (-len(word), word))
        longest = [w for i, w in enumerate(by_length) if i < LONGEST or len(w) >= LONG]
        return Report(
            metrics={"best_cosine": float(self.score.mean())},
            details={"words": len(found), "longest_words": longest[:20]},
            tables={
                "words": Table(
                    ("word", "images", "times"), [(word, *found[word]) for word in common]
                ),
                "longest_words": Table(
                    ("word", "letters", "images", "times"),
                    [(word, len(word), *found[word]) for word in longest],
                ),
            },
        )
