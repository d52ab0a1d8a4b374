"""JPEGs that are decoded and resized where the model is: by nvJPEG on a GPU, through TorchCodec."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from common.pictures import open_picture
from datamodules._decode import reason_of, to_tensor
from datamodules.samples import Batch, Encoded, SampleError, stack_alike

log = logging.getLogger(__name__)

_PIXELS_AT_ONCE = 1 << 25  # 100 MB of uint8, and four times that while one of them is resized


def load_decoder() -> Callable[..., Any]:
    """TorchCodec's JPEG decoder.

    Raises:
        ValueError: it is not installed, or too old.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, RuntimeError, OSError) as error:  # the last two: its libraries don't load
        raise InvalidSetting(
            "--data.decoder torchcodec needs TorchCodec 0.16 or newer, made for the torch that is "
            f"installed ({str(error)[:200]}): pip install 'clip-surgery-lightning[gpu-decode]', or "
            "leave the decoder to be pillow"
        ) from None
    decoder: Callable[..., Any] = decode_jpeg
    return decoder


def decode_pending(
    batch: Batch, device: torch.device, max_pixels: int, keep_originals: bool
) -> Batch:
    """The batch with all images decoded and resized, on ``device``; bad ones become errors.

    Resizing is bicubic and antialiased, in float32, rounded to uint8.
    """
    if not batch.pending:
        return batch
    waiting = [i for i, image in enumerate(batch.pending) if isinstance(image, Encoded)]
    images: list[Any] = list(batch.pending)
    originals, errors = list(batch.originals), list(batch.errors)
    for part in _in_parts(waiting, [height * width for height, width in batch.sizes]):
        found = _decode([images[i].data for i in part], device, max_pixels)
        for i, pixels in zip(part, found, strict=True):
            if isinstance(pixels, Exception):
                errors.append(SampleError(batch.shard, batch.keys[i], reason_of(pixels)))
                images[i] = None
                continue
            images[i] = _resize(pixels, images[i].size)
            if keep_originals:
                originals[i] = pixels
    kept = [i for i, image in enumerate(images) if image is not None]
    return batch._replace(
        keys=[batch.keys[i] for i in kept],
        images=stack_alike([images[i] for i in kept]),
        sizes=[batch.sizes[i] for i in kept],
        labels=[batch.labels[i] for i in kept],
        positives=[batch.positives[i] for i in kept],
        captions=[batch.captions[i] for i in kept],
        originals=[originals[i] for i in kept],
        errors=errors,
        pending=[],
    )


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
    try:
        return [image.to(device) for image in decode(list(files), mode="RGB", device=where)]
    except RuntimeError as error:
        reason = str(error)[:60]
    if len(files) > 1:  # one of them is bad
        return [found for file in files for found in _decode([file], device, max_pixels)]
    _warn_once(reason)
    try:
        return [to_tensor(open_picture(files[0], max_pixels)).to(device)]
    except Exception as error:  # a stranger's bytes may break any decoder in any way
        return [error]


@cache
def _warn_once(reason: str) -> None:
    log.warning("TorchCodec refused an image (%s); Pillow decodes such ones", reason)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    pixels = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)
    return pixels[0].round_().clamp_(0, 255).to(torch.uint8)
