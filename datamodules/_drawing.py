"""Drawing the demo world: small scenes of shapes, with captions, labels and exact masks.

Pretrained weights and benchmarks cannot be shipped; this world can. A scene shows one to four
different objects on one of six backgrounds, and is a function of (seed, index): the same numbers
give the same pixels on every platform, because only raw PCG64 words and operations which IEEE 754
rounds exactly (+ - * /, comparisons, floor) reach them. A scene is described in units of half the
short side of the image, so it can be drawn at any size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.errors import InvalidSetting

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "NOUNS",
    "PREFIXES",
    "UNSEEN_BACKGROUNDS",
    "Draws",
    "Scene",
    "caption",
    "draw_scene",
]

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

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (215, 35, 35),
    "orange": (240, 135, 25),
    "yellow": (240, 225, 50),
    "green": (45, 180, 60),
    "blue": (45, 85, 230),
    "purple": (140, 50, 190),
    "pink": (245, 140, 190),
    "white": (240, 240, 240),
}
"""The colours' names and the middle of their shades."""

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

PREFIXES: Final[tuple[str, ...]] = (
    "",
    "",
    "a photo of ",
    "a picture of ",
    "an image of ",
    "a drawing of ",
    "there is ",
    "this is ",
    "a scene with ",
)

_SAMPLES: Final = 4  # per pixel and axis
_REACH: Final = 1.15  # every shape lies in |u|, |v| <= _REACH whatever its rotation
_MIN_VISIBLE: Final = 0.65  # of every object's own area, so that no caption names a hidden one

Field = NDArray[np.floating[Any]]  # float32 wherever pixels are made
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        label: uint8 [H, W]; 0 is background, i + 1 is ``NOUNS[i]``. A pixel belongs to the topmost
            object which covers at least half of it.
        caption: a sentence naming all or some of the objects.
        nouns: the objects, bottom one first; every one is visible.
        colours: the objects' colours, in the same order.
        background: one of `BACKGROUNDS` or of `UNSEEN_BACKGROUNDS`.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]
    caption: str
    nouns: tuple[str, ...]
    colours: tuple[str, ...]
    background: str


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


# --------------------------------------------------------------------------------------------------
# Shapes: whether the point (u right, v down), in units of the half-extent, is inside.


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


