"""What Analysis measures: means over images and classes, as curves and bars (Figures 4 to 6)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules.samples import DatasetInfo
from surgery.analysis import ATTENTIONS, MODULES, RATIOS, TOKENS
from surgery.metrics import ClassMean
from tasks.measures.base import Cell, Measures, Report, Table

LIKENESS = ("cosine", "correlation")
STAGES = ("plain", "feature_surgery")
DIMS = {"selection": 3, "affinity": 3, "redundancy": 2}
"""Dimensions of one label's values in each analysis."""


class AnalysisMeasures(Measures):
    """One mean over images and classes an analysis.

    Args:
        info: the data set.
        selection: whether foreground selection is measured.
        affinity: whether affinity with the positive labels is.
        redundancy: whether likeness to the empty text's map is.
    """

    def __init__(
        self, info: DatasetInfo, selection: bool, affinity: bool, redundancy: bool
    ) -> None:
        self.info = info
        chosen = {"selection": selection, "affinity": affinity, "redundancy": redundancy}
        count = len(info.classes)
        self.means = {name: ClassMean(count, n) for name, n in DIMS.items() if chosen[name]}
        super().__init__(self.means)

    def update(self, values: Mapping[str, Tensor], positives: tuple[int, ...]) -> None:
        """Add an image: analysis -> values [P, ...] of its positive labels, [P] class indices."""
        for name, numbers in values.items():
            self.means[name].update(numbers, torch.tensor(positives))

    def report(self) -> Report:
        """The headline of each analysis, the curves over the blocks, and the bars of the classes."""
        numbers: dict[str, float] = {}
        per_class: dict[str, dict[str, float]] = {}
        tables: dict[str, Table] = {}
        if "selection" in self.means:
            values = self.means["selection"].mean()  # [blocks, attentions, ratios]
            for i, kind in enumerate(ATTENTIONS):
                numbers[f"mFSR_{kind}"] = float(values[:, i, 0].mean())
            tables["mfsr"] = _curves(values[..., :1], ATTENTIONS, ("",), "mFSR")
            tables["mfsr_readings"] = _curves(values, ATTENTIONS, RATIOS, "mFSR")
        if "affinity" in self.means:
            values = self.means["affinity"].mean()  # [blocks, modules, tokens]
            for i, module in enumerate(MODULES):
                numbers[f"affinity_{module}"] = float(values[:, i, 0].mean())
            tables["affinity"] = _curves(values, MODULES, TOKENS, "cosine with positive labels")
        if "redundancy" in self.means:
            classes = self.means["redundancy"].per_class()  # [K, stages, likeness]
            columns = [f"{kind}_{stage}" for stage in STAGES for kind in LIKENESS]
            per_class = {
                name: dict(zip(columns, values, strict=True))
                for name, values in zip(self.info.classes, classes.flatten(1).tolist(), strict=True)
            }
            for i, stage in enumerate(STAGES):
                numbers[f"redundancy_{stage}"] = float(self.means["redundancy"].mean()[i, 0])
            tables["redundancy"] = Table(
                ("class", *columns),
                [(name, *row.values()) for name, row in per_class.items()],
                plot="bars",
                label="likeness to the empty text's map",
            )
        return Report(numbers, per_class, tables=tables)


def _curves(values: Tensor, groups: tuple[str, ...], kinds: tuple[str, ...], label: str) -> Table:
    """values [blocks, groups, kinds] as one row a block, counted from 1."""
    columns = [f"{group}_{kind}".rstrip("_") for group in groups for kind in kinds]
    rows: list[tuple[Cell, ...]] = [
        (number, *row) for number, row in enumerate(values.flatten(1).tolist(), start=1)
    ]
    return Table(("block", *columns), rows, plot="lines", label=label)
