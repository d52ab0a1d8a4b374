"""What each run, and each of its methods, says of an image, as the page gets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from common.files import finite
from datamodules._samples import DatasetInfo, Sample
from tasks.measures.segmentation import SegmentationMeasures
from tasks.report.encoding import quantised, run_lengths, shrunk, smaller_jpeg, thumbnail
from tasks.report.scoring import Quality, Truth
from tasks.run import Run
from tasks.run.image import StoredImage
from tasks.run.results import LabelMap, Masks, Points, Scores, Similarities, Tokens

SHOWN_SCORES = 12
"""How many of the best classes of an image are listed."""

_ELSEWHERE = frozenset(
    {"key", "methods", "size", "labels", "threshold", "best", "views", "grid", "words", "texts"}
)
"""What of an image's json is shown as what it means, or says nothing about the image."""


@dataclass(frozen=True)
class Column:
    """One of the answers that stand side by side: a run's, or one of its methods'.

    Attributes:
        run: whose.
        method: whose maps or points; None where the run knows no methods.
        label: what it is called.
    """

    run: Run
    method: str | None
    label: str

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the task."""
        task: dict[str, Any] = self.run.settings["task"]
        return task

    @cached_property
    def measures(self) -> SegmentationMeasures | None:
        """Of label maps; None for tasks without."""
        measures = self.run.measures() if self.settings["class"] == "Segmentation" else None
        return measures if isinstance(measures, SegmentationMeasures) else None

    def record(self) -> dict[str, Any]:
        """What the page has to know of it."""
        return {
            "label": self.label,
            "task": self.settings["class"],
            "threshold": self.settings.get("threshold", 0.5),
            "order": self.settings.get("order", "code"),
        }


def columns_of(runs: Sequence[Run], names: Sequence[str]) -> list[Column]:
    """All answers of runs, which are called ``names``."""
    columns = []
    for run, name in zip(runs, names, strict=True):
        methods = _methods(run.settings["task"])
        for method in methods:
            parts = [name] if len(runs) > 1 else []
            parts += [method] if method and (len(methods) > 1 or len(runs) == 1) else []
            columns.append(Column(run, method, " · ".join(parts) or "prediction"))
    return columns


def _methods(task: Mapping[str, Any]) -> list[str | None]:
    """All that a task's settings let explain an image; None for what has no name of its own."""
    if "beside" in task:  # words with maps of the task's own, and others beside
        return [None, *task["beside"], *(["sam"] if task.get("sam") else [])]
    return list(task.get("methods") or [None])