_SHAPES: Final[tuple[Callable[[Field, Field], Bits], ...]] = (
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
    axis = (np.arange(17, dtype=np.float32) - 8) * np.float32(_REACH / 8)
    u, v = (np.ascontiguousarray(grid).ravel() for grid in np.meshgrid(axis, axis))
    inside = _SHAPES[noun](u, v)
    return u[inside], v[inside]


_PROBES: Final = tuple(_probes(noun) for noun in range(len(NOUNS)))


# --------------------------------------------------------------------------------------------------
# What is where


@dataclass(frozen=True)
class _Item:
    """One placed object: its centre (x, y) in [-1, 1], half-extent, rotation and mirroring."""

    noun: int
    colour: int
    rgb: tuple[float, float, float]
    x: float
    y: float
    extent: float
    cos: float
    sin: float
    mirror: float

    def covers(self, x: Field, y: Field) -> Bits:
        """Whether points of the scene (relative to the object's centre) are inside it."""
        c, s = self.cos / self.extent, self.sin / self.extent
        m = self.mirror
        return _SHAPES[self.noun](x * (c * m) + y * (s * m), y * c - x * s)

    def visible(self, above: Sequence[_Item]) -> float:
        """The fraction of the object inside the frame and not below one of `above`."""
        u, v = _PROBES[self.noun]
        u = u * self.mirror
        x = (u * self.cos - v * self.sin) * self.extent + self.x
        y = (u * self.sin + v * self.cos) * self.extent + self.y
        seen = (np.maximum(np.abs(x), np.abs(y)) < 1.0).astype(np.bool_)
        for other in above:
            dx, dy, reach = other.x - self.x, other.y - self.y, other.extent + self.extent
            if dx * dx + dy * dy < reach * reach * _REACH * _REACH:
                seen &= ~other.covers(x - other.x, y - other.y)
        return int(np.count_nonzero(seen)) / seen.size


def _stages(difficulty: float) -> tuple[float, float]:
    """How far what is in a scene has grown, until 0.75, and then how vivid it is; in [0, 1]."""
    return min(1.0, difficulty / 0.75), max(0.0, difficulty - 0.75) * 4.0


def _place(draws: Draws, content: float, vividness: float) -> list[_Item]:
    """Objects of different nouns, bottom one first, each at least `_MIN_VISIBLE` visible."""
    several = max(0.0, content - 0.3) / 0.7
    count = 1 + int(draws.unit() * (1.0 + 3.0 * several))
    nouns = draws.some(count, len(NOUNS))
    looks = _looks(draws, count, content)
    low = max(0.85 - content, 0.45 - 0.15 * content - 0.04 * vividness)
    high = max(0.90 - 0.85 * content, 0.56 - 0.08 * vividness)
    shrink = 1.0
    while True:  # ends: small enough objects always find a place
        items: list[_Item] = []
        for noun, (colour, rgb) in zip(nouns, looks, strict=True):
            extent = draws.between(low, high) * shrink
            free = max(0.0, 1.0 - 0.85 * extent) * min(1.0, 2.5 * content)
            turn = draws.between(-0.42, 0.42) * content  # tan of half the angle: to 45 degrees
            norm = 1.0 + turn * turn
            items.append(
                _Item(
                    noun,
                    colour,
                    rgb,
                    draws.between(-free, free),
                    draws.between(-free, free),
                    extent,
                    (1.0 - turn * turn) / norm,
                    2.0 * turn / norm,
                    -1.0 if draws.unit() < 0.5 * content else 1.0,
                )
            )
            if any(
                item.visible(items[depth + 1 :]) < _MIN_VISIBLE for depth, item in enumerate(items)
            ):
                break
        else:
            return items
        shrink *= 0.985


def _looks(
    draws: Draws, count: int, content: float
) -> list[tuple[int, tuple[float, float, float]]]:
    """Different colours' indices, each with one of its shades, RGB in 0 ... 255.

    A lone object is white at content 0; several objects are always told apart by colour.
    """
    chosen = draws.some(count, len(COLOURS))
    if count == 1 and draws.unit() >= 2.0 * content:
        chosen = [len(COLOURS) - 1]
    looks: list[tuple[int, tuple[float, float, float]]] = []
    for colour in chosen:
        shade = 1.0 - 0.25 * content * draws.unit()
        red, green, blue = (
            min(255.0, max(0.0, level * shade + draws.between(-18.0, 18.0) * content))
            for level in tuple(COLOURS.values())[colour]
        )
        looks.append((colour, (red, green, blue)))
    return looks


# --------------------------------------------------------------------------------------------------
# Backgrounds: mixtures in [0, 1] of two colours, float32 [H, W] (or [3, H, W])


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


def _mixture(draws: Draws, kind: str, x: Field, y: Field, span: tuple[float, float]) -> Field:
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


def _grounds(
    draws: Draws, items: Sequence[_Item], content: float, vividness: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Two RGB colours in 0 ... 255, each different enough from every object's."""
    ceiling = 25.0 + 115.0 * content + 75.0 * vividness
    apart = 170.0 - 45.0 * vividness
    mildness = 0.5 - 0.15 * vividness
    chosen: list[tuple[float, ...]] = []
    tries = 0
    while len(chosen) < 2:
        rgb = tuple(draws.between(0.0, ceiling) for _ in range(3))
        if chosen:  # of mild contrast with the first
            rgb = tuple(
                (1.0 - mildness) * a + mildness * b for a, b in zip(rgb, chosen[0], strict=True)
            )
        if min(sum(abs(a - b) for a, b in zip(rgb, i.rgb, strict=True)) for i in items) >= apart:
            chosen.append(rgb)
        ceiling = ceiling * 0.98 + 0.5  # dark ground differs from every colour
        tries += 1
        if tries > 30:  # but not always by as much
            apart *= 0.95
    return chosen[0], chosen[1]


# --------------------------------------------------------------------------------------------------
# Words


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def caption(
    draws: Draws,
    nouns: Sequence[str],
    colours: Sequence[str],
    background: str,
    *,
    difficulty: float = 1.0,
) -> str:
    """A sentence about a scene, another one at each call.

    From a difficulty of 0.75 on, 60% of the captions name the objects' colours, 20% the background,
    and 20% of those of several objects name only some.
    """
    content, _ = _stages(difficulty)
    order = draws.some(len(nouns), len(nouns))
    if draws.unit() < 0.2 * content and len(order) > 1:
        order = order[: 1 + draws.below(len(order) - 1)]
    coloured = draws.unit() < 0.6 * content * content
    phrases = [_article(f"{colours[i]} {nouns[i]}" if coloured else nouns[i]) for i in order]
    comma, last = ((", ", " and "), (" and ", " and "), (", ", " with "))[draws.below(3)]
    text = comma.join(phrases[:-1]) + (last if len(phrases) > 1 else "") + phrases[-1]
    text = PREFIXES[draws.below(len(PREFIXES))] + text
    if draws.unit() < 0.2 * content * content and background in BACKGROUNDS:
        text = f"{text} {BACKGROUNDS[background]}"
    return text + ("." if draws.unit() < 0.3 else "")


# --------------------------------------------------------------------------------------------------
# The scene


def draw_scene(
    seed: int,
    index: int,
    size: int | tuple[int, int] = 96,
    *,
    difficulty: float = 1.0,
    background: str | None = None,
) -> Scene:
    """Draw scene `index` of the world `seed`.

    Args:
        seed: the world; not negative.
        index: the scene in it; not negative.
        size: pixels of the side, or (height, width). Another size is the same scene: other pixels
            of the same objects, colours and words. A longer side moves the objects apart.
        difficulty: from 0, one large upright white object in the middle of dark ground, over 0.75,
            one to four turned, coloured, mirrored ones on patterned dark ground, to 1, where they
            are smaller and the ground is as bright and colourful as they are.
        background: one of `BACKGROUNDS` or of `UNSEEN_BACKGROUNDS`; drawn if not given.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise InvalidSetting(f"expected a size of at least one pixel; got {height} x {width}")
    if not 0.0 <= difficulty <= 1.0:
        raise InvalidSetting(f"expected a difficulty in [0, 1]; got {difficulty}")
    content, vividness = _stages(difficulty)
    draws = Draws(seed, index, 0)
    items = _place(draws, content, vividness)
    grounds = _grounds(draws, items, content, vividness)
    textured, drawn = draws.unit() < 1.4 * content, draws.below(len(BACKGROUNDS))
    kind = background or (tuple(BACKGROUNDS)[drawn] if textured else "plain")
    nouns = tuple(NOUNS[item.noun] for item in items)
    colours = tuple(tuple(COLOURS)[item.colour] for item in items)
    text = caption(draws, nouns, colours, kind, difficulty=difficulty)

    short = min(height, width)
    span = (width / short, height / short)
    x, y = (_centres(count, half) for count, half in zip((width, height), span, strict=True))
    mixture = _mixture(Draws(seed, index, 1), kind, x, y, span)
    planes = np.empty((3, height, width), np.float32)
    for channel, (first, second) in enumerate(zip(*grounds, strict=True)):
        layer = mixture if mixture.ndim == 2 else mixture[channel]
        planes[channel] = layer * (second - first) + first
        if kind in UNSEEN_BACKGROUNDS:
            planes[channel] = layer * 255.0
    label = np.zeros((height, width), np.uint8)
    for item in items:
        _paint(planes, label, item, span)

    amplitude = 2.0 + 4.0 * content
    noise = Draws(seed, index, 2).bytes(3, height, width).astype(np.float32)
    noise -= 127.5
    noise *= amplitude / 127.5
    planes += noise
    np.clip(planes, 0.0, 255.0, out=planes)
    planes += 0.5
    image = np.ascontiguousarray(planes.astype(np.uint8).transpose(1, 2, 0))
    return Scene(image, label, text, nouns, colours, kind)


def _centres(count: int, half: float) -> Field:
    """The scene coordinates of `count` equal cells' centres over [-half, half]."""
    return ((np.arange(count, dtype=np.float64) + 0.5) * (2.0 * half / count) - half).astype(
        np.float32
    )


def _paint(planes: Field, label: NDArray[np.uint8], item: _Item, span: tuple[float, float]) -> None:
    """Blend an object into the planes, float32 [3, H, W], and write it into the label, [H, W]."""
    points: list[Field] = []
    window: list[slice] = []
    reach = item.extent * _REACH
    for at, half, count in zip((item.x, item.y), span, reversed(label.shape), strict=True):
        middle, pixels = at * half, count / (2.0 * half)
        first = max(0, int((middle - reach + half) * pixels))
        last = min(count, int((middle + reach + half) * pixels) + 1)
        step = 1.0 / (pixels * _SAMPLES)
        samples = np.arange(first * _SAMPLES, last * _SAMPLES, dtype=np.float64)
        points.append(((samples + 0.5) * step - (half + middle)).astype(np.float32))
        window.append(slice(first, last))
    inside = item.covers(points[0], points[1][:, None]).view(np.uint8)
    lines = inside[0::_SAMPLES].copy()
    for offset in range(1, _SAMPLES):
        lines += inside[offset::_SAMPLES]
    hits = lines[:, 0::_SAMPLES].copy()
    for offset in range(1, _SAMPLES):
        hits += lines[:, offset::_SAMPLES]
    columns, rows = window
    coverage = hits.astype(np.float32) * np.float32(1.0 / _SAMPLES**2)
    for channel in range(3):
        part = planes[channel, rows, columns]
        part += (np.float32(item.rgb[channel]) - part) * coverage
    label[rows, columns][hits * 2 >= _SAMPLES**2] = item.noun + 1
