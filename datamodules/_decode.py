"""From the bytes of one sample to tensors. Only known members are decoded, never a pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from common.pictures import (
    ENDINGS,
    MAX_PIXELS,
    BadPicture,
    identify,
    open_picture,
    size_if_plain,
)
from datamodules._resize import MAX_LONG_SIDE, opencv_bilinear, opencv_size
from datamodules._samples import VOID, DatasetInfo, Encoded, Sample
from datamodules._tar import BadSample, Entry, Span, read_member, said_by

LABEL = "label.png"
MASK = "mask.png"
MAX_IMAGE_BYTES = 512 << 20
MAX_TEXT_BYTES = 1 << 20

Resize = Literal["squash", "short_side", "opencv"]
"""What ``--data.resize`` offers."""


@dataclass(frozen=True)
class Decoder:
    """How samples are decoded: to which size, within which limits.

    Attributes:
        info: the data set; gives the label values that may occur.
        size: (height, width) of the images: bicubic, antialiased, no crop.
        max_pixels: larger images are refused before they are unpacked.
        need_label: whether a sample without its label is an error.
        resize: ``squash`` gives every image this size, as in the paper. ``short_side`` keeps the
            aspect ratio up to rounding: the shorter side gets the smaller of ``size``, but the
            longer one not more than 2048. ``opencv`` does so to the pixel, and as OpenCV does it.
        multiple: (height, width) of a patch; ``short_side`` rounds to multiples of it.
        keep_original: also give the image as it was before it was resized.
        defer: leave the JPEGs that every decoder reads alike to be decoded later.
    """

    info: DatasetInfo
    size: tuple[int, int]
    max_pixels: int
    need_label: bool = True
    resize: Resize = "squash"
    multiple: tuple[int, int] = (1, 1)
    keep_original: bool = False
    defer: bool = False

    def __call__(self, entry: Entry) -> Sample:
        """Decode one sample.

        Raises:
            BadSample: with the reason; any other exception is a defect of the sample just as well.
        """
        if entry.defect:
            raise BadSample(entry.defect)
        members = entry.members
        record = _json(read_member(members["json"], MAX_TEXT_BYTES)) if "json" in members else {}
        caption = None
        if "txt" in members:
            caption = read_member(members["txt"], MAX_TEXT_BYTES).decode("utf-8", "replace")
        extension = next((e for e in ENDINGS if e in members), None)
        if extension is None:
            raise BadSample(f"no image: its members are {sorted(members)}")
        label = self._label(members)
        data = read_member(members[extension], MAX_IMAGE_BYTES)
        size = size_if_plain(data, self.max_pixels) if self.defer else None
        picture = None
        if size is None:
            seen = None if label is None else label.shape[-2:]
            picture = open_picture(data, self.max_pixels, stored_size=seen)
            size = (picture.height, picture.width)
        if label is None and self.info.labels == "mask":
            if record.get("positives") == []:  # one mask a positive label, and there is none
                label = np.zeros((0, *size), np.uint8)
            elif self.need_label:
                raise BadSample(f"no label: its members are {sorted(members)}")
        if label is not None and label.shape[-2:] != size:
            raise BadSample(
                f"the label is {label.shape[-1]}x{label.shape[-2]}, "
                f"the image is {size[1]}x{size[0]}"
            )
        height, width = self.target_size(size)
        image: torch.Tensor | Encoded = Encoded(data, (height, width), self.resize == "opencv")
        if picture is not None and self.resize == "opencv":
            image = opencv_bilinear(to_tensor(picture), (height, width))
        elif picture is not None:
            image = to_tensor(picture.resize((width, height), Image.Resampling.BICUBIC))
        positives = self._positives(record, label)
        return Sample(
            key=entry.key,
            image=image,
            size=size,
            label=None if label is None else torch.from_numpy(label),
            positives=positives,
            caption=caption,
            record=record,
            original=to_tensor(picture) if self.keep_original and picture is not None else None,
        )

    def target_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of ``size`` is resized to."""
        if self.resize == "squash":
            return self.size
        if self.resize == "opencv":
            return opencv_size(size, min(self.size))
        scale = min(min(self.size) / min(size), MAX_LONG_SIDE / max(size))
        height, width = (
            max(round(side * scale / step), 1) * step
            for side, step in zip(size, self.multiple, strict=True)
        )
        return height, width

    def _label(self, members: dict[str, Span]) -> np.ndarray | None:
        if LABEL in members:
            label = read_index_png(read_member(members[LABEL], MAX_IMAGE_BYTES), self.max_pixels)
            self._check_range(label)
            return label if label.dtype == np.uint8 else label.astype(np.int32)
        names = sorted(e for e in members if e.endswith(MASK))
        masks = [
            read_index_png(read_member(members[name], MAX_IMAGE_BYTES), self.max_pixels)
            for name in names
        ]
        for name, mask in zip(names, masks, strict=True):
            if mask.shape != masks[0].shape:
                raise BadSample(f"{name} and {names[0]} differ in size")
            if not np.isin(mask, (0, 1, VOID)).all():
                raise BadSample(f"{name} has values other than 0, 1 and {VOID}")
        return np.stack(masks) if masks else None

    def _check_range(self, label: np.ndarray) -> None:
        top = self.info.label_value(len(self.info.classes) - 1)
        values = np.flatnonzero(np.bincount(label.ravel()))
        wrong = [int(v) for v in values if v > top and v != self.info.void]
        if wrong:
            raise BadSample(
                f"label values {wrong[:8]} are above {top}, the last class of {self.info.name}"
            )

    def _positives(
        self, record: dict[str, Any], label: np.ndarray | None
    ) -> tuple[int, ...] | None:
        if label is not None and label.ndim == 2:
            values = np.flatnonzero(np.bincount(label.ravel()))
            first = self.info.label_value(0)
            return tuple(int(v) - first for v in values if v >= first and v != self.info.void)
        stored = record.get("positives")
        if stored is None:
            return None
        count = len(self.info.classes)
        if not isinstance(stored, list) or any(
            not isinstance(i, int) or not 0 <= i < count for i in stored
        ):
            raise BadSample(f"positives {str(stored)[:80]} are not class indices below {count}")
        if label is not None and len(stored) != len(label):
            raise BadSample(f"{len(label)} masks for {len(stored)} positive labels")
        return tuple(stored)


def reason_of(error: Exception) -> str:
    """What is listed of an error that untrusted bytes made."""
    return str(error) if isinstance(error, BadSample | BadPicture) else said_by(error)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """uint8 [3,H,W] of an RGB image."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def _json(data: bytes) -> dict[str, Any]:
    record = json.loads(data)
    if not isinstance(record, dict):
        raise BadSample("its json is not an object")
    return record


def read_index_png(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Label values [H,W] of a palette or grayscale PNG: uint8, or uint16 of a 16-bit one.

    Raises:
        BadSample: not such a PNG, or more than ``max_pixels`` pixels.
        OSError: it is cut off.
    """
    try:
        image = identify(data, max_pixels, ("PNG",))
    except BadPicture as error:
        raise BadSample(f"its label PNG: {error}") from None
    if image.mode.startswith("I"):
        return np.array(image).astype(np.uint16)
    if image.mode not in ("P", "L", "1"):
        raise BadSample(f"its label PNG has mode {image.mode}, expected indices (P or L)")
    return np.array(image, dtype=np.uint8)
