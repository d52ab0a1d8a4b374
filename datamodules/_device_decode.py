"""JPEGs that are decoded and resized where the model is: by nvJPEG on a GPU, through TorchCodec."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from common.errors import InvalidSetting
from common.pictures import open_picture
from datamodules._decode import reason_of, to_tensor
from datamodules._resize import opencv_bilinear
from datamodules._samples import Batch, Encoded, Sample, SampleError

log = logging.getLogger(__name__)

OLDEST = "0.17"
"""Of TorchCodec; older ones decode while the GPU still writes to the same memory."""

_DEVICE_FAULTS = (
    "CUDA error",
    "CUDA out of memory",
    "NVJPEG_STATUS_ALLOCATOR_FAILURE",
    "NVJPEG_STATUS_EXECUTION_FAILED",
    "NVJPEG_STATUS_INTERNAL_ERROR",
    "NVJPEG_STATUS_ARCH_MISMATCH",
)

_PIXELS_AT_ONCE = 1 << 25  # 100 MB of uint8, and four times that while one of them is resized


def load_decoder() -> Callable[..., Any]:
    """TorchCodec's JPEG decoder.

    Raises:
        InvalidSetting: it is not installed, or too old.
    """
    try:
        from torchcodec.decoders import decode_jpeg

        if Version(version("torchcodec")) < Version(OLDEST):
            raise ImportError(f"it is {version('torchcodec')}")
    except (ImportError, RuntimeError, OSError) as error:  # the last two: its libraries don't load
        raise InvalidSetting(
            f"--data.decoder torchcodec needs TorchCodec {OLDEST} or newer, made for the torch that is "
            f"installed ({str(error)[:200]}): pip install 'clip-surgery-lightning[gpu-decode]', or "
            "leave the decoder to be pillow"
        ) from None
    decoder: Callable[..., Any] = decode_jpeg
    return decoder


def decode_pending(
    batch: Batch, device: torch.device, max_pixels: int, keep_originals: bool
) -> Batch:
    """The batch with all images decoded and resized, on ``device``; bad ones become errors.

    Resizing is bicubic and antialiased, in float32, rounded to uint8; or as OpenCV does it.

    Raises:
        RuntimeError: the device failed, which is no fault of the images.
    """
    samples: list[Sample | None] = list(batch.samples)
    waiting = {i: s.image for i, s in enumerate(batch.samples) if isinstance(s.image, Encoded)}
    if not waiting:
        return batch
    errors = list(batch.errors)
    for part in _in_parts(waiting, [s.size[0] * s.size[1] for s in batch.samples]):
        found = _decode([waiting[i].data for i in part], device, max_pixels)
        for i, pixels in zip(part, found, strict=True):
            sample = batch.samples[i]
            if isinstance(pixels, Exception):
                errors.append(SampleError(batch.shard, sample.key, reason_of(pixels)))
                samples[i] = None
                continue
            samples[i] = sample._replace(
                image=_resize(pixels, waiting[i]),
                original=pixels if keep_originals else sample.original,
            )
    kept = [sample for sample in samples if sample is not None]
    return Batch.collate(batch.shard, batch.start, batch.total, kept, errors)


def _in_parts(indices: Iterable[int], pixels: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive indices of images that are decoded at once, unresized: bounds the memory."""
    part: list[int] = []
    for i in indices:
        if part and sum(pixels[j] for j in [*part, i]) > _PIXELS_AT_ONCE:
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def _decode(
    files: Sequence[bytes], device: torch.device, max_pixels: int
) -> list[Tensor | Exception]:
    """uint8 [3,H,W] of each file on the device; what TorchCodec refuses is given to Pillow."""
    decode = load_decoder()
    where = device if device.type == "cuda" else torch.device("cpu")  # there is no other
    if where.type == "cuda":
        # The decoder of newer GPUs is hardware of its own, which doesn't wait for what is queued.
        torch.cuda.current_stream(where).synchronize()
    try:
        return [image.to(device) for image in decode(list(files), mode="RGB", device=where)]
    except RuntimeError as error:
        if len(files) == 1 and is_devices_fault(error):
            raise
        reason = str(error)[:60]
    if len(files) > 1:  # one of them is bad, or all are too much at once
        return [found for file in files for found in _decode([file], device, max_pixels)]
    _warn_once(reason)
    try:
        pixels = to_tensor(open_picture(files[0], max_pixels))
    except Exception as error:  # a stranger's bytes may break any decoder in any way
        return [error]
    return [pixels.to(device)]


def is_devices_fault(error: RuntimeError) -> bool:
    """Whether a GPU failed, out of memory or broken, rather than refused an image."""
    kinds = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    return isinstance(error, kinds) or any(sign in str(error) for sign in _DEVICE_FAULTS)


@cache
def _warn_once(reason: str) -> None:
    log.warning("TorchCodec refused an image (%s); Pillow decodes such ones", reason)


def _resize(image: Tensor, wanted: Encoded) -> Tensor:
    if wanted.opencv:
        return opencv_bilinear(image, wanted.size)
    pixels = F.interpolate(image[None].float(), wanted.size, mode="bicubic", antialias=True)
    return pixels[0].round_().clamp_(0, 255).to(torch.uint8)
