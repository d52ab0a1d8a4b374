"""What a run's metrics mean, in words for people: their unit, and which way is better.

Exact definitions are in the docstrings of tasks and of `surgery.metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Meaning:
    """What a metric says.

    Attributes:
        text: in a sentence's part.
        percent: it is a share, shown in percent; else a plain number.
        high_is_good: whether a higher value is a better one; neither, for what is only looked at.
    """

    text: str
    percent: bool = True
    high_is_good: bool = False

    def show(self, value: float | None) -> str:
        """A value as text; ``--`` where nothing could be measured."""
        if value is None:
            return "--"
        return f"{100 * value:.2f} %" if self.percent else f"{value:.4f}  "


def _good(text: str) -> Meaning:
    return Meaning(text, high_is_good=True)


def _number(text: str) -> Meaning:
    return Meaning(text, percent=False)


MEANINGS: dict[str, dict[str, Meaning]] = {
    "Explainability": {
        "mIoU": _good(
            "overlap of mask and truth, mean over classes, all masks cut at the one threshold that is "
            "best for the whole data set"
        ),
        "mSC": _good("map on the object minus map beside it, mean over classes"),
        "mIoU_order_(paper|code)": _good(
            "mIoU of the maps in the other order of scaling to [0, 1] and enlarging: the paper enlarges "
            "first, the released code scales first"
        ),
        "mSC_order_(paper|code)": _good("mSC of those maps"),
    },
    "Segmentation": {
        "mIoU": _good("overlap of label map and truth over all pixels, mean over classes"),
        "pixel_accuracy": _good("pixels with the right label"),
    },
    "Recognition": {
        "mAP": _good(
            "average precision, mean over classes; scored by feature surgery, in the form chosen"
        ),
        "mAP_(paper|code)": _good("the same, by the other form of feature surgery"),
        "mAP_softmax": _good("the same for plain CLIP: softmax over the classes"),
        "mAP_cosine": _good("the same for plain CLIP: cosines as they are"),
    },
    "Interactive": {
        "point_accuracy": _good("points that are where they should be, of all points"),
        "point_accuracy_over_classes": _good("the same for each class, mean over classes"),
        r"point_accuracy_down_sample_\d": _good(
            "the same for points from a map that many times smaller than the token grid"
        ),
        r"point_accuracy_down_sample_\d_over_classes": _good("and its mean over classes"),
        "mIoU": _good("overlap of SAM's masks with the truth, mean over classes"),
    },
    "Multimodal": {
        "end_first": Meaning(
            "captions of whose tokens the end of the text fits the image best; it stands for the whole "
            "text, so much of it says that the other words are hardly looked at"
        ),
        "end_second": Meaning("captions in which it fits second best"),
        "end_third": Meaning("captions in which it fits third best"),
    },
    "Opinions": {
        "best_cosine": _number("cosine of the best text found with its image, mean over images"),
    },
    "Analysis": {
        "mFSR_raw": _good("plain CLIP's attention that lies on the object, mean over classes"),
        "mFSR_consistent": _good("the same for consistent attention (of values with values)"),
        "mFSR_consistent_same_token": _good(
            "the same, asked by the token that plain CLIP's map chooses"
        ),
        "mFSR_blind": Meaning("the same for attention that sees nothing: the objects' area"),
        "affinity_positive": _number("cosine of the final class token with texts of what is there"),
        "affinity_negative": _number("cosine of the final class token with texts of what is not"),
        "affinity_last_ffn": _number(
            "cosine of the last feed-forward part's class token with texts of what is there"
        ),
        "affinity_last_ffn_ln_post": _number("the same after CLIP's last norm"),
        "redundancy_empty": _number(
            "distance (L1, 0 to 1) of labels' maps to the empty text's map, plain CLIP: small means "
            "that a map is mostly what all texts share"
        ),
        "redundancy_zero": _number("distance of labels' maps to nothing, to compare with"),
        "redundancy_(empty|zero)_architecture": _number("the same for the reformed attention"),
        "(L1_empty|L1_zero|cosine|correlation)_(plain|architecture)": _number(
            "of classes: their maps beside the empty text's map, or nothing"
        ),
    },
}
"""Task -> pattern of the name of a metric, or of a column of classes -> what it means."""

_PLAIN: dict[str, dict[str, tuple[str, ...]]] = {
    "Recognition": {"mAP": ("mAP_softmax", "mAP_cosine")},
    "Analysis": {"mFSR_consistent": ("mFSR_raw",)},
}
"""Task -> what the method gives -> what plain CLIP gives, where both are metrics of one run."""

_SURGERY = ("surgery", "surgery_paper", "architecture")


def meaning_of(task: str, metric: str) -> Meaning | None:
    """What a metric of a task means; None of one that isn't among ours."""
    for pattern, meaning in MEANINGS.get(task, {}).items():
        if re.fullmatch(pattern, metric):
            return meaning
    return None


def remarks(task: str, summary: Mapping[str, Any]) -> list[str]:
    """Where CLIP Surgery is below plain CLIP, in the metrics of one run.

    Args:
        task: class name.
        summary: what ``metrics.json`` holds.
    """
    metrics = summary["metrics"]
    pairs = [
        (ours, metrics.get(ours), plain, metrics.get(plain))
        for ours, others in _PLAIN.get(task, {}).items()
        for plain in others
    ]
    methods: Mapping[str, Mapping[str, Any]] = summary.get("methods", {})
    clip = methods.get("clip", {})
    for method in _SURGERY:
        for name, value in methods.get(method, {}).items():
            if (meaning := meaning_of(task, name)) and meaning.high_is_good:
                pairs.append((f"{name} of {method}", value, "plain CLIP's", clip.get(name)))
    return [
        f"{ours} ({100 * value:.2f} %) is below {other} ({100 * reference:.2f} %): here plain CLIP "
        "is the better one"
        for ours, value, other, reference in pairs
        if value is not None and reference is not None and value < reference
    ]
