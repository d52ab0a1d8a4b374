"""How many images are encoded at once: as many as fit the memory, or as were compiled for."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_NO_MEMORY = (
    # What cuBLAS and cuDNN say of memory that they could not get is a plain RuntimeError.
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or of the host, was not enough."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


class Batches:
    """Cuts batches into parts that fit; what it learns holds for all that follows.

    A part that finds no memory is tried again with half as many images, and no later part is
    larger than that.

    Attributes:
        limit: most images at once; None: no limit is known.
        fixed: every part has exactly `limit` images, the last one filled up, as a compiled network
            wants them.
    """

    def __init__(self, limit: int | None = None, *, fixed: bool = False) -> None:
        if fixed and limit is None:
            raise ValueError("a fixed number of images at once needs a limit")
        self.limit, self.fixed = limit, fixed

    def run(self, encode: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> list[Tensor]:
        """Encode images part by part.

        Args:
            encode: from images [b, ...] to tensors of b rows each.
            images: [B, ...], on the device.

        Returns:
            What `encode` returns, for all B images.

        Raises:
            torch.OutOfMemoryError, RuntimeError: not even one image fits.
        """
        parts: list[Sequence[Tensor]] = []
        done = 0
        while done < len(images) or not parts:
            size = self.limit or max(len(images), 1)
            part = images[done : done + size]
            found = self._try(encode, part, size)
            if found is not None:
                parts.append(found)
                done += len(part)
        if len(parts) == 1:
            return list(parts[0])
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def _try(
        self, encode: Callable[[Tensor], Sequence[Tensor]], part: Tensor, size: int
    ) -> Sequence[Tensor] | None:
        """The part's tensors; None, and a lower limit, where it found no memory."""
        count = len(part)
        at_once = size if self.fixed else count
        try:
            if not self.fixed or not count:
                return encode(part)
            # Also where nothing is missing: views and own tensors would be compiled apart.
            full = torch.cat([part, part[-1:].expand(size - count, *part.shape[1:])])
            return [tensor[:count] for tensor in encode(full)]
        except RuntimeError as error:
            if at_once <= 1 or not is_out_of_memory(error):
                raise
        log.warning("out of memory with %d images at once: encoding them in halves", at_once)
        self.limit = at_once // 2 if self.fixed else (at_once + 1) // 2
        return None


@cache
def compiled(encode: Callable[..., Any]) -> Callable[..., Any]:
    """A function through `torch.compile`, for inputs of fixed shapes."""
    function: Callable[..., Any] = torch.compile(encode, dynamic=False)
    return function
