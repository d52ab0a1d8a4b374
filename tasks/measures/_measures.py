"""A task's measures and the report that they give."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules._samples import VOID, DatasetInfo
from surgery.enlarging import inside, largest

if TYPE_CHECKING:
    from typing_extensions import Self

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    """A table of a run's numbers, written as ``NAME.csv``.

    Attributes:
        columns: their names.
        rows: one value a column; NaN is left empty.
        plot: how ``NAME.png`` shows all columns over the first one: ``lines``, ``points``, ``bars`` or
            not.
        label: what the values are, with their unit, on the plot's axis.
        levels: name -> value of horizontal lines in the plot, the first blue, the second red.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]
    plot: Literal["lines", "points", "bars"] | None = None
    label: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The numbers of a run.

    Attributes:
        metrics: name -> value over the whole run; fractions.
        per_class: class name -> column -> value.
        methods: explanation method -> the same metrics of its maps, where there are methods; those of
            the first are ``metrics``.
        details: what else is worth knowing, such as the best threshold.
        tables: file name without ending -> what is written as csv beside, some with a plot.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    methods: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)


class Measures:
    """What a task measures: metrics that are updated image by image, and their report.

    A subclass makes its metrics in the constructor, whose arguments are the data set and those of the
    task's settings, by name, that change what is measured; it adds ``report`` and the updates that its
    task calls. The base measures nothing.

    Args:
        metrics: name, as their states are stored under -> metric.
    """

    def __init__(self, metrics: Mapping[str, Metric] | None = None) -> None:
        self.metrics = dict(metrics or {})

    @classmethod
    def of(cls, info: DatasetInfo, settings: Mapping[str, Any]) -> Self:
        """Empty measures on a data set, with those of a task's settings that they depend on.

        Raises:
            KeyError: a setting is missing.
        """
        _, *names = inspect.signature(cls).parameters
        return cls(info, **{name: settings[name] for name in names})  # type: ignore[arg-type]  # a subclass

    def report(self) -> Report:
        """The numbers of all images so far."""
        return Report({})

    def to(self, device: torch.device) -> None:
        """Keep the metrics on a device."""
        for metric in self.metrics.values():
            metric.to(device)

    def pop(self) -> dict[str, Tensor]:
        """States of all metrics since the last call, where they are, as ``metric.state`` -> tensor."""
        states: dict[str, Tensor] = {}
        for name, metric in self.metrics.items():
            for key, value in metric.metric_state.items():
                merged = torch.cat(value) if isinstance(value, list) and value else value
                if isinstance(merged, Tensor):
                    states[f"{name}.{key}"] = merged
            metric.reset()
        return states

    def merge(self, states: Mapping[str, Tensor]) -> None:
        """Add states that `pop` gave."""
        for name, metric in self.metrics.items():
            prefix = f"{name}."
            part = {k.removeprefix(prefix): v for k, v in states.items() if k.startswith(prefix)}
            if part:
                # A list that stayed empty was not stored.
                lists = {
                    key: [part[key]] if key in part else []
                    for key, value in metric.metric_state.items()
                    if isinstance(value, list)
                }
                metric.merge_state(part | lists)


def other_reading(chosen: str) -> Literal["code", "paper"]:
    """Where released code and paper differ, the one that was not chosen: it is measured beside."""
    return "paper" if chosen == "code" else "code"


def label_masks(
    label: Tensor,
    positives: Sequence[int] | Tensor,
    info: DatasetInfo,
    *,
    void: str = "ignore",
    images: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Foreground of each positive label, and which pixels count at all.

    Args:
        label: label map [H,W], or masks [P,H,W] in the order of ``positives``; or label maps [G,H,W]
            of several images.
        positives: [P] class indices.
        info: the data set that the label values belong to.
        void: ``ignore`` leaves void pixels out, ``background`` counts them as background.
        images: of several label maps: int64 [P], that of each positive label.

    Returns:
        foreground bool [P,H,W], valid bool broadcastable to it.
    """
    if images is not None:
        label = label[images]
    elif label.ndim == 3:
        foreground, empty = label == 1, VOID
    if images is not None or label.ndim == 2:
        empty = info.void
        values = torch.as_tensor(positives, device=label.device) + info.label_value(0)
        foreground = label == values.view(-1, 1, 1)
    valid = label != empty if void == "ignore" else torch.ones_like(label, dtype=torch.bool)
    return foreground, valid


def stack_truth(labels: Sequence[Tensor], void: int) -> tuple[Tensor, Tensor | None]:
    """The truth of several images on one canvas, as large as the largest of them.

    Args:
        labels: label maps [H,W], or masks [P,H,W], of one kind.
        void: what is below and beside an image's own.

    Returns:
        label maps [G,H,W], or the masks of all images, [P,H,W]; and which pixels are an image's own, bool
        [G,H,W], None where all are.
    """
    several = labels[0].ndim == 3
    sizes = [(label.shape[-2], label.shape[-1]) for label in labels]
    if len({*sizes}) == 1:
        return (torch.cat if several else torch.stack)([*labels]), None
    counts = [len(label) if several else 1 for label in labels]
    canvas = labels[0].new_full((sum(counts), *largest(sizes)), void)
    for part, label, (height, width) in zip(canvas.split(counts), labels, sizes, strict=True):
        part[:, :height, :width] = label
    return canvas, inside(sizes, canvas.device)


def by_class(
    names: tuple[str, ...] | list[str], columns: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Columns of numbers, one [K] tensor each, as class name -> column -> number."""
    return {
        name: {column: float(values[i]) for column, values in columns.items()}
        for i, name in enumerate(names)
    }


def report_by_method(
    classes: tuple[str, ...],
    columns: Mapping[str, Mapping[str, Tensor]],
    means: Mapping[str, dict[str, float]],
    details: Mapping[str, dict[str, Any]],
    beside: Sequence[str],
) -> Report:
    """The report of several methods: the first one's numbers are the headline.

    Args:
        classes: names of the K classes.
        columns: method -> class-wise column -> numbers [K].
        means: method -> metrics.
        details: method -> what else there is to say of it.
        beside: columns of the other methods that stand beside the first one's, led by their method.

    Returns:
        The report.
    """
    first, *others = columns
    more = {
        f"{method}.{name}": columns[method][name]
        for method in others
        for name in beside
        if name in columns[method]
    }
    return Report(
        metrics=means[first],
        methods=dict(means),
        per_class=by_class(classes, {**columns[first], **more}),
        details=details[first] | ({"methods": {m: details[m] for m in others}} if others else {}),
    )
