"""What Analysis measures: mFSR and its survival curve, affinity, redundancy (Figures 4 to 6)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules._samples import DatasetInfo
from surgery.analysis import MODULES
from surgery.metrics import ClassMean, ImageMean, Survival
from tasks.measures._measures import Cell, Measures, Report, Table, by_class

SELECTIONS = ("raw", "consistent", "consistent_same_token", "blind")
"""Whose foreground selection: raw attention, asked by the token of plain CLIP's map; consistent
attention, by that of the reformed map, and by plain CLIP's; attention that sees nothing."""

PROJECTIONS = ("", "_ln_post")
"""How a module's output is projected: as the paper says, or with CLIP's last norm before."""

STAGES = ("plain", "architecture")
"""Whose maps are compared with the empty text's: plain CLIP's, and those of the reformed attention."""

DISTANCES = ("L1_empty", "L1_zero", "cosine", "correlation")


class AnalysisMeasures(Measures):
    """Means over the samples, classes or images that each analysis is defined on.

    Args:
        info: the data set.
        selection: whether foreground selection is measured.
        affinity: whether the modules' affinity with texts is.
        redundancy: whether maps are compared with the empty text's.
    """

    def __init__(
        self, info: DatasetInfo, selection: bool, affinity: bool, redundancy: bool
    ) -> None:
        self.info = info
        count = len(info.classes)
        self.selection = ClassMean(count, dims=1) if selection else None
        self.survival = Survival(len(SELECTIONS) - 1)
        self.modules = ImageMean(dims=2) if affinity else None
        self.final = ImageMean(dims=1)
        self.redundancy = ClassMean(count, dims=2) if redundancy else None
        metrics: dict[str, Metric] = {}
        if self.selection:
            metrics |= {"selection": self.selection, "survival": self.survival}
        if self.modules:
            metrics |= {"modules": self.modules, "final": self.final}
        if self.redundancy:
            metrics |= {"redundancy": self.redundancy}
        super().__init__(metrics)

    def update(self, values: Mapping[str, Tensor], positives: tuple[int, ...]) -> None:
        """Add an image.

        Args:
            values: those that are measured: ``selection`` [P, 4] in the order of ``SELECTIONS``;
                ``modules`` [2, 2 * blocks], the modules' affinity with the positive labels by both
                ``PROJECTIONS``, and ``final`` [2], that of the final class token with positive and
                with negative labels; ``redundancy`` [P, 2, 4] by ``STAGES`` and ``DISTANCES``.
            positives: [P] class indices.
        """
        classes = torch.tensor(positives)
        if self.selection:
            self.selection.update(values["selection"], classes)
            self.survival.update(values["selection"][:, :-1])
        if self.modules:
            self.modules.update(values["modules"])
            self.final.update(values["final"])
        if self.redundancy:
            self.redundancy.update(values["redundancy"], classes)

    def report(self) -> Report:
        """The headlines and figures of each analysis, and what they are for each class.

        Without any sample, means are single NaNs: these are expanded to all that there would be.
        """
        numbers: dict[str, float] = {}
        columns: dict[str, Tensor] = {}
        tables: dict[str, Table] = {}
        if self.selection:
            means = self.selection.mean().expand(len(SELECTIONS)).tolist()
            for name, value in zip(SELECTIONS, means, strict=True):
                numbers[f"mFSR_{name}"] = value
            selections = self.selection.per_class().expand(-1, len(SELECTIONS))
            columns |= _columns("FSR_{}", selections, SELECTIONS)
            tables["fsr_survival"] = self._survival()
        if self.modules:
            positive, negative = self.final.mean().expand(2).tolist()
            numbers |= {"affinity_positive": positive, "affinity_negative": negative}
            for kind, values in zip(
                PROJECTIONS, self.modules.mean().expand(len(PROJECTIONS), -1), strict=True
            ):
                numbers[f"affinity_last_ffn{kind}"] = float(values[-1])
                tables[f"affinity{kind}"] = _affinity(values.tolist(), positive, negative)
        if self.redundancy:
            sizes = (len(STAGES), len(DISTANCES))
            mean = self.redundancy.over_samples().expand(sizes)
            classes = self.redundancy.per_class().expand(-1, *sizes)
            for i, stage in enumerate(STAGES):
                end = "" if stage == "plain" else f"_{stage}"
                numbers[f"redundancy_empty{end}"] = float(mean[i, 0])
                numbers[f"redundancy_zero{end}"] = float(mean[i, 1])
                columns |= _columns(f"{{}}_{stage}", classes[:, i], DISTANCES)
            tables["redundancy"] = Table(
                ("maps of", "to the empty text's map", "to nothing"),
                [(stage, *mean[i, :2].tolist()) for i, stage in enumerate(STAGES)],
                plot="bars",
                label="L1 distance (mean over pixels)",
            )
        return Report(numbers, by_class(self.info.classes, columns), tables=tables)

    def _survival(self) -> Table:
        """Fig. 4b: for each threshold, the share of samples whose FSR is above it."""
        curves = torch.cat([self.survival.thresholds()[None], self.survival.curves().cpu()])
        rows: list[tuple[Cell, ...]] = [
            tuple(round(value, 6) for value in row) for row in curves.T.tolist()
        ]
        return Table(
            ("threshold", *SELECTIONS[:-1]), rows, plot="lines", label="share of samples above"
        )


def _columns(name: str, values: Tensor, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """values [K, kinds] as one column a kind."""
    return {name.format(kind): values[:, i] for i, kind in enumerate(kinds)}


def _affinity(values: list[float], positive: float, negative: float) -> Table:
    """Fig. 5: one point a module over depth, and the final class token's two lines."""
    kinds = len(MODULES)
    rows: list[tuple[Cell, ...]] = [
        (i + 1, *(value if i % kinds == kind else float("nan") for kind in range(kinds)))
        for i, value in enumerate(values)
    ]
    return Table(
        ("module", *MODULES),
        rows,
        plot="points",
        label="cosine with positive labels",
        levels={"positive": positive, "negative": negative},
    )
