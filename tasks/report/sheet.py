"""What stands on a contact sheet of runs: a row an image, a column a method."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._samples import Sample
from surgery import similarity_map
from surgery.visualize import colours
from tasks._draw import LOOK, Look, heat_maps, label_colours, point_figure
from tasks._sheet import Row, draw_sheet
from tasks.report.answers import Column, columns_of, together
from tasks.report.charts import need_matplotlib
from tasks.report.originals import Originals
from tasks.run import Run, RunError
from tasks.run.compare import names_of
from tasks.run.image import StoredImage
from tasks.run.place import beside
from tasks.run.results import LabelMap, Masks, Points, Similarities, Tokens
from tasks.run.shard import ShardRecord


def write_sheet(
    runs: Sequence[Run],
    output: Path | None = None,
    *,
    shards: str | None = None,
    rows: int = 8,
    keys: Sequence[str] | None = None,
    look: Look = LOOK,
) -> Path:
    """Write a contact sheet.

    Args:
        runs: whose methods are the columns.
        output: the picture, of an ending that matplotlib writes; by default ``sheet.png`` in the first
            run's folder.
        shards: where the input of the runs is now, see `Originals`.
        rows: how many images, spread evenly over the first run.
        keys: these images in their place, in this order.
        look: of heat maps.

    Returns:
        The picture.

    Raises:
        InvalidSetting: an image that isn't there, a colour map or an ending that nobody knows, or
            matplotlib is not installed.
        RunError: a run is damaged, or there is nothing in it.
    """
    need_matplotlib()
    colours(torch.zeros(1), look.colour_map)  # refuses one that nobody knows
    output = output or beside(runs[0].folder, "sheet.png")
    columns = columns_of(runs, names_of(runs))
    originals = Originals(runs[0], shards)
    found: dict[str, Row] = {}
    try:
        for key, sample, answers in _chosen(runs[0], columns, originals, rows, keys):
            found[key] = _row(key, sample, columns, answers, look)
    finally:
        originals.close()
    if missing := [key for key in keys or () if key not in found]:
        raise InvalidSetting(f"--keys: {runs[0].folder} has no image {missing[0]!r}")
    if not found:
        raise RunError(f"{runs[0].folder}: no shard is finished, there is nothing to show")
    heads = ["image", *(column.label for column in columns)]
    draw_sheet([found[key] for key in keys or found], heads, output)
    return output


def _chosen(
    run: Run,
    columns: Sequence[Column],
    originals: Originals,
    rows: int,
    keys: Collection[str] | None,
) -> Iterator[tuple[str, Sample | None, list[StoredImage | None]]]:
    """Key, sample and answers of the images that make rows."""
    counts = {name: ShardRecord.load(path).images for name, path in run.places().items()}
    total, number = sum(counts.values()), 0
    wanted = {i * total // min(rows, total) for i in range(min(rows, total))}
    for shard, count in counts.items():
        if keys is None and wanted.isdisjoint(range(number, number + count)):
            number += count
            continue
        with originals.open(shard) as find:
            for answers in together(columns, shard):
                key = next(image.key for image in answers if image)
                if key in keys if keys is not None else number in wanted:
                    yield key, find(key), answers
                number += 1


def _row(
    key: str,
    sample: Sample | None,
    columns: Sequence[Column],
    answers: Sequence[StoredImage | None],
    look: Look,
) -> Row:
    name = _name(columns, answers, sample)
    original = None if sample is None else sample.original
    pictures = [None if original is None else original.permute(1, 2, 0).numpy()]
    pictures += [
        None if image is None else _picture(column, image, original, name, look)
        for column, image in zip(columns, answers, strict=True)
    ]
    return Row(name or key, pictures)


def _name(
    columns: Sequence[Column], answers: Sequence[StoredImage | None], sample: Sample | None
) -> str:
    """The class with the largest true mask, or else the first thing that an answer is about."""
    info = columns[0].run.info
    of_words = any(
        image and (image.get(Tokens) or ((masks := image.get(Masks)) and masks.words))
        for image in answers
    )
    if not of_words and sample is not None and sample.label is not None and sample.positives:
        label = sample.label
        if label.ndim == 3:
            areas = (label == 1).flatten(1).sum(1).tolist()
        else:
            areas = [int((label == info.label_value(index)).sum()) for index in sample.positives]
        return info.classes[sample.positives[int(np.argmax(areas))]]
    for column, image in zip(columns, answers, strict=True):
        if image is None:
            continue
        if tokens := image.get(Tokens):
            return tokens.best
        method = column.method if image.methods else None
        if (masks := image.get(Masks, method)) and masks.names:
            similarities = image.get(Similarities, method)
            peaks = similarities.values.max((1, 2)) if similarities else np.zeros(1)
            best = int(np.argmax([peaks[n] if n < len(peaks) else 0 for n in masks.numbers]))
            return masks.names[best]
        if (points := image.get(Points, method)) and points.points:
            return next(iter(points.points))
    return ""


def _picture(
    column: Column, image: StoredImage, original: Tensor | None, name: str, look: Look
) -> np.ndarray | None:
    """What a column says of ``name`` on an image uint8 [3,H,W]."""
    method = column.method if image.methods else None
    info = column.run.info
    if labels := image.get(LabelMap):
        under = _under(original, (labels.values.shape[0], labels.values.shape[1]))
        return label_colours(under, labels.values, info.flat_palette(), look)
    if (points := image.get(Points, method)) and name in points.points:
        mask = None
        if points.masks and name in points.masks.names:
            mask = points.masks.masks[list(points.masks.names).index(name)]
        under = _under(original, points.size)
        return point_figure(under, points.size, points.points[name], points.labels[name], mask)
    if similarities := image.get(Similarities, method):
        row = _place(name, similarities, image.get(Masks, method), info.classes)
        if row is None:
            return None
        values = torch.from_numpy(similarities.values[row].astype(np.float32))
        height, width = original.shape[1:] if original is not None else image.record["size"]
        grid, size = (values.shape[0], values.shape[1]), (height, width)
        order = column.settings.get("order", "code")
        map_ = similarity_map(values.flatten()[None, :, None], grid, size, order=order)[0, 0]
        return heat_maps(_under(original, size), map_[None], look)[0]
    if image.pictures:
        with Image.open(io.BytesIO(next(iter(image.pictures.values())))) as drawn:
            return np.asarray(drawn.convert("RGB"))
    return None


def _place(
    name: str, similarities: Similarities, masks: Masks | None, classes: Sequence[str]
) -> int | None:
    """The row of similarities that is about ``name``."""
    if similarities.single:
        return 0
    if masks and masks.words:
        return masks.numbers[list(masks.names).index(name)] if name in masks.names else None
    return list(classes).index(name) if name in classes else None


def _under(original: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The image uint8 [3,H,W], or grey where there is none."""
    return torch.full((3, *size), 160, dtype=torch.uint8) if original is None else original
