"""TLP, PEARL's label propagation: maps that are smooth where the image is, kept where they are sure."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.precision import widen

STEPS = 25
_GREY = (0.299, 0.587, 0.114)


def tlp(image: Tensor, maps: Tensor, text: Tensor, *, grid: int = 80) -> Tensor:
    """Maps [T, H, W] of an image, propagated between neighbours (PEARL, as released).

    On a grid of means, with P = softmax over texts of the maps L, and s how much each text is like itself
    and not like others: X that solves (c + Laplacian) X = c L after 25 steps of conjugate gradients from
    L, where c = (largest P, at least 0.05)^2 (1 + sum of s P^2), and an edge between P and P' weighs
    exp(-5 |difference in grey| / its mean) (1 + sum of s P P'), at most 1; the sums count up to 1.

    All texts have one step length: they are refined together, or the outcome is another. Sides that the
    shrinking does not divide end with the mean of what is left.

    Args:
        image: [1, 3, H, W], as the network is given it: normalised.
        maps: [T, H, W], cosines.
        text: [T, C].
        grid: about how many cells each side is shrunk to.

    Returns:
        [T, H, W].
    """
    with torch.autocast(maps.device.type, enabled=False):
        size = (maps.shape[1], maps.shape[2])
        shrink = [max(1, round(side / grid)) for side in size]
        small, pixels = (
            F.avg_pool2d(widen(x), shrink, ceil_mode=True) for x in (maps[None], image)
        )
        likely = small.softmax(dim=1)
        own = _share_of_itself(text)[None, :, None, None]
        sure = likely.amax(dim=1, keepdim=True).clamp(min=0.05).square()
        sure = sure * (1 + (own * likely * likely).sum(dim=1, keepdim=True).clamp(0, 1))
        grey = (pixels * pixels.new_tensor(_GREY)[:, None, None]).sum(dim=1, keepdim=True)
        edges = [_edges(dim, grey, likely, own) for dim in (2, 3)]
        return F.interpolate(_solve(small, sure, edges), size=size, mode="bilinear")[0]


def _share_of_itself(text: Tensor) -> Tensor:
    """[T], the diagonal of softmax(cosines / 0.5) + 10 I with rows divided by their sums."""
    unit = F.normalize(widen(text), dim=-1)
    alike = (unit @ unit.T / 0.5).softmax(dim=1) + 10 * torch.eye(len(unit), device=unit.device)
    return (alike / (alike.sum(dim=1, keepdim=True) + 1e-6)).diagonal()


def _edges(dim: int, grey: Tensor, likely: Tensor, own: Tensor) -> Tensor:
    """Weights of the edges between neighbours along one dimension."""
    count = grey.shape[dim] - 1
    step = grey.diff(dim=dim).abs()
    if not count:
        return step
    alike = own * likely.narrow(dim, 1, count) * likely.narrow(dim, 0, count)
    weight = (-5 * step / (step.mean() + 1e-6)).exp()
    return (weight * (1 + alike.sum(dim=1, keepdim=True).clamp(0, 1))).clamp(0, 1)


def _solve(maps: Tensor, sure: Tensor, edges: list[Tensor]) -> Tensor:
    """(sure + graph Laplacian) X = sure x maps, by conjugate gradients from the maps on."""

    def product(x: Tensor) -> Tensor:
        total = sure * x
        for dim, weight in zip((2, 3), edges, strict=True):
            flow = weight * x.diff(dim=dim)
            count = flow.shape[dim]
            total.narrow(dim, 1, count).add_(flow)
            total.narrow(dim, 0, count).sub_(flow)
        return total

    x = maps.clone()
    rest = sure * maps - product(x)
    way, length = rest, rest.square().sum()
    for _ in range(STEPS):
        change = product(way)
        step = length / (way * change).sum().clamp(min=1e-30)
        x = x + step * way
        rest = rest - step * change
        before, length = length, rest.square().sum()
        way = rest + length / before.clamp(min=1e-30) * way
    return x
