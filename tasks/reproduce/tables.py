"""Tables 1 to 6 of the paper, and how we read each row: which run of ours stands beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from tasks.reproduce.numbers import Number, numbers
from tasks.reproduce.plan import Cell, Plan, Reading

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

STAGES = {
    "CLIP": "clip",
    "Architecture": "architecture",
    "Architecture + feature surgery": "surgery",
}
"""Rows of Table 3 -> method."""

ABLATIONS = {
    "Last": "surgery_last",
    "Multi": "surgery_single_path_ffn",
    "Multi + Dual": "surgery_ffn",
    "Multi + Dual + FFN": "surgery_ffn_only",
    "Multi + Dual + Attn": "surgery",
}
"""Rows of Table 4 -> recipe of `surgery.RECIPES`."""

_FORM = (
    "Feature surgery and the order of min-max and enlarging as in the released code, unless a setting "
    "says otherwise (docs/fidelity.md)."
)


def readings(number: Number) -> tuple[Reading, ...]:
    """The runs that stand beside a number of a table; none where it is not ours to run.

    Several where the paper doesn't say which of them it means: Table 4 without and with feature
    surgery, its number of CLIP in Table 6 by CLIP's softmax and by the plain cosine.
    """
    if number.value is None or not number.backbone:
        return ()
    return tuple(_READINGS[number.table](number))


def of_number(number: Number, found: Sequence[Reading]) -> list[Cell]:
    """The cells of a printed number: one for each of its readings."""
    where = (number.backbone, number.data, number.metric, number.value)
    if not found:
        derived = not number.backbone
        return [Cell(number.row, number.setting, *where, source=number.source, derived=derived)]
    return [
        Cell(number.row, reading.setting or number.setting, *where, reading, number.source)
        for reading in found
    ]


def _cells(table: str) -> list[Cell]:
    printed = [number for number in numbers() if number.table == table]
    return [cell for number in printed for cell in of_number(number, readings(number))]


def _config(number: Number, experiment: str) -> str:
    return f"{number.backbone}_{experiment}"


def _explain(number: Number) -> list[Reading]:
    if number.row not in METHODS:
        return []
    config, method = _config(number, EXPLAIN[number.data]), METHODS[number.row]
    found = [Reading(config, number.metric, method=method)]
    if number.backbone == "vit_l14" and number.row == "Ours":  # d = 7 read literally
        literal = ("--model.backbone.blocks=from 7",)
        found.append(
            Reading(config, number.metric, literal, method=method, setting="blocks=from 7")
        )
    return found


def _ablate(number: Number) -> list[Reading]:
    """Table 3, with what the paper's form and order give beside: never two of them in one setting."""
    method = STAGES[number.row]
    forms = {"": "", "form=paper": "_paper"} if method == "surgery" else {"": ""}
    if number.metric == "mAP":  # on the original path, whatever the architecture
        config = _config(number, "pascal_context_recognition")
        if method != "surgery":
            return [Reading(config, "mAP_softmax")]
        return [Reading(config, f"mAP{end}", setting=setting) for setting, end in forms.items()]
    config = _config(number, EXPLAIN[number.data])
    return [
        Reading(
            config,
            f"{number.metric}{order}",
            method=f"{method}{form}",
            setting=" ".join(filter(None, (setting, "order=paper" if order else ""))),
        )
        for setting, form in forms.items()
        for order in ("", "_order_paper")
    ]


def _reform(number: Number) -> list[Reading]:
    config = _config(number, EXPLAIN[number.data])
    if number.row == "CLIP":
        return [Reading(config, number.metric, method="clip")]
    recipe = (f"--model.backbone.attention={ABLATIONS[number.row]}",)
    found = [Reading(config, number.metric, recipe, method="surgery")]
    if number.row != "Multi + Dual + Attn":  # the method, known to be with feature surgery
        plain = Reading(
            config, number.metric, recipe, method="architecture", setting="no feature surgery"
        )
        found.append(plain)
    return found


def _segment(number: Number) -> list[Reading]:
    recipes: Mapping[str, str] = {"MaskCLIP": "maskclip_authors", "Ours": "surgery"}
    if number.row not in recipes:
        return []
    recipe = f"--model.backbone.attention={recipes[number.row]}"
    return [Reading(_config(number, SEGMENT[number.data]), number.metric, (recipe,))]


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
    of = found.get(number.row, [])
    return [
        Reading(_config(number, "nus_wide"), metric, options, setting=metric if len(of) > 1 else "")
        for metric, options in of
    ]


_READINGS: dict[str, Callable[[Number], list[Reading]]] = {
    "1": _explain,
    "2": _explain,
    "3": _ablate,
    "4": _reform,
    "5": _segment,
    "6": _recognise,
}


def _means(cells: Sequence[Cell], ours: Mapping[Cell, float]) -> dict[Cell, float]:
    """Table 1's last row, ours minus CLIP over all backbones, once all are there."""
    derived = {}
    for mean in cells:
        if not mean.derived:
            continue
        of = {
            (cell.backbone, cell.row): ours.get(cell)
            for cell in cells
            if (cell.data, cell.metric, cell.setting) == (mean.data, mean.metric, "")
            and not cell.derived
        }
        pairs = [(of[b, "Ours"], of.get((b, "CLIP"))) for b, row in of if row == "Ours"]
        found = [a - b for a, b in pairs if a is not None and b is not None]
        if found and len(found) == len(pairs):
            derived[mean] = statistics.mean(found)
    return derived


def _table(number: str, title: str, **more: object) -> Plan:
    return Plan(f"table{number}", title, lambda: _cells(number), **more)  # type: ignore[arg-type]  # fields of Plan


TABLES = (
    _table("1", "CLIP and ours on five backbones: mIoU, mSC", derive=_means, notes=(_FORM,)),
    _table("2", "explanation methods: mIoU, mSC", notes=(_FORM,)),
    _table("3", "architecture and feature surgery: mSC, mIoU, mAP", notes=(_FORM,)),
    _table("4", "paths and modules: mSC", notes=(_FORM,)),
    _table("5", "open-vocabulary segmentation: mIoU"),
    _table("6", "multi-label recognition: mAP", notes=(_FORM,)),
)
