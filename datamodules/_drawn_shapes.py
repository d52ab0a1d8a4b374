"""The shapes of the demo world: whether a point (u right, v down), in half-extents, is inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.floating[Any]]  # float32 wherever pixels are made
Bits = NDArray[np.bool_]

NOUNS: Final[tuple[str, ...]] = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "ring",
    "moon",
    "arrow",
    "flower",
    "fish",
    "tree",
)

REACH: Final = 1.15  # every shape lies in |u|, |v| <= REACH whatever its rotation


def _circle(u: Field, v: Field) -> Bits:
    return u * u + v * v <= 0.86


def _square(u: Field, v: Field) -> Bits:
    return (np.abs(u) <= 0.8) & (np.abs(v) <= 0.8)


def _triangle(u: Field, v: Field) -> Bits:
    return (np.abs(u) <= (v + 1.0) * 0.53) & (v <= 0.66)


def _star(u: Field, v: Field) -> Bits:
    # A pentagram: each of its tips lies outside exactly one of its five lines.
    a, b = u * 0.9511, v * -0.309
    c, d = u * 0.5878, v * 0.809
    inside = (v >= -0.34).astype(np.uint8)
    for along in (b + a, b - a, d + c, d - c):
        inside += along <= 0.34
    return inside >= 4


def _heart(u: Field, v: Field) -> Bits:
    x, y = u * 1.15, v * -1.15 + 0.12
    xx, yy = x * x, y * y
    w = xx + yy - 1.0
    return w * w * w <= xx * yy * y


def _cross(u: Field, v: Field) -> Bits:
    x, y = np.abs(u), np.abs(v)
    return (np.minimum(x, y) <= 0.3) & (np.maximum(x, y) <= 0.95)


def _ring(u: Field, v: Field) -> Bits:
    q = u * u + v * v
    return (q <= 0.92) & (q >= 0.3)


def _moon(u: Field, v: Field) -> Bits:
    u = u - 0.2
    vv = v * v
    w = u - 0.45
    return (u * u + vv <= 0.9) & (w * w + vv >= 0.56)


def _arrow(u: Field, v: Field) -> Bits:
    y = np.abs(v)
    shaft = (y <= 0.22) & (u >= -0.95) & (u <= 0.2)
    return shaft | ((u >= 0.05) & (y <= (1.0 - u) * 0.78))


def _flower(u: Field, v: Field) -> Bits:
    # r^2 <= 0.55 + 0.45 cos 6t, times r^6, with r^6 cos 6t as a polynomial.
    a, b = u * u, v * v
    q = a + b
    return q * q * q * (q - 0.55) <= (a - b) * (a * a - a * b * 14.0 + b * b) * 0.45


def _fish(u: Field, v: Field) -> Bits:
    x, y = u - 0.15, v * 1.6
    tail = (u >= -1.0) & (np.abs(v) <= (-0.35 - u) * 0.9)
    return (x * x + y * y <= 0.64) | tail


def _tree(u: Field, v: Field) -> Bits:
    x = np.abs(u)
    top = (v <= 0.0) & (x <= (v + 1.0) * 0.6)
    skirt = (v <= 0.55) & (x <= (v + 0.45) * 0.8)
    return top | skirt | ((x <= 0.16) & (v >= 0.5) & (v <= 1.0))


SHAPES: Final[tuple[Callable[[Field, Field], Bits], ...]] = (
    _circle,
    _square,
    _triangle,
    _star,
    _heart,
    _cross,
    _ring,
    _moon,
    _arrow,
    _flower,
    _fish,
    _tree,
)


def _probes(noun: int) -> tuple[Field, Field]:
    """Points (u, v), float32 [P] each, spread evenly over a shape."""
    axis = (np.arange(17, dtype=np.float32) - 8) * np.float32(REACH / 8)
    u, v = (np.ascontiguousarray(grid).ravel() for grid in np.meshgrid(axis, axis))
    inside = SHAPES[noun](u, v)
    return u[inside], v[inside]


PROBES: Final = tuple(_probes(noun) for noun in range(len(NOUNS)))
