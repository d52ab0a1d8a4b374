"""CLIPer's score: tokens of all layers, fused by attention (linsun449/cliper.code, without diffusion)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from surgery.attend import above_mean, balance
from surgery.attention import RECIPES
from surgery.backbone import Backbone
from surgery.features import similarity
from surgery.precision import widen
from surgery.towers import Step, Tower, Visitor
from surgery.windows import Window


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


class Part(NamedTuple):
    """What CLIPer reads of a window.

    Attributes:
        cells: [n] int64, which of the whole images' N cells the window has.
        layers: of the window alone.
    """

    cells: Tensor
    layers: Layers


def read_parts(backbone: Backbone, images: Tensor, windows: Sequence[Window]) -> list[Part]:
    """What each window shows, for `fused_scores`.

    Args:
        backbone: see `read_layers`.
        images: [B, 3, H, W], normalised; H and W are multiples of the patches.
        windows: of all images.

    Returns:
        Of each window.

    Raises:
        InvalidSetting: a window that cuts through patches.
    """
    rows, columns = backbone.patch_size
    height, width = images.shape[2] // rows, images.shape[3] // columns
    cells = torch.arange(height * width, device=images.device).view(height, width)
    parts = []
    for window in windows:
        if (
            window.top % rows
            or window.height % rows
            or window.left % columns
            or window.width % columns
        ):
            raise InvalidSetting(
                f"windows of CLIPer's score begin and end between patches of {rows} x {columns} pixels, "
                f"and one of {window.height} x {window.width} at row {window.top}, column {window.left}, "
                "doesn't"
            )
        in_cells = Window(
            window.top // rows,
            window.left // columns,
            window.height // rows,
            window.width // columns,
        )
        parts.append(Part(in_cells.of(cells).flatten(), read_layers(backbone, window.of(images))))
    return parts


def fused_scores(
    layers: Layers,
    text: Tensor,
    foreground: Tensor,
    *,
    scale: float = 100.0,
    threshold: float = 0.0,
    fuse: bool = True,
    parts: Sequence[Part] = (),
) -> Tensor:
    """How much each text of the foreground is in each cell.

    With P(k) the softmax over all texts, and the mean of the foreground's, of scale x cosine with the
    tokens of layer k, M the attention, and what is below threshold x a text's largest set to 0 in the
    last layer's:
        score(t, j) = sum over cells i of P(last)(i, t) M(i, j) + mean over layers k of P(k)(j, t)
    With windows, P is the mean of that and of the windows' softmax: their scaled cosines and their
    attention, each averaged where windows overlap, the cosines spread by the attention.

    Args:
        layers: of B images.
        text: [T, C].
        foreground: bool [T], which of them are of no background.
        scale: of cosines; the released configs have 100 or 50.
        threshold: in [0, 1].
        fuse: with the mean over layers.
        parts: windows of the same images, of `read_parts`; none: only the whole images count.

    Returns:
        [B, those of the foreground, h, w], from 0 on, in float32.
    """
    text = F.normalize(widen(text), dim=-1)
    texts = torch.cat([text, text[foreground].mean(dim=0, keepdim=True)])
    shares = _scaled_cosines(layers, texts, scale).softmax(dim=-1)
    if parts:
        shares = (shares + _of_parts(parts, texts, scale, shares)) / 2
    shares = shares[..., :-1][..., foreground]
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


def _scaled_cosines(layers: Layers, texts: Tensor, scale: float) -> Tensor:
    """Of the tokens [layers,B,N,C] with T texts: [layers,B,N,T]."""
    return torch.stack([scale * similarity(tokens, texts) for tokens in layers.tokens])


def _of_parts(parts: Sequence[Part], texts: Tensor, scale: float, whole: Tensor) -> Tensor:
    """The softmax of windows on the cells of whole images: [layers,B,N,T], like that of the whole."""
    cosines, attention = (
        torch.zeros_like(whole),
        whole.new_zeros(whole.shape[1], *[whole.shape[2]] * 2),
    )
    seen, pairs = torch.zeros_like(whole[0, 0, :, :1]), torch.zeros_like(attention[0])
    for cells, layers in parts:
        cosines[:, :, cells] += _scaled_cosines(layers, texts, scale)
        attention[:, cells[:, None], cells] += layers.attention
        seen[cells] += 1
        pairs[cells[:, None], cells] += 1
    attention = attention / (pairs + 1e-5)
    attention = attention / attention.sum(dim=-1, keepdim=True)
    with torch.autocast(whole.device.type, enabled=False):
        return (attention.mT @ (cosines / seen)).softmax(dim=-1)


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
