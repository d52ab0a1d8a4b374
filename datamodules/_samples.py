"""The small values that flow from a shard to a task: what a data set is, a sample's truth, a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

    Attributes:
        classes: one or more synonyms a class, in index order.
        background_words: what stands for everything else.
    """

    classes: tuple[tuple[str, ...], ...]
    background_words: tuple[str, ...] = ("background",)


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set before any sample is read.

    Attributes:
        name: name of the data set as ``lightning shards`` knows it.
        classes: official class names, in index order, without the background.
        prompts: the words that stand for each class in a text prompt; ``classes`` if empty.
        palette: one RGB colour (0-255) a class.
        zero_is_background: whether label value 0 is the background, so that class ``i`` has value
            ``i + 1``; otherwise class ``i`` has value ``i``.
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
    zero_is_background: bool = True
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
        """Value of class ``index`` in a label map.

        Example:
            >>> DatasetInfo("roads", ("road", "car")).label_value(0)
            1
            >>> DatasetInfo("roads", ("road", "car"), zero_is_background=False).label_value(0)
            0
        """
        return index + 1 if self.zero_is_background else index

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
    """The colour table of PASCAL VOC: colour ``i`` spreads the bits of ``i`` over the channels.

    Example:
        >>> colour_table(4)
        ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    """

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


@dataclass(frozen=True)
class Wanted:
    """What a reader of shards has to know of the model, and of the run.

    Attributes:
        image_size: (height, width) of the images, where the data set's settings don't say.
        patch_size: (height, width) of a patch, of which images that keep their aspect ratio have
            whole ones.
        originals: whether the images are wanted at their own size too.
        finished: names of shards that need not be read.
        counter: adds to a number that all processes of the run share, 0 at first, and returns it, so
            that shards are handed out as processes become free. It is used up with the batches of one
            loader. Without it each of several processes reads a fixed part.
    """

    image_size: tuple[int, int] | None = None
    patch_size: tuple[int, int] = (1, 1)
    originals: bool = False
    finished: frozenset[str] = frozenset()
    counter: Callable[[int], int] | None = None


class Encoded(NamedTuple):
    """An image file that is decoded later.

    Attributes:
        data: its bytes.
        size: the (height, width) that it gets then.
        opencv: whether it gets it as OpenCV would resize it.
    """

    data: bytes
    size: tuple[int, int]
    opencv: bool = False


class Sample(NamedTuple):
    """One decoded sample.

    Attributes:
        key: its name, unique in its shard.
        image: uint8 [3,S,S'], resized, or what it will be made of.
        size: (height, width) of the upright original.
        label: a label map [H,W] (uint8, or int32 where label values need 16 bits; ``DatasetInfo.void``
            is void), or one mask a positive label [P,H,W] (uint8; 1 foreground, 0 background, 255
            void); both at the original size. None where there is none.
        positives: class indices [P]; None where unknown.
        caption: what is said of the image, if anything is.
        record: the sample's json.
        original: uint8 [3,H,W], not resized, for tasks that want it.
    """

    key: str
    image: Tensor | Encoded
    size: tuple[int, int]
    label: Tensor | None
    positives: tuple[int, ...] | None
    caption: str | None
    record: dict[str, Any]
    original: Tensor | None = None


_TENSORS = ("image", "label", "original")


