"""The backgrounds of the demo world: mixtures in [0, 1] of two colours, and where chance comes from."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from datamodules._drawn_shapes import Field

BACKGROUNDS: Final[dict[str, str]] = {
    "plain": "on a plain background",
    "gradient": "on a gradient",
    "noise": "on noise",
    "stripes": "on stripes",
    "checkers": "on checkers",
    "dots": "on dots",
}
"""The backgrounds' names and how a caption speaks of them."""

UNSEEN_BACKGROUNDS: Final[tuple[str, ...]] = ("clouds",)
"""Drawn only when asked for by name: a field of all scales, as photographs have. Never named."""


class Draws:
    """Random numbers from integer keys, the same on every platform and under every NumPy.

    Only the raw words of PCG64 are used: unlike the distributions of `numpy.random.Generator`,
    their stream is promised never to change.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._pool: list[float] = []

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._pool:
            words = self._bits.random_raw(64) >> np.uint64(11)
            self._pool = (words.astype(np.float64) * 2.0**-53).tolist()
        return self._pool.pop()

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def below(self, count: int) -> int:
        """An integer in 0 ... count - 1."""
        return int(self.unit() * count)

    def some(self, count: int, of: int) -> list[int]:
        """`count` different integers in 0 ... of - 1, in random order."""
        left = list(range(of))
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def bytes(self, *shape: int) -> NDArray[np.uint8]:
        """Random bytes of the given shape."""
        count = 1
        for length in shape:
            count *= length
        words = np.asarray(self._bits.random_raw((count + 7) // 8)).astype("<u8", copy=False)
        return words.view(np.uint8)[:count].reshape(shape)


def _wave(phase: Field, step: float) -> Field:
    """A square wave in [-1, 1] of period 1, softened over one pixel; `step` is phase a pixel."""
    tent = np.abs(phase - np.floor(phase) - 0.5) * 4.0 - 1.0
    return np.clip(tent * (0.5 / step), -1.0, 1.0)


def _lattice(values: NDArray[np.uint8], x: Field, y: Field) -> Field:
    """Bilinear values in [0, 1] of a square lattice, uint8 [n, n], spanning the frame."""
    last = values.shape[0] - 1
    grid = values.astype(np.float32) * np.float32(1.0 / 255.0)

    def along(axis: Field) -> tuple[NDArray[np.intp], Field]:
        at = np.clip((axis * 0.5 + 0.5) * last, 0.0, last - 0.001)
        cell = np.floor(at)
        return cell.astype(np.intp), at - cell

    (column, right), (row, down) = along(x), along(y)
    wide = grid[:, column] + (grid[:, column + 1] - grid[:, column]) * right
    return wide[row] + (wide[row + 1] - wide[row]) * down[:, None]


def mixture(draws: Draws, kind: str, x: Field, y: Field, span: tuple[float, float]) -> Field:
    """The mixture of a background over the scene coordinates x [W] and y [H].

    `span` is half the width and half the height of the frame: (1, 1) where it is square.
    """
    pixel = 2.0 * span[0] / x.size
    turn = draws.between(-1.0, 1.0)
    norm = 1.0 + turn * turn
    c, s = (1.0 - turn * turn) / norm, 2.0 * turn / norm
    rate, shift, lift = draws.between(1.2, 3.0), draws.unit(), draws.unit()
    p = (x * (c * rate) + shift) + (y * (s * rate))[:, None]
    q = (x * (-s * rate) + lift) + (y * (c * rate))[:, None]
    if kind == "plain":
        return np.zeros_like(p)
    if kind == "gradient":
        across = x * (c / span[0]) + (y * (s / span[1]))[:, None]
        return np.clip(across * 0.4 + 0.5, 0.0, 1.0)
    if kind == "stripes":
        return _wave(p, rate * pixel) * 0.5 + 0.5
    if kind == "checkers":
        return _wave(p, rate * pixel) * _wave(q, rate * pixel) * 0.5 + 0.5
    if kind == "dots":
        p, q = p - np.floor(p) - 0.5, q - np.floor(q) - 0.5
        return np.clip((0.08 - (p * p + q * q)) * (1.8 / (rate * pixel)) + 0.5, 0.0, 1.0)
    if kind == "noise":
        cells = draws.bytes(32, 32).astype(np.float32) * np.float32(1.0 / 255.0)
        column, row = (
            np.clip(np.floor((axis / half * 0.5 + 0.5) * 32.0), 0.0, 31.0).astype(np.intp)
            for axis, half in zip((x, y), span, strict=True)
        )
        return cells[row[:, None], column]
    if kind == "clouds":
        total = np.zeros((3, y.size, x.size), np.float32)
        for octave in range(5):
            shared, weight = draws.bytes(2 + 2**octave, 2 + 2**octave), 0.62**octave * 0.45
            for channel in range(3):
                own = draws.bytes(*shared.shape)
                values = (shared // 2) + (own // 2)
                total[channel] += _lattice(values, x / span[0], y / span[1]) * weight
        return np.clip((total - 0.5) * 1.5 + 0.5, 0.0, 1.0)
    known = ", ".join((*BACKGROUNDS, *UNSEEN_BACKGROUNDS))
    raise ValueError(f"expected a background among {known}; got {kind!r}")
