"""The small values that flow from a shard to a task: what a data set is, a sample's truth, a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import InvalidSetting

VOID = 255
"""Label value of pixels that count neither as foreground nor as background."""

WIDE_VOID = 65535
"""The same in the 16-bit label maps of data sets with more classes than a byte can tell apart."""


class Wording(NamedTuple):
    """The words a published evaluation gives a text encoder.

    ``classes`` several synonyms a class, in index order; ``background`` what stands for everything
    else.
    """

    classes: tuple[tuple[str, ...], ...]
    background: tuple[str, ...] = ("background",)


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before any sample is read.

    Args:
        name: name of the data set as ``lightning shards`` knows it.
        classes: official class names, in index order, without the background.
        prompts: the words that stand for each class in a text prompt; ``classes`` if empty.
        palette: one RGB colour (0-255) a class.
        background: whether label value 0 is the background, so that class ``i`` has value ``i + 1``;
            otherwise class ``i`` has value ``i``.
        labels: what the truth of a sample is: ``"mask"`` (label maps, positive labels follow from
            them), ``"positives"`` (image-level labels only) or ``"none"``.
        captions: whether the samples have captions.
        background_words: words for what is no class; where there are some, the background is a class
            of its own in segmentation, and otherwise its pixels don't count there.
        synonyms: all the words of each class, for tasks that take the best of them; led by
            ``background_words`` where there are some. ``prompts`` alone if empty.
    """

    name: str
    classes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)
    background: bool = True
    labels: str = "mask"
    captions: bool = False
    background_words: tuple[str, ...] = ()
    synonyms: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            object.__setattr__(self, "prompts", self.classes)
        if not self.palette:
            object.__setattr__(self, "palette", colour_table(len(self.classes) + 1)[1:])
        for what in ("prompts", "palette"):
            if len(getattr(self, what)) != len(self.classes):
                raise InvalidSetting(
                    f"{self.name}: {len(self.classes)} classes but {len(getattr(self, what))} {what}"
                )
        if self.synonyms and len(self.synonyms) != len(self.classes) + bool(self.background_words):
            raise InvalidSetting(
                f"{self.name}: {len(self.classes)} classes but {len(self.synonyms)} synonyms"
            )

    @property
    def void(self) -> int:
        """Value of void pixels in a label map."""
        return VOID if self.label_value(len(self.classes) - 1) < VOID else WIDE_VOID

    @property
    def label_type(self) -> type[np.uint8] | type[np.uint16]:
        """Type of the values in a label map."""
        return np.uint8 if self.void == VOID else np.uint16

    def label_value(self, index: int) -> int:
        """Value of class ``index`` in a label map."""
        return index + 1 if self.background else index

    def flat_palette(self) -> list[int]:
        """RGB table for a palette PNG of label values: 256 x 3 numbers, void light grey.

        16-bit label maps have no colours; of these classes only the first 255 are in the table.
        """
        table = [0, 0, 0] * 256
        for index, colour in enumerate(self.palette):
            value = self.label_value(index)
            if value < VOID:
                table[3 * value : 3 * value + 3] = colour
        table[3 * VOID : 3 * VOID + 3] = (224, 224, 192)
        return table


def colour_table(count: int) -> tuple[tuple[int, int, int], ...]:
    """The colour table of PASCAL VOC: colour ``i`` spreads the bits of ``i`` over the channels."""

    def colour(index: int) -> tuple[int, int, int]:
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        return rgb[0], rgb[1], rgb[2]

    return tuple(colour(i) for i in range(count))


class SampleError(NamedTuple):
    """One thing that went wrong with a sample, or with a whole shard (then ``key`` is empty)."""

    shard: str
    key: str
    reason: str


class Encoded:
    """The bytes of an image file that is decoded later, and the (height, width) it gets then.

    A class of its own, not a tuple: Lightning moves batches by walking through all sequences in
    them, and bytes are one.
    """

    def __init__(self, data: bytes, size: tuple[int, int]) -> None:
        self.data = data
        self.size = size


class Sample(NamedTuple):
    """One decoded sample.

    ``image`` uint8 [3,S,S'], resized, or what it will be made of; ``size`` (height, width) of the
    upright original; ``label`` either a label map [H,W] (uint8, or int32 where label values need 16
    bits; ``DatasetInfo.void`` is void) or one mask a positive label [P,H,W] (uint8; 1 foreground, 0
    background, 255 void), both at the original size, or None; ``positives`` class indices, or None
    where unknown; ``record`` the sample's json; ``original`` uint8 [3,H,W], not resized, for tasks
    that ask for it.
    """

    key: str
    image: Tensor | Encoded
    size: tuple[int, int]
    label: Tensor | None
    positives: tuple[int, ...] | None
    caption: str | None
    record: dict[str, Any]
    original: Tensor | None = None


class Batch(NamedTuple):
    """Consecutive samples of one shard, never of two.

    A named tuple, not a dataclass: Lightning and torch then move and pin its tensors by themselves.
    ``images`` is [B,3,S,S'] uint8, or a list of B tensors [3,S,S'] where ``--data.resize short_side``
    left them different sizes; every list has B entries. ``errors`` lists the samples that
    would have been in this batch, so B may be smaller than the batch size, or 0. The batch stands
    for the samples from ``start`` on of the ``total`` in its shard (0 if the shard is unreadable).
    ``pending`` is empty once all images are decoded, as they are before a task sees them.
    """

    shard: str
    start: int
    total: int
    keys: list[str]
    images: Tensor | list[Tensor]
    sizes: list[tuple[int, int]]
    labels: list[Tensor | None]
    positives: list[tuple[int, ...] | None]
    captions: list[str | None]
    errors: list[SampleError]
    originals: list[Tensor | None]
    pending: list[Tensor | Encoded]

    @property
    def end(self) -> int:
        """Position in the shard just after this batch."""
        return self.start + len(self.keys) + len(self.errors)

    @property
    def last(self) -> bool:
        """Whether this is the last batch of its shard."""
        return self.end >= self.total

    @classmethod
    def collate(
        cls, shard: str, start: int, total: int, samples: list[Sample], errors: list[SampleError]
    ) -> Batch:
        """Stack the images of ``samples`` if they have one size; labels keep their own sizes."""
        images = [s.image for s in samples if isinstance(s.image, Tensor)]
        decoded = len(images) == len(samples)
        return cls(
            shard=shard,
            start=start,
            total=total,
            keys=[s.key for s in samples],
            images=stack_alike(images if decoded else []),
            sizes=[s.size for s in samples],
            labels=[s.label for s in samples],
            positives=[s.positives for s in samples],
            captions=[s.caption for s in samples],
            errors=errors,
            originals=[s.original for s in samples],
            pending=[] if decoded else [s.image for s in samples],
        )


def stack_alike(images: list[Tensor]) -> Tensor | list[Tensor]:
    """Images [3,S,S'] as one tensor [B,3,S,S'] if they have one size, else as they are."""
    if not images:
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images
