"""Words counted over a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric


class WordCounts(Metric):
    """In how many images each word was found, and how often over all.

    A word is no number: the state is a text, one line an image and word, as the bytes of UTF-8.

    Example:
        >>> metric = WordCounts()
        >>> metric.update({"dog": 3, "catdog": 1})
        >>> metric.update({"dog": 2})
        >>> metric.compute()
        {'catdog': (1, 1), 'dog': (2, 5)}
    """

    full_state_update = False
    lines: list[Tensor]

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("lines", [], dist_reduce_fx="cat")

    def update(self, frequencies: Mapping[str, int]) -> None:
        """Add one image: word (without white space) -> how often it was found."""
        text = "".join(f"{word} {count}\n" for word, count in sorted(frequencies.items()))
        if text:
            found = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
            self.lines.append(found.to(self.device))

    def found(self) -> dict[str, tuple[int, int]]:
        """Word -> (images, occurrences), in alphabetical order."""
        images: Counter[str] = Counter()
        times: Counter[str] = Counter()
        for block in self.lines:
            for line in block.cpu().numpy().tobytes().decode().split("\n")[:-1]:
                word, count = line.rsplit(" ", 1)
                images[word] += 1
                times[word] += int(count)
        return {word: (images[word], times[word]) for word in sorted(images)}

    def compute(self) -> dict[str, tuple[int, int]]:
        """The same."""
        return self.found()