class Item:
    """One image, with every column's answer.

    Args:
        shard: of the image.
        key: of the image.
        sample: what it was made of, if that can be read.
        info: the data set.
        side: pixels of the longer side of pictures.
        classes: how many classes get a map besides those with a mask.
    """

    def __init__(
        self,
        shard: str,
        key: str,
        sample: Sample | None,
        info: DatasetInfo,
        side: int,
        classes: int,
    ) -> None:
        self.info = info
        self.side = side
        self.more = classes
        self.sample = sample
        self.truth = None if sample is None else Truth(sample, info)
        self.numbers = {name: index for index, name in enumerate(info.classes)}
        self.size: tuple[int, int] | None = None if sample is None else sample.size
        self.record: dict[str, Any] = {"shard": shard, "key": key, "columns": []}
        self.quality: list[Quality | None] = []
        self.score: list[float | None] = []
        self.labels: set[int] = set(sample.positives or ()) if sample else set()
        self.shown: set[int] = set()
        """Classes that some column says are there."""

    def add(self, column: Column, image: StoredImage | None) -> None:
        """Add a column's answer; None where it has none."""
        self.quality.append(None)
        self.score.append(None)
        if image is None:
            self.record["columns"].append(None)
            return
        if self.size is None and isinstance(size := image.record.get("size"), list):
            self.size = (int(size[0]), int(size[1]))
        entry: dict[str, Any] = {}
        method = column.method if image.methods else None
        masks, similarities = image.get(Masks, method), image.get(Similarities, method)
        tokens = image.get(Tokens)
        if similarities:
            entry["maps"] = self._maps(similarities, masks, tokens)
        if masks:
            self._add_masks(entry, masks)
        if labels := image.get(LabelMap):
            self._add_labels(entry, labels, column)
        if points := image.get(Points, method):
            self._add_points(entry, points)
        if scores := image.get(Scores):
            self._add_scores(entry, scores)
        if tokens:
            entry["tokens"] = {k: list(v) if k in _LISTS else v for k, v in vars(tokens).items()}
            self.score[-1] = max(tokens.scores, default=None)
        self._add_facts(entry, image)
        if quality := self.quality[-1]:
            entry["quality"] = {
                "name": quality.name,
                "value": round(quality.value, 4),
                "classes": {i: round(v, 4) for i, v in quality.classes.items() if v == v},
            }
        self.record["columns"].append(entry)

    def finished(self) -> dict[str, Any]:
        """All that the page needs to show the image."""
        sample = self.sample
        if sample is not None and sample.original is not None:
            self.record["image"] = thumbnail(sample.original.permute(1, 2, 0).numpy(), self.side)
        if sample is not None and sample.caption is not None:
            self.record["caption"] = sample.caption
        self.record["size"] = list(self.size) if self.size else None
        self.record["labels"] = sorted(self.labels)
        if self.truth is not None and self.truth.masks is not None:
            small = self._small()
            self.record["truth"] = {
                "size": list(small),
                "masks": {
                    index: run_lengths(shrunk(mask, small))
                    for index, mask in zip(
                        self.truth.positives or (), self.truth.masks.numpy(), strict=True
                    )
                },
            }
        return self.record

    def _small(self) -> tuple[int, int]:
        """The size at which masks are shown."""
        assert self.size is not None
        scale = min(1.0, self.side / max(self.size))
        return max(round(self.size[0] * scale), 1), max(round(self.size[1] * scale), 1)

    def _maps(
        self, similarities: Similarities, masks: Masks | None, tokens: Tokens | None
    ) -> dict[str, Any]:
        """The maps of the classes with a mask, and of those with the highest places."""
        values = similarities.values.astype(np.float32)
        peaks = values.max((1, 2))
        if similarities.single and tokens:
            named: list[tuple[int, str | int]] = [(0, tokens.best)]
        elif masks and masks.words:
            named = list(zip(masks.numbers, masks.names, strict=True))
        else:
            best = np.argsort(-peaks, kind="stable")[: self.more].tolist()
            wanted = [*(masks.numbers if masks else ()), *sorted(self.labels), *best]
            named = [(i, i) for i in dict.fromkeys(map(int, wanted)) if i < len(values)]
            self.shown |= {i for i, _ in named} & set(masks.numbers if masks else ())
        rows = [row for row, _ in named]
        self.score[-1] = float(peaks[rows].max()) if rows else None
        found = quantised(values[rows]) if rows else {"grid": [1, 1], "cells": ""}
        return {**found, "names": [name for _, name in named]}

    def _add_masks(self, entry: dict[str, Any], masks: Masks) -> None:
        if self.truth and not masks.words:
            self.quality[-1] = self.truth.of_masks(masks)
        if "maps" in entry or not len(masks.masks):
            return  # the page draws them anew, at any threshold
        entry["masks"] = self._small_masks(masks)

    def _small_masks(self, masks: Masks) -> dict[str, Any]:
        small = self._small()
        names = masks.names if masks.words else masks.numbers
        self.shown |= set() if masks.words else set(masks.numbers)
        return {
            "size": list(small),
            "names": [*names],
            "masks": [run_lengths(shrunk(mask, small)) for mask in masks.masks],
        }

    def _add_labels(self, entry: dict[str, Any], labels: LabelMap, column: Column) -> None:
        if self.truth and self.truth.label is not None and column.measures:
            self.quality[-1] = self.truth.of_label_map(labels, column.measures)
        self.size = self.size or (labels.values.shape[0], labels.values.shape[1])
        first = self.info.label_value(0)
        values, counts = np.unique(labels.values, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:255]
        places = np.full(int(values.max()) + 1, 255, np.uint8)
        places[values[order]] = np.arange(len(order))
        small = self._small()
        indices = [int(value) - first for value in values[order]]
        self.shown |= {index for index in indices if index >= 0}
        entry["labels"] = {
            "size": list(small),
            "values": run_lengths(places[shrunk(labels.values, small)]),
            "names": indices,  # -1 is the background
            "shares": [round(float(counts[i]) / labels.values.size, 4) for i in order],
        }

    def _add_points(self, entry: dict[str, Any], points: Points) -> None:
        if self.truth:
            self.quality[-1] = self.truth.of_points(points, self.numbers)
        self.size = self.size or points.size
        entry["points"] = {
            "names": [self.numbers.get(name, name) for name in points.points],
            "places": list(points.points.values()),
            "labels": list(points.labels.values()),
            "scores": list(points.scores),
        }
        self.shown |= {self.numbers[name] for name in points.points if name in self.numbers}
        if points.masks and len(points.masks.masks):
            entry["masks"] = self._small_masks(points.masks)

    def _add_scores(self, entry: dict[str, Any], scores: Scores) -> None:
        fits = tuple(scores.names) == self.info.classes
        if self.truth and fits:
            self.quality[-1] = self.truth.of_scores(scores)
        values = next(iter(scores.ways.values()))
        order = np.argsort(-values, kind="stable")
        ranks = {int(index): rank for rank, index in enumerate(order.tolist(), start=1)}
        chosen = [*order[:SHOWN_SCORES].tolist()]
        chosen += [i for i in sorted(self.labels, key=lambda i: ranks.get(i, 0)) if i not in chosen]
        self.score[-1] = float(values.max()) if len(values) else None
        entry["scores"] = {
            "names": [i if fits else scores.names[i] for i in chosen],
            "ranks": [ranks[i] for i in chosen],
            "ways": {
                way: [round(float(of[i]), 4) for i in chosen] for way, of in scores.ways.items()
            },
        }
        self.shown |= {i for i in chosen[: max(len(self.labels), 1)] if fits}

    def _add_facts(self, entry: dict[str, Any], image: StoredImage) -> None:
        """What else is said, and pictures where they are all that there is to see."""
        known = _ELSEWHERE | entry.get("tokens", {}).keys()
        facts = {k: v for k, v in image.record.items() if k not in known}
        if "frequencies" in facts:
            opinions = facts.get("opinions") or []
            self.score[-1] = max((one["score"] for one in opinions), default=None)
        if facts:
            entry["facts"] = finite(facts)
        if not entry.keys() & {"maps", "labels", "points", "masks"} and image.pictures:
            entry["pictures"] = [
                [name.removesuffix(".jpg"), smaller_jpeg(data, 2 * self.side)]
                for name, data in sorted(image.pictures.items())
            ]


_LISTS = ("tokens", "scores", "ranks")


def together(columns: Sequence[Column], shard: str) -> Iterator[list[StoredImage | None]]:
    """The images of a shard of the first run, each with every column's answer of its key."""
    runs = list(dict.fromkeys(column.run for column in columns))
    others = [{image.key: image for image in run.images([shard])} for run in runs[1:]]
    for image in runs[0].images([shard]):
        found = dict(zip(runs, [image, *(of.get(image.key) for of in others)], strict=True))
        yield [found[column.run] for column in columns]
