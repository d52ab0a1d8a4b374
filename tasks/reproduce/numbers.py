"""Numbers that papers print, kept in csv files of this package, one number a line.

``paper.csv`` has every number of the paper's Tables 1 to 6 and three from its text (without a table),
``family.csv`` those that methods of training-free segmentation print of themselves.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Number:
    """A number as printed.

    Attributes:
        table: in which it stands, such as "1" to "6"; "" for the text.
        row: which row, or method, of the table.
        backbone: as in `configs/backbones`; "" for the mean over all.
        data: data set, as ``lightning shards`` knows it, or an evaluation of it.
        metric: mIoU, mSC, mAP or affinity.
        value: fraction; None where a dash is printed.
        note: what else is known of it.
        setting: which protocol or variant of the row; "" where there is one.
        source: who printed it; "" for the paper.
    """

    table: str
    row: str
    backbone: str
    data: str
    metric: str
    value: float | None
    note: str
    setting: str = ""
    source: str = ""


@cache
def numbers(file: str = "paper.csv") -> tuple[Number, ...]:
    """All numbers of a file of this package, in its order; an empty value is a printed dash."""
    text = files("tasks.reproduce").joinpath(file).read_text(encoding="utf-8")
    found = []
    for row in csv.DictReader(text.splitlines()):
        value = row.pop("value")
        found.append(Number(**row, value=float(value) if value else None))
    return tuple(found)
