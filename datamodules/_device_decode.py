"""JPEGs that are decoded and resized where the model is: by nvJPEG on a GPU, through TorchCodec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules._decode import open_image
from datamodules.samples import Batch, Encoded, SampleError, stack_alike


def load_decoder() -> Callable[..., Any]:
    """TorchCodec's JPEG decoder.

    Raises:
        ValueError: it is not installed, or too old.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, RuntimeError, OSError) as error:  # the last two: its libraries don't load
        raise ValueError(
            f"--data.decoder torchcodec needs TorchCodec 0.16 or newer ({str(error).splitlines()[0]}): "
            "pip install 'clip-surgery-lightning[gpu-decode]', or leave the decoder to be pillow"
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
    data = [image.data for image in batch.pending if isinstance(image, Encoded)]
    images: list[Any] = list(batch.pending)
    originals, errors = list(batch.originals), list(batch.errors)
    for i, found in zip(waiting, _decode(data, device, max_pixels), strict=True):
        if isinstance(found, Exception):
            errors.append(SampleError(batch.shard, batch.keys[i], str(found)[:500]))
            images[i] = None
            continue
        images[i] = _resize(found, images[i].size)
        if keep_originals:
            originals[i] = found
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


def _decode(
    files: Sequence[bytes], device: torch.device, max_pixels: int
) -> list[Tensor | Exception]:
    """uint8 [3,H,W] of each file on the device; what TorchCodec refuses is given to Pillow."""
    if not files:
        return []
    decode = load_decoder()
    where = device if device.type == "cuda" else torch.device("cpu")
    try:
        return [image.to(device) for image in decode(list(files), mode="RGB", device=where)]
    except RuntimeError:  # of one of them, or there are too many for the memory
        if len(files) > 1:
            return [found for file in files for found in _decode([file], device, max_pixels)]
    try:
        picture = open_image(files[0], max_pixels)
    except Exception as error:  # a stranger's bytes may break any decoder in any way
        return [error]
    return [torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(device)]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    pixels = F.interpolate(image[None].float(), size, mode="bicubic", antialias=True)
    return pixels[0].round_().clamp_(0, 255).to(torch.uint8)
