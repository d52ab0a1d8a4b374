"""Drawing the demo world: small scenes of shapes, with captions, labels and exact masks.

Pretrained weights and benchmarks cannot be shipped; this world can. A scene shows one to four
different objects on one of six backgrounds, and is a function of (seed, index): the same numbers
give the same pixels on every platform, because only raw PCG64 words and operations which IEEE 754
rounds exactly (+ - * /, comparisons, floor) reach them. A scene is described in units of half the
short side of the image, so it can be drawn at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import InvalidSetting
from datamodules._drawn_backgrounds import BACKGROUNDS, UNSEEN_BACKGROUNDS, Draws, mixture
from datamodules._drawn_shapes import NOUNS, PROBES, REACH, SHAPES, Bits, Field

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
_MIN_VISIBLE: Final = 0.65  # of every object's own area, so that no caption names a hidden one


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
        return SHAPES[self.noun](x * (c * m) + y * (s * m), y * c - x * s)

    def visible(self, above: Sequence[_Item]) -> float:
        """The fraction of the object inside the frame and not below one of `above`."""
        u, v = PROBES[self.noun]
        u = u * self.mirror
        x = (u * self.cos - v * self.sin) * self.extent + self.x
        y = (u * self.sin + v * self.cos) * self.extent + self.y
        seen = (np.maximum(np.abs(x), np.abs(y)) < 1.0).astype(np.bool_)
        for other in above:
            dx, dy, reach = other.x - self.x, other.y - self.y, other.extent + self.extent
            if dx * dx + dy * dy < reach * reach * REACH * REACH:
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
    mixed = mixture(Draws(seed, index, 1), kind, x, y, span)
    planes = np.empty((3, height, width), np.float32)
    for channel, (first, second) in enumerate(zip(*grounds, strict=True)):
        layer = mixed if mixed.ndim == 2 else mixed[channel]
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
    reach = item.extent * REACH
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
