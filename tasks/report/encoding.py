"""Pictures, maps and masks made small enough to stand in a page."""

from __future__ import annotations

import io
from base64 import b64encode
from typing import Any

import numpy as np
from PIL import Image

QUALITY = 82
"""Of the JPEGs that a page holds."""

LEVELS = 65535
"""Steps between the smallest and the largest cell of a map: finer than the float16 that runs store. With
255, ten times as many pixels of masks are others than in the run's files (1 in 1,000)."""


def thumbnail(image: np.ndarray, side: int) -> dict[str, Any]:
    """An image uint8 [H,W,3], its longer side at most ``side``, as JPEG in base64, with its size."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return {"jpeg": _text(buffer.getvalue()), "size": [picture.height, picture.width]}


def smaller_jpeg(data: bytes, side: int) -> str:
    """A JPEG of a run, shrunk where it is larger than ``side``, in base64."""
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as picture:
        array = np.asarray(picture.convert("RGB"))
    return str(thumbnail(array, side)["jpeg"])


def quantised(maps: np.ndarray) -> dict[str, Any]:
    """Maps [T,h,w] as 16-bit numbers in base64, each min-maxed, with the ranges that they had.

    The page min-maxes a map and then enlarges it, as the masks of a run are made.
    """
    values = maps.astype(np.float64)
    low, high = values.min((1, 2)), values.max((1, 2))
    span = np.where(high > low, high - low, 1.0)
    cells = np.round(LEVELS * (values - low[:, None, None]) / span[:, None, None])
    return {
        "grid": list(maps.shape[1:]),
        "cells": _text(cells.astype("<u2").tobytes()),
        "low": [round(float(value), 5) for value in low],
        "high": [round(float(value), 5) for value in high],
    }


def shrunk(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Label values, or a mask, [H,W] at a smaller size, by the nearest pixel's value."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for new, old in zip(size, labels.shape, strict=True)
    )
    return labels[rows[:, None], columns]


def run_lengths(labels: np.ndarray) -> str:
    """Small label values uint8 [h,w], row by row, as pairs of (value, length) in base64.

    Lengths are varints of seven bits a byte, the lowest first. No PNG: some browsers add noise to
    pixels that a page reads back.
    """
    flat = labels.astype(np.uint8).ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    lengths = np.diff(starts, append=len(flat))
    out = bytearray()
    for value, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        out.append(value)
        while length >= 128:
            out.append(length & 127 | 128)
            length >>= 7
        out.append(length)
    return _text(bytes(out))


def _text(data: bytes) -> str:
    return b64encode(data).decode()
