"""The numbers that the paper prints, and how we read each: which run of ours stands beside it.

``paper.csv`` has every number of Tables 1 to 6 and three from the text (without a table), as fractions;
an empty value is a printed dash. Data sets and backbones have the names of `configs`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Number:
    """A number as printed.

    Attributes:
        table: "1" to "6"; "" for the text.
        row: which row, or method, of the table.
        backbone: as in `configs/backbones`; "" for the mean over all five.
        data: data set, as ``lightning shards`` knows it.
        metric: mIoU, mSC, mAP or affinity.
        value: fraction; None where the paper prints a dash.
        note: what else is known of it.
    """

    table: str
    row: str
    backbone: str
    data: str
    metric: str
    value: float | None
    note: str


@dataclass(frozen=True)
class Reading:
    """A run of ours that gives a printed number, as we read the paper.

    Attributes:
        config: packaged config, ``BACKBONE_EXPERIMENT``.
        options: words of the command line that follow it.
        metric: key in the run's ``metrics.json``.
    """

    config: str
    options: tuple[str, ...]
    metric: str


EXPLAIN = {
    "imagenet_s": "imagenet_s",
    "voc": "voc_explainability",
    "pascal_context": "pascal_context_explainability",
    "coco": "coco",
}
"""Data set -> experiment of Tables 1 to 4."""

SEGMENT = {
    "pascal_context": "pascal_context_segmentation",
    "coco_stuff": "coco_stuff",
    "cityscapes": "cityscapes",
}
"""Data set -> experiment of Table 5."""

METHODS = {
    "CLIP": "clip",
    "Ours": "surgery",
    "RCLIP": "rclip",
    "Grad-CAM": "grad_cam",
    "pLRP": "plrp",
    "Bi-Modal": "bi_modal",
    "gScoreCAM": "gscorecam",
}
"""Rows of Tables 1 and 2 -> method of `surgery.METHODS`. ECLIP is fine-tuned: not ours to run."""

ABLATIONS = {
    "Last": "surgery_last",
    "Multi": "surgery_single_path_ffn",
    "Multi + Dual": "surgery_ffn",
    "Multi + Dual + FFN": "surgery_ffn_only",
    "Multi + Dual + Attn": "surgery",
}
"""Rows of Table 4 -> recipe of `surgery.RECIPES`."""

_PLAIN = "--model.feature_surgery=none"


@cache
def numbers() -> tuple[Number, ...]:
    """All printed numbers, in the order of the tables."""
    text = files("tasks").joinpath("paper.csv").read_text(encoding="utf-8")
    found = []
    for row in csv.DictReader(text.splitlines()):
        value = row.pop("value")
        found.append(Number(**row, value=float(value) if value else None))
    return tuple(found)


def readings(number: Number) -> tuple[Reading, ...]:
    """The runs that stand beside a printed number; none where it is not ours to run.

    Several where the paper doesn't say which of them it means: Table 4 without and with feature
    surgery, its number of CLIP in Table 6 by CLIP's softmax and by the plain cosine.
    """
    if number.value is None or not number.backbone:
        return ()
    recipes = {"1": _explain, "2": _explain, "3": _ablate, "4": _reform, "5": _segment}
    find = recipes.get(number.table, _recognise if number.table == "6" else _text)
    return tuple(find(number))


def _run(number: Number, experiment: str, metric: str, *options: str) -> Reading:
    return Reading(f"{number.backbone}_{experiment}", options, metric)


def _explain(number: Number) -> list[Reading]:
    if number.row not in METHODS:
        return []
    methods = f"--model.methods=[{METHODS[number.row]}]"
    found = [_run(number, EXPLAIN[number.data], number.metric, methods)]
    if number.backbone == "vit_l14" and number.row == "Ours":  # d = 7 read literally
        literal = (methods, "--model.backbone.blocks=from 7")
        found.append(_run(number, EXPLAIN[number.data], number.metric, *literal))
    return found


def _ablate(number: Number) -> list[Reading]:
    plain = {"CLIP": ("--model.backbone.attention=raw", _PLAIN), "Architecture": (_PLAIN,)}
    if number.metric == "mAP":  # on the original path, whatever the architecture
        metric = "mAP" if number.row not in plain else "mAP_softmax"
        return [_run(number, "pascal_context_recognition", metric)]
    options = plain.get(number.row, ())
    return [_run(number, EXPLAIN[number.data], number.metric, *options)]


def _reform(number: Number) -> list[Reading]:
    experiment = EXPLAIN[number.data]
    if number.row == "CLIP":
        return [_run(number, experiment, number.metric, "--model.backbone.attention=raw", _PLAIN)]
    recipe = f"--model.backbone.attention={ABLATIONS[number.row]}"
    found = [_run(number, experiment, number.metric, recipe)]
    if number.row != "Multi + Dual + Attn":  # the method, known to be with feature surgery
        found.append(_run(number, experiment, number.metric, recipe, _PLAIN))
    return found


def _segment(number: Number) -> list[Reading]:
    recipes: Mapping[str, str] = {"MaskCLIP": "maskclip_authors", "Ours": "surgery"}
    if number.row not in recipes:
        return []
    recipe = f"--model.backbone.attention={recipes[number.row]}"
    return [_run(number, SEGMENT[number.data], number.metric, recipe)]


def _recognise(number: Number) -> list[Reading]:
    learned = (
        "--model.backbone.attention=tai_dpt",
        "--model.text_features=global.safetensors",
        "--model.local_text_features=local.safetensors",
    )
    found: dict[str, list[tuple[str, tuple[str, ...]]]] = {
        "CLIP": [("mAP_softmax", ()), ("mAP_cosine", ())],
        "Ours": [("mAP", ()), ("mAP_paper", ())],
        "TaI-DPT": [("mAP_cosine", learned)],
        "TaI-DPT + Ours": [("mAP", learned), ("mAP_paper", learned)],
    }
    return [
        _run(number, "nus_wide", metric, *options) for metric, options in found.get(number.row, [])
    ]


def _text(number: Number) -> list[Reading]:
    if number.metric != "affinity":  # what d and tau change needs many runs
        return []
    names = ("affinity_last_ffn", "affinity_last_ffn_ln_post")
    return [_run(number, "voc_analysis", metric) for metric in names]
