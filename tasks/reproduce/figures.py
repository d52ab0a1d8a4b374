"""Figures 4 to 6 (analyses) and 10 (points for SAM) of the paper: what each of them measures."""

from __future__ import annotations

from functools import partial

from tasks.reproduce.numbers import numbers
from tasks.reproduce.plan import Cell, Plan, Reading
from tasks.reproduce.sheet import Sheet
from tasks.reproduce.tables import EXPLAIN, METHODS

_BACKBONE = "vit_b16"
_PICTURES = ("--writer.overlays=8",)
_SAM = "no weights of SAM: --model.sam=facebook/sam-vit-huge, or a folder (pip install '.[sam]')"
_AFFINITY = ("affinity_last_ffn", "affinity_last_ffn_ln_post")


def _analysis(figure: str, data: str, metrics: tuple[str, ...]) -> list[Cell]:
    """What a figure draws, one number each; a few of them are in the paper's text."""
    (printed,) = (number.value for number in numbers() if number.metric == "affinity")
    return [
        Cell(
            row=metric,
            setting="",
            backbone=_BACKBONE,
            data=data,
            metric=figure,
            paper=printed if metric in _AFFINITY else None,
            reading=Reading(f"{_BACKBONE}_{data}_analysis", metric, _PICTURES),
        )
        for metric in metrics
    ]


_DEMO_SIDE = 224
"""Pixels in place of 512 on the demo world, which is read at 96 and not at 224."""

_MEASURED = ("point_accuracy", "point_accuracy_down_sample_1", "mIoU")


def _points() -> list[Cell]:
    """Figure 10: accuracy of points from the halved and from the whole map; mIoU of SAM's masks."""
    rows: list[tuple[str, str, int | None]] = [
        *((row, method, None) for row, method in METHODS.items()),
        ("Ours-512", "surgery", 512),
    ]
    return [
        Cell(
            row=row,
            setting="",
            backbone=_BACKBONE,
            data=data,
            metric=metric,
            paper=None,
            reading=Reading(
                f"{_BACKBONE}_{experiment}",
                metric,
                () if side is None else (f"--data.image_size={side}",),
                method,
                "Interactive",
                hint=_SAM,
                demo_options=None if side is None else (f"--data.image_size={_DEMO_SIDE}",),
            ),
        )
        for row, method, side in rows
        for data, experiment in EXPLAIN.items()
        for metric in _MEASURED
    ]


FIGURES = (
    Plan(
        "figure4",
        "how much attention lies on the object: mFSR",
        partial(
            _analysis,
            "figure4",
            "voc",
            ("mFSR_raw", "mFSR_consistent", "mFSR_consistent_same_token", "mFSR_blind"),
        ),
        orderings=(("mFSR_consistent", "mFSR_raw"),),
        beside=("fsr_survival",),
        sheet=Sheet("attention.", ("raw attention", "consistent attention")),
    ),
    Plan(
        "figure5",
        "how near modules are to the texts: affinity",
        partial(
            _analysis, "figure5", "voc", ("affinity_positive", "affinity_negative", *_AFFINITY)
        ),
        orderings=(
            ("affinity_positive", "affinity_negative"),
            ("affinity_positive", "affinity_last_ffn"),
        ),
        beside=("affinity", "affinity_ln_post"),
    ),
    Plan(
        "figure6",
        "how much of a map is there without any class: redundancy",
        partial(
            _analysis,
            "figure6",
            "pascal_context",
            (
                "redundancy_empty",
                "redundancy_zero",
                "redundancy_empty_architecture",
                "redundancy_zero_architecture",
            ),
        ),
        orderings=(("redundancy_zero", "redundancy_empty"),),
        beside=("redundancy",),
        sheet=Sheet(
            "redundant.",
            ("CLIP: text", "CLIP: empty", "architecture: text", "architecture: empty"),
        ),
    ),
    Plan(
        "figure10",
        "points for SAM: their accuracy, mIoU of its masks",
        _points,
        orderings=(("Ours", "CLIP"),),
        notes=(
            "mIoU is that of SAM's masks, each positive label by itself (Fig. 10b).",
            f"On the demo world, Ours-512 reads {_DEMO_SIDE} pixels where the others read 96: about as "
            "many times more as 512 to 224.",
        ),
        bars=_MEASURED,
    ),
)