class _Place(NamedTuple):
    """Where a tensor is in a buffer: its first byte, type and shape."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class Batch:
    """Consecutive samples of one shard, never of two; not changed once it is made.

    No dataclass and no tuple: with half and double precision Lightning converts the tensors in
    those by itself, and ours are bytes and label maps, of which a task makes floats where it wants.

    Between processes, to pinned memory and to a GPU all tensors travel as one, with the places of
    each: a process may have some thousand files open, and a tensor of its own is one of them.

    Attributes:
        shard: name of the shard.
        start: position of the first sample in it.
        total: samples in the shard, good or bad; 0 if it can't be read.
        samples: B of them, in order. Before a task sees them, all images are decoded.
        errors: the samples that would have been in this batch, so B may be smaller than the batch
            size, or 0.
        images: uint8 [B,3,S,S'], or a list of B tensors [3,S,S'] where ``--data.resize short_side``
            left them different sizes, or some are still to be decoded.
    """

    def __init__(
        self,
        shard: str,
        start: int,
        total: int,
        samples: tuple[Sample, ...],
        errors: tuple[SampleError, ...],
        images: Tensor | list[Tensor],
        packed: tuple[tuple[Any, ...], Tensor] | None = None,
    ) -> None:
        self.shard, self.start, self.total = shard, start, total
        self.samples, self.errors, self.images = samples, errors, images
        self._packed = packed

    @classmethod
    def collate(
        cls,
        shard: str,
        start: int,
        total: int,
        samples: Sequence[Sample],
        errors: Sequence[SampleError],
    ) -> Batch:
        """A batch of samples as they were decoded; their images are stacked if they have one size."""
        images = [s.image for s in samples if isinstance(s.image, Tensor)]
        return cls(shard, start, total, tuple(samples), tuple(errors), stack_alike(images))

    @property
    def keys(self) -> list[str]:
        """The samples' keys."""
        return [sample.key for sample in self.samples]

    @property
    def end(self) -> int:
        """Position in the shard just after this batch."""
        return self.start + len(self.samples) + len(self.errors)

    @property
    def last(self) -> bool:
        """Whether this is the last batch of its shard."""
        return self.end >= self.total

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device; itself if it is there."""
        if self._buffer().device == torch.device(device):
            return self
        return self._moved(lambda buffer: buffer.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in memory that a GPU can fetch it from."""
        return self._moved(Tensor.pin_memory)

    def __reduce__(self) -> Any:
        bare, buffer = self._pack()
        return _unpack, (self.shard, self.start, self.total, bare, self.errors, buffer)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        bare, buffer = self._pack()
        return _unpack(self.shard, self.start, self.total, bare, self.errors, move(buffer))

    def _buffer(self) -> Tensor:
        """A tensor of this batch, to ask where it is."""
        if self._packed:
            return self._packed[1]
        return next((t for s in self.samples for t in _tensors(s)), torch.empty(0))

    def _pack(self) -> tuple[tuple[Any, ...], Tensor]:
        """The samples with places instead of tensors, and the one tensor uint8 [n] that has them all."""
        if self._packed:
            return self._packed
        parts: list[Tensor] = []
        places: list[dict[str, Any]] = [{} for _ in self.samples]
        end = 0
        for name in _TENSORS:  # all images first: then their stack is a part of the buffer
            for sample, found in zip(self.samples, places, strict=True):
                tensor = getattr(sample, name)
                if isinstance(tensor, Tensor):
                    gap = -end % tensor.element_size()
                    parts.append(torch.zeros(gap, dtype=torch.uint8, device=tensor.device))
                    found[name] = _Place(end + gap, tensor.dtype, tensor.shape)
                    parts.append(tensor.contiguous().flatten().view(torch.uint8))
                    end += gap + len(parts[-1])
        bare = tuple(s._replace(**found) for s, found in zip(self.samples, places, strict=True))
        return bare, torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _unpack(
    shard: str,
    start: int,
    total: int,
    bare: tuple[Any, ...],  # samples with places in place of tensors
    errors: tuple[SampleError, ...],
    buffer: Tensor,
) -> Batch:
    def read(place: _Place, *more: int) -> Tensor:
        size = math.prod((*more, *place.shape)) * place.dtype.itemsize
        part = buffer[place.start : place.start + size]
        return part.view(place.dtype).view(*more, *place.shape)

    samples = []
    for sample in bare:
        places = {n: p for n in _TENSORS if isinstance(p := getattr(sample, n), _Place)}
        samples.append(sample._replace(**{name: read(place) for name, place in places.items()}))
    first = [s.image for s in bare if isinstance(s.image, _Place)]
    images: Tensor | list[Tensor]
    if first and len({place.shape for place in first}) == 1:
        images = read(first[0], len(first))
    else:
        images = stack_alike([s.image for s in samples if isinstance(s.image, Tensor)])
    return Batch(shard, start, total, tuple(samples), errors, images, (bare, buffer))


def _tensors(sample: Sample) -> list[Tensor]:
    return [t for name in _TENSORS if isinstance(t := getattr(sample, name), Tensor)]


def stack_alike(images: list[Tensor]) -> Tensor | list[Tensor]:
    """Images [3,S,S'] as one tensor [B,3,S,S'] if they have one size, else as they are."""
    if not images:
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images
