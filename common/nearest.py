"""What somebody may have meant who mistyped a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The names among those known that are most like one, case aside; none if none is like it.

    Args:
        name: as it was typed.
        known: names that there are.
        count: most that are wanted.
        cutoff: how like they have to be, from 0 to 1.

    Example:
        >>> nearest("voc", ["VOC", "COCO"])
        ['VOC']
    """
    spelled = {other.lower(): other for other in known}
    return [
        spelled[near] for near in difflib.get_close_matches(name.lower(), spelled, count, cutoff)
    ]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name, as the end of a sentence; empty if none is near.

    Example:
        >>> did_you_mean("surgry", ["surgery", "clip"])
        "; did you mean 'surgery'?"
    """
    return "".join(f"; did you mean {near!r}?" for near in nearest(name, known))
