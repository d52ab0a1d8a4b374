"""What the paper's text says of d (Eq. 6) and tau (Eq. 9): how little mSC depends on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tasks.reproduce.numbers import numbers
from tasks.reproduce.plan import Cell, Plan, Reading

_RANGE = range(1, 11)
_OPTIONS = {"d": "--model.backbone.blocks=from {}", "tau": "--model.tau={}"}
_DEFAULT = {"d": 7, "tau": 2}  # of 12 blocks, "from 7" are the last six
_VARIATION = "Variation over {} in 1..10"


def _cells() -> list[Cell]:
    printed = {number.row: number for number in numbers() if not number.table}
    found = []
    for name, option in _OPTIONS.items():
        of = printed[_VARIATION.format(name)]
        where = (of.backbone, of.data, of.metric)
        config = f"{of.backbone}_{of.data}"
        for value in _RANGE:
            options = () if value == _DEFAULT[name] else (option.format(value),)
            reading = Reading(config, of.metric, options, method="surgery")
            found.append(Cell(name, str(value), *where, None, reading))
        found.append(Cell(of.row, "", *where, of.value, derived=True))
    return found


def _variations(cells: Sequence[Cell], ours: Mapping[Cell, float]) -> dict[Cell, float]:
    """The largest number of each minus the smallest, once all ten are there."""
    derived = {}
    for name in _OPTIONS:
        found = [ours[cell] for cell in cells if cell.row == name and cell in ours]
        for cell in cells:
            if cell.row == _VARIATION.format(name) and len(found) == len(_RANGE):
                derived[cell] = max(found) - min(found)
    return derived


SENSITIVITY = Plan("sensitivity", "how much mSC varies with d and tau", _cells, derive=_variations)
