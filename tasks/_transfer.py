"""Between host and device: few copies and few operations, since each of them costs by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datamodules._samples import Sample

_NUMBERS_AT_ONCE = 1 << 25
"""Of pixels times maps in a group: 128 MiB of float32, of which a few are held at a time."""


def alike(samples: Sequence[Sample], maps: Sequence[int], device: torch.device) -> list[list[int]]:
    """Which samples are worked on together: those of one size, and of one kind of label.

    On a GPU, starting an operation takes longer than most operations do. A CPU takes each sample by
    itself, in order: so they stay in its cache, and have the digits that they have alone.

    Args:
        samples: of a batch.
        maps: how many of its size are made of each.
        device: of the work.

    Returns:
        Indices of the samples of each group.
    """
    if device.type == "cpu":
        return [[i] for i in range(len(samples))]
    groups: dict[object, list[list[int]]] = {}
    held: dict[object, int] = {}
    for i, sample in enumerate(samples):
        kind = None if sample.label is None else sample.label.ndim
        shape = sample.image.shape if isinstance(sample.image, Tensor) else None
        key = (sample.size, kind, shape)
        numbers = maps[i] * sample.size[0] * sample.size[1]
        if key not in groups or held[key] + numbers > _NUMBERS_AT_ONCE:
            groups.setdefault(key, []).append([])
            held[key] = 0
        held[key] += numbers
        groups[key][-1].append(i)
    return [group for found in groups.values() for group in found]


def send(values: Tensor | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A tensor of the host, or rows of integers as int64, on a device; the host does not wait."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory, it would
    return tensor.to(device, non_blocking=True)


def fetch(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Tensors, all of one device, as arrays of the host; by one copy, for which it waits."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    # Wide types first: then each lies where its type may.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    flat = [tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]
    ends = np.cumsum([len(part) for part in flat])[:-1]
    found: list[np.ndarray] = [np.empty(0)] * len(tensors)
    for i, data in zip(order, np.split(torch.cat(flat).cpu().numpy(), ends), strict=True):
        dtype = torch.empty(0, dtype=tensors[i].dtype).numpy().dtype
        found[i] = data.view(dtype).reshape(tensors[i].shape)
    return found
