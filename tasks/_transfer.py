"""Between host and device: few copies and few operations, since each of them costs by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from datamodules._samples import Sample
from surgery.devices import send
from surgery.enlarging import largest

T = TypeVar("T")

_NUMBERS_AT_ONCE = 1 << 25
"""Of pixels times maps in a group: 128 MiB of float32, of which a few are held at a time."""


@dataclass(frozen=True)
class Group:
    """Samples of a batch that are worked on together.

    Attributes:
        samples: their indices in the batch.
        sizes: (height, width) of each.
    """

    samples: list[int]
    sizes: list[tuple[int, int]]

    def __iter__(self) -> Iterator[int]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def groups_of(samples: Sequence[Sample], maps: Sequence[int], device: torch.device) -> list[Group]:
    """Which samples are worked on together: all of a batch, as far as memory and their kinds allow.

    On a GPU, starting an operation takes longer than most operations do; so images of different sizes
    share a canvas of the largest, of which at most half is left empty. A CPU takes each sample by
    itself, in order: so they stay in its cache, and have the digits that they have alone.

    Args:
        samples: of a batch.
        maps: how many of its size are made of each.
        device: of the work.

    Returns:
        The groups.
    """
    if device.type == "cpu":
        return [Group([i], [sample.size]) for i, sample in enumerate(samples)]
    kinds: dict[object, list[int]] = {}
    for i, sample in enumerate(samples):
        label = None if sample.label is None else sample.label.ndim
        shape = sample.image.shape if isinstance(sample.image, Tensor) else None
        kinds.setdefault((label, shape), []).append(i)
    groups: list[Group] = []
    for alike in kinds.values():
        group = Group([], [])
        filled = held = 0
        for i in sorted(alike, key=lambda i: (max(samples[i].size), samples[i].size, i)):
            size, count = samples[i].size, max(maps[i], 1)
            height, width = largest([*group.sizes, size])
            filled, held = filled + count * size[0] * size[1], held + count
            whole = held * height * width
            if not group.samples or whole > min(_NUMBERS_AT_ONCE, 2 * filled):
                groups.append(group := Group([], []))
                filled, held = count * size[0] * size[1], count
            group.samples.append(i)
            group.sizes.append(size)
    return groups


def send_rows(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of integers as int64 on a device; the host does not wait."""
    return send(torch.tensor(rows, dtype=torch.int64), device)


class Copy:
    """Tensors of one device on their way to the host: by one copy, which nobody waits for.

    Args:
        tensors: not written to any more.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._event: torch.cuda.Event | None = None
        if not tensors or tensors[0].device.type == "cpu":
            return
        # Wide types first: then each lies where its type may.
        order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
        flat = torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in order])
        if flat.device.type == "cuda":
            host = torch.empty(flat.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(flat, non_blocking=True)
            self._event = torch.cuda.Event(blocking=True)
            self._event.record()
        else:
            host = flat.cpu()
        sizes = [tensors[i].numel() * tensors[i].element_size() for i in order]
        for i, data in zip(order, host.split(sizes), strict=True):
            self._tensors[i] = data.view(tensors[i].dtype).view(tensors[i].shape)

    def tensors(self) -> list[Tensor]:
        """The tensors on the host; waits for them."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._tensors

    def arrays(self) -> list[np.ndarray]:
        """The same as arrays."""
        return [tensor.numpy() for tensor in self.tensors()]


class Later(Sequence[T]):
    """Items that are made when the first of them is asked for: by then, a `Copy` has come.

    Args:
        count: how many there will be.
        make: makes them.
    """

    def __init__(self, count: int, make: Callable[[], Sequence[T]]) -> None:
        self._count = count
        self._make: Callable[[], Sequence[T]] | None = make
        self._made: Sequence[T] = ()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made[index]


def bring(states: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin to copy tensors to the host; what is returned waits for them."""
    copy = Copy(list(states.values()))
    return lambda: dict(zip(states, copy.tensors(), strict=True))
