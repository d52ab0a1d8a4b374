"""PAMR, pixel-adaptive mask refinement: maps that follow the colours of the image.

Araslanov and Roth 2020, https://arxiv.org/abs/2005.08104, as in the code of NACLIP, SCLIP, SC-CLIP,
ResCLIP and SFP, which all have the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.precision import widen

STEPS = 10
DILATIONS = (8, 16)
"""What all evaluations that use PAMR run it with."""

_NUMBERS_IN_CACHE = (
    1 << 20
)  # maps of so many pixels at a time, on a CPU: half the time of all at once
_AROUND = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x)


def pamr(
    images: Tensor, maps: Tensor, *, steps: int = STEPS, dilations: Sequence[int] = DILATIONS
) -> Tensor:
    """Maps in which pixels of like colour have become alike.

    In every step each pixel becomes the mean of its neighbours, weighted by `Affinities`.

    Args:
        images: [B, 3, H, W], as the network is given them: normalised.
        maps: [B, T, h, w]; of another size they are enlarged first, bilinearly with corner alignment.
        steps: how often.
        dilations: distances to the neighbours in pixels.

    Returns:
        [B, T, H, W], each value between the smallest and the largest of its map.

    Raises:
        ValueError: no maps of these images, or no dilation.

    Example:
        >>> picture = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(1, 3, 1, 4)
        >>> pamr(picture, torch.tensor([[[[1.0, 0.8, 0.1, 0.0]]]]), dilations=[1])
        tensor([[[[0.9231, 0.9231, 0.0385, 0.0385]]]])
    """
    return Affinities.of(images, dilations).refine(maps, steps=steps)


@dataclass(frozen=True)
class Affinities:
    """How alike in colour each pixel and its neighbours are: what PAMR's steps have in common.

    Attributes:
        weights: [B, 8 * number of dilations, H, W], which sum to 1; the pixel itself has none.
        dilations: distances to the neighbours in pixels, 8 at each, row by row.
    """

    weights: Tensor
    dilations: tuple[int, ...]

    @classmethod
    def of(cls, images: Tensor, dilations: Sequence[int] = DILATIONS) -> Affinities:
        """Affinities of images [B, 3, H, W].

        With s the standard deviation, of each colour, of the pixel and its 8 neighbours at all
        distances (the pixel counts once a distance): softmax over neighbours of the mean over colours
        of -|difference| / (0.1 s + 1e-8). Borders repeat the edge.
        """
        if images.ndim != 4 or not dilations or min(dilations) < 1:
            raise ValueError(
                f"expected images [B, 3, H, W] and dilations from 1 on, given {list(images.shape)} and "
                f"{list(dilations)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            images = widen(images)
            count = 9 * len(dilations)
            mean = images * len(dilations)
            for neighbour in _neighbours(images, dilations):
                mean += neighbour
            mean /= count
            spread = (images - mean).square_().mul_(len(dilations))
            for neighbour in _neighbours(images, dilations):
                spread += (neighbour - mean).square_()
            scale = (spread / (count - 1)).sqrt_().mul_(0.1).add_(1e-8)
            logits = [
                ((neighbour - images).abs_() / scale).mean(dim=1).neg_()
                for neighbour in _neighbours(images, dilations)
            ]
            return cls(torch.stack(logits, dim=1).softmax(dim=1), tuple(dilations))

    def refine(self, maps: Tensor, *, steps: int = STEPS) -> Tensor:
        """Maps [B, T, h, w] after so many steps, [B, T, H, W]; see `pamr`.

        Maps do not see each other: some of them now and the others later give the same.
        """
        if maps.ndim != 4 or len(maps) != len(self.weights):
            raise ValueError(
                f"maps: expected [{len(self.weights)}, T, h, w], given {list(maps.shape)}"
            )
        with torch.autocast(maps.device.type, enabled=False):
            maps = widen(maps)
            size = self.weights.shape[2:]
            if maps.shape[2:] != size:
                maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
            if maps.device.type != "cpu":
                return self._spread(maps, steps)
            at_once = max(1, _NUMBERS_IN_CACHE // (len(maps) * size[0] * size[1]))
            return torch.cat([self._spread(part, steps) for part in maps.split(at_once, 1)], dim=1)

    def _spread(self, maps: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            total = torch.zeros_like(maps)
            for i, neighbour in enumerate(_neighbours(maps, self.dilations)):
                total.addcmul_(neighbour, self.weights[:, i : i + 1])
            maps = total
        return maps


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """Each pixel's 8 neighbours at each distance, as so many views [B, C, H, W]; the edge repeats."""
    height, width = x.shape[2:]
    most = max(dilations)
    padded = F.pad(x, (most, most, most, most), mode="replicate")
    for distance in dilations:
        for down, right in _AROUND:
            top, left = most + down * distance, most + right * distance
            yield padded[:, :, top : top + height, left : left + width]
