"""Training-free segmentation: every method under its own protocol, and all under one, on eight data sets.

The printed numbers are in ``family.csv``, each with who printed it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.reproduce.numbers import numbers
from tasks.reproduce.plan import Cell, Plan, Reading

SETS = {
    "voc21": "voc21",
    "context60": "context60",
    "coco_object": "coco_object",
    "voc20": "voc20",
    "cityscapes": "cityscapes",
    "context59": "pascal_context_segmentation",
    "ade20k": "ade20k",
    "coco_stuff": "coco_stuff",
}
"""What the field calls a data set -> experiment, in the order of its tables."""

COMMON = "sclip"
"""The protocol under which all stand: the one that most others are made from."""

OWN = "own protocol"
BACKBONES = ("vit_b16", "vit_l14")
_METRIC = "mIoU"
_MEAN = "mean"


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        recipe: of `surgery.RECIPES`; "" for what is not ours to run.
        protocol: its own; "" where it has none that can be had.
        large: its own with ViT-L/14, where that is another.
        options: further words of the command line.
        own: further ones under its own protocol.
    """

    recipe: str = ""
    protocol: str = ""
    large: str = ""
    options: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


METHODS = {
    "CLIP": Method("raw"),
    "MaskCLIP": Method("maskclip"),
    "CLIP Surgery": Method("surgery", "paper"),
    "GEM": Method("gem"),
    "SCLIP": Method("sclip", "sclip"),
    "ClearCLIP": Method("clearclip", "clearclip"),
    "NACLIP": Method("naclip", "naclip", options=("--model.refine=null",)),
    "NACLIP + PAMR": Method("naclip", "naclip", options=("--model.refine=pamr",)),
    "CLIPtrase": Method("cliptrase"),
    "ResCLIP": Method("resclip", "resclip"),
    "SC-CLIP": Method("sc_clip", "sc_clip", "sc_clip_l14"),
    "SFP": Method("sfp", "sfp"),
    "RF-CLIP": Method("rf_clip", "rf_clip", options=("--model.score=adapted",)),
    "RF-CLIP + PAMR": Method(
        "rf_clip", "rf_clip", options=("--model.score=adapted", "--model.refine=pamr")
    ),
    "PEARL": Method("pearl", "pearl"),
    "CLIPer, no diffusion": Method("cliper", "cliper", "cliper_l14", own=("--model.score=fused",)),
}
"""Rows that are ours to run; others stand there as printed."""


def _cells() -> list[Cell]:
    """All rows: each method under its own protocol and the common one, then those that aren't ours."""
    printed = {
        (number.row, number.backbone, number.setting, number.data): number
        for number in numbers("family.csv")
    }
    found = []
    for row, method in METHODS.items():
        for backbone in BACKBONES:
            own = method.large if method.large and backbone == "vit_l14" else method.protocol
            for setting, protocol in ((OWN, own), (f"protocol {COMMON}", COMMON)):
                for data in (*SETS, _MEAN):
                    number = printed.pop((row, backbone, setting, data), None)
                    value, source = (number.value, number.source) if number else (None, "")
                    if not protocol and value is None:
                        continue
                    reading = None
                    if protocol and data in SETS:
                        options = (
                            f"--model.backbone.attention={method.recipe}",
                            f"--model.protocol={protocol}",
                            *method.options,
                            *(method.own if setting == OWN else ()),
                        )
                        reading = Reading(f"{backbone}_{SETS[data]}", _METRIC, options)
                    where = (backbone, data, _METRIC, value)
                    derived = bool(protocol) and data == _MEAN
                    found.append(Cell(row, setting, *where, reading, source, derived))
    for number in printed.values():
        where = (number.backbone, number.data, _METRIC, number.value)
        found.append(Cell(number.row, number.setting, *where, source=number.source))
    return found


def _means(cells: Sequence[Cell], ours: Mapping[Cell, float]) -> dict[Cell, float]:
    """The mean over the eight data sets, of rows that have all of them."""
    derived = {}
    for mean in cells:
        if not mean.derived:
            continue
        of = [
            ours.get(cell)
            for cell in cells
            if (cell.row, cell.setting, cell.backbone) == (mean.row, mean.setting, mean.backbone)
            and cell.data in SETS
        ]
        known = [value for value in of if value is not None]
        if len(known) == len(SETS):
            derived[mean] = statistics.mean(known)
    return derived


FAMILY = Plan(
    "family",
    "training-free segmentation, each under its own protocol and under one: mIoU",
    _cells,
    orderings=(),
    derive=_means,
    notes=(
        "Printed numbers are of each method's own evaluation; who printed them stands in family.csv "
        "(source), most of them second-hand and not checked.",
        f"The common protocol is {COMMON}'s. Words alone are worth 12 to 22 points of VOC21.",
        "ResCLIP has its settings of VOC20 everywhere. RF-CLIP has one setting of its score. "
        "CLIPer has its fused score under its own protocol only, with windows where its files have them.",
    ),
    costs=True,
)
