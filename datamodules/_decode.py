"""From the bytes of one sample to tensors. Only known members are decoded, never a pickle."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from datamodules._tar import BadSample, Entry, read_member
from datamodules.samples import VOID, DatasetInfo, Sample

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
LABEL = "label.png"
MASK = "mask.png"
MAX_IMAGE_BYTES = 512 << 20
MAX_TEXT_BYTES = 1 << 20
MAX_PIXELS = 100_000_000
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Decoder:
    """How samples are decoded: to which size, within which limits.

    Args:
        info: the data set; gives the label values that may occur.
        size: (height, width) to which images are squashed: bicubic, antialiased, no crop, as in the
            paper.
        max_pixels: larger images are refused before they are unpacked.
        need_label: whether a sample without its label is an error.
    """

    info: DatasetInfo
    size: tuple[int, int]
    max_pixels: int
    need_label: bool = True

    def __call__(self, path: str, entry: Entry) -> Sample:
        """Decode one sample of the shard at ``path``.

        Raises:
            BadSample: with the reason; any other exception is a defect of the sample just as well.
        """
        if entry.defect:
            raise BadSample(entry.defect)
        members = entry.members
        record = (
            _json(read_member(path, members["json"], MAX_TEXT_BYTES)) if "json" in members else {}
        )
        caption = None
        if "txt" in members:
            caption = read_member(path, members["txt"], MAX_TEXT_BYTES).decode("utf-8", "replace")
        extension = next((e for e in IMAGES if e in members), None)
        if extension is None:
            raise BadSample(f"no image: its members are {sorted(members)}")
        label = self._label(path, members)
        data = read_member(path, members[extension], MAX_IMAGE_BYTES)
        image = open_image(data, self.max_pixels, None if label is None else label.shape[-2:])
        size = (image.height, image.width)
        if label is not None and label.shape[-2:] != size:
            raise BadSample(
                f"the label is {label.shape[-1]}x{label.shape[-2]}, "
                f"the image is {image.width}x{image.height}"
            )
        resized = image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC)
        positives = self._positives(record, label)
        return Sample(
            key=entry.key,
            image=torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).contiguous(),
            size=size,
            label=None if label is None else torch.from_numpy(label),
            positives=positives,
            caption=caption,
            record=record,
        )

    def _label(self, path: str, members: dict[str, tuple[int, int]]) -> np.ndarray | None:
        masks = sorted(e for e in members if e.endswith(MASK) and e != LABEL)
        if LABEL in members:
            label = read_index_png(
                read_member(path, members[LABEL], MAX_IMAGE_BYTES), self.max_pixels
            )
            self._check_range(label)
            return label
        if masks:
            spans = [members[e] for e in masks]
            return np.stack(
                [
                    read_index_png(read_member(path, s, MAX_IMAGE_BYTES), self.max_pixels)
                    for s in spans
                ]
            )
        if self.need_label and self.info.labels == "mask":
            raise BadSample(f"no label: its members are {sorted(members)}")
        return None

    def _check_range(self, label: np.ndarray) -> None:
        counts = np.bincount(label.ravel(), minlength=VOID + 1)
        top = self.info.label_value(len(self.info.classes) - 1)
        wrong = [int(v) for v in np.flatnonzero(counts) if v > top and v != VOID]
        if wrong:
            raise BadSample(
                f"label values {wrong[:8]} are above {top}, the last class of {self.info.name}"
            )

    def _positives(
        self, record: dict[str, Any], label: np.ndarray | None
    ) -> tuple[int, ...] | None:
        if label is not None and label.ndim == 2:
            values = np.flatnonzero(np.bincount(label.ravel(), minlength=VOID + 1)[:VOID])
            first = self.info.label_value(0)
            return tuple(int(v) - first for v in values if v >= first)
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


def _json(data: bytes) -> dict[str, Any]:
    record = json.loads(data)
    if not isinstance(record, dict):
        raise BadSample("its json is not an object")
    return record


def read_index_png(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Label values [H,W] uint8 of a palette or grayscale PNG."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        _check_pixels(image, max_pixels)
        if image.mode not in ("P", "L", "1"):
            raise BadSample(f"its label PNG has mode {image.mode}, expected indices (P or L)")
        return np.array(image, dtype=np.uint8)


def open_image(
    data: bytes, max_pixels: int, label_size: tuple[int, ...] | None = None
) -> Image.Image:
    """Upright RGB image from the bytes of any picture file.

    EXIF orientation is applied, unless the label map was drawn on the image as it is stored.
    Transparency is laid on white, as a viewer would show it. 16-bit gray is scaled to 8 bits.

    Raises:
        BadSample: more than ``max_pixels`` pixels.
        OSError: not a picture, or cut off.
    """
    # Pillow's own limit would refuse what a raised max_pixels allows; ours is checked just below,
    # before anything is unpacked.
    Image.MAX_IMAGE_PIXELS = None
    image: Image.Image = Image.open(io.BytesIO(data))
    _check_pixels(image, max_pixels)
    image.load()
    if image.getexif().get(_EXIF_ORIENTATION, 1) != 1 and label_size != (image.height, image.width):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise BadSample(
            f"the picture claims {image.width}x{image.height} pixels, more than "
            f"--data.max_pixels {max_pixels}"
        )
