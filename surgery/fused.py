"""CLIPer's score: tokens of all layers, fused by attention (linsun449/cliper.code, without diffusion)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.attend import above_mean, balance
from surgery.attention import RECIPES
from surgery.backbone import Backbone
from surgery.features import similarity
from surgery.precision import widen
from surgery.towers import Step, Tower, Visitor


class Layers(NamedTuple):
    """What CLIPer reads of images.

    Attributes:
        tokens: [layers, B, N, C], not normalised; the last ones are those of the recipe "cliper".
        attention: [B, N, N] of cells to cells, mean over heads.
        grid: (h, w).
    """

    tokens: Tensor
    attention: Tensor
    grid: tuple[int, int]


def read_layers(backbone: Backbone, images: Tensor) -> Layers:
    """The tokens of every layer, seen through the balanced attention of all blocks before the last.

    Args:
        backbone: of a ViT; its recipe plays no part.
        images: [B, 3, H, W], normalised.

    Returns:
        See `Layers`.
    """
    backbone = backbone.with_attention(RECIPES["cliper"])
    path = _EveryLayer(backbone.tower)
    backbone.walk(images, path)
    grid = backbone.tower.grid((images.shape[2], images.shape[3]))
    return Layers(torch.stack(path.tokens), path.attention, grid)


def fused_scores(
    layers: Layers,
    text: Tensor,
    foreground: Tensor,
    *,
    scale: float = 100.0,
    threshold: float = 0.0,
    fuse: bool = True,
) -> Tensor:
    """How much each text of the foreground is in each cell.

    With P(k) the softmax over all texts, and the mean of the foreground's, of scale x cosine with the
    tokens of layer k, M the attention, and what is below threshold x a text's largest set to 0 in the
    last layer's:
        score(t, j) = sum over cells i of P(last)(i, t) M(i, j) + mean over layers k of P(k)(j, t)

    Args:
        layers: of B images.
        text: [T, C].
        foreground: bool [T], which of them are of no background.
        scale: of cosines; the released configs have 100 or 50.
        threshold: in [0, 1].
        fuse: with the mean over layers.

    Returns:
        [B, those of the foreground, h, w], from 0 on, in float32.
    """
    text = F.normalize(widen(text), dim=-1)
    texts = torch.cat([text, text[foreground].mean(dim=0, keepdim=True)])
    shares = torch.stack(
        [(scale * similarity(tokens, texts)).softmax(dim=-1) for tokens in layers.tokens]
    )[..., :-1][..., foreground]
    last = shares[-1]
    last = last.where(last >= threshold * last.amax(dim=1, keepdim=True), 0)
    with torch.autocast(last.device.type, enabled=False):
        scores = last.transpose(1, 2) @ layers.attention
    if fuse:
        scores = scores + torch.cat([shares[:-1], last[None]]).mean(dim=0).transpose(1, 2)
    return scores.unflatten(2, layers.grid)


def fused_labels(
    scores: Tensor,
    size: tuple[int, int],
    *,
    background: float | None = 0.0,
    least: float = 0.0,
    scaled: bool = True,
) -> Tensor:
    """Which text has each pixel.

    Each map is enlarged bilinearly, and scaled to end at its largest cell.

    Args:
        scores: [B, T, h, w], of `fused_scores`.
        size: (H, W) of the answer.
        background: what is below it counts as 0 in the end; None: each pixel has a text.
        least: a text whose largest score is not above it is nowhere.
        scaled: whether each map is scaled to [0, 1] before it is compared with others, and `background`.

    Returns:
        [B, H, W] int64: the text's number from 1 on, the first of equals; 0 where all are 0.
    """
    largest = scores.amax(dim=(-2, -1), keepdim=True)
    maps = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
    maps = maps / (maps.amax(dim=(-2, -1), keepdim=True) + 1e-5) * largest
    if scaled:
        maps = maps - maps.amin(dim=(-2, -1), keepdim=True)
        maps = maps / (maps.amax(dim=(-2, -1), keepdim=True) + 1e-6)
    if background is None:
        return maps.argmax(dim=1) + 1
    maps = maps.where((maps >= background) & (largest > least), 0)
    best, label = maps.max(dim=1)
    return torch.where(best > 0, label + 1, 0)


class _EveryLayer(Visitor):
    """Keeps what enters each block; in the last, makes tokens of all of it."""

    tokens: list[Tensor]
    attention: Tensor

    def __init__(self, tower: Tower) -> None:
        self.tower, self.kept = tower, list[Tensor]()
        self.weights: Tensor | None = None

    def enter(self, step: Step) -> None:
        if step.index == self.tower.depth - 1:
            self.kept.append(widen(step.x).clone())

    def attend(self, step: Step) -> Tensor:
        if step.index == self.tower.depth - 1:
            self._last(step)
            return super().attend(step)
        self.kept.append(widen(step.normed).clone())
        weights = step.weights()
        self.weights = widen(weights) if self.weights is None else self.weights + widen(weights)
        return weights @ step.v

    def _last(self, step: Step) -> None:
        tower, prefix, weights = step.tower, self.tower.prefix, self.weights
        assert weights is not None  # there are blocks before the last one
        self.tokens = []
        for x in self.kept:
            weights = balance(weights)
            seen = above_mean(weights)
            (v,) = tower.heads(step.block, tower.read(step.block, x), "v", step.rotary)
            output = tower.attended(step.block, seen[:, :, prefix:].to(v.dtype) @ v)
            self.tokens.append(tower.project(output))
        self.attention = seen.mean(dim=1)[:, prefix:, prefix:]
