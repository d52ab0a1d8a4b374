"""Pictures opened, in one way for all: the bytes of a file, or what Pillow opened, to upright RGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000")
"""What is opened, by Pillow's names: what data sets use. Others can run programs (EPS), or hang."""
ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "avif")
"""Endings of picture files, in the order in which one is chosen where a sample has several."""

_EXIF_ORIENTATION = 0x0112
_END_OF_JPEG = b"\xff\xd9"
_NO_PICTURES = {
    # Known by their first bytes, to be named; Pillow knows none of these, or only with plugins.
    "a PDF": (b"%PDF",),
    "an SVG": (b"<svg", b"<?xml"),
    "an HEIC": tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"mif1", b"msf1", b"hevc")),
    "a video": (b"ftypisom", b"ftypmp4", b"ftypqt"),
    "a web page": (b"<!DOCTYPE html", b"<!doctype html", b"<html"),
}

# Pillow's own limit would refuse what a raised max_pixels allows; ours is checked before anything is
# unpacked.
Image.MAX_IMAGE_PIXELS = None


class BadPicture(Exception):
    """A picture that can't be used; the message says why, in words that are the same every time."""


def open_picture(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    *,
    formats: tuple[str, ...] = FORMATS,
    stored_size: tuple[int, ...] | None = None,
) -> Image.Image:
    """Upright RGB picture, from the bytes of a file; the first of its pages or frames.

    See `upright_rgb` for the arguments.

    Raises:
        BadPicture: not a picture of these formats, more than ``max_pixels`` pixels, or values that
            are no numbers.
        OSError: it is cut off; and whatever else broken bytes make Pillow raise.
    """
    return upright_rgb(identify(data, max_pixels, formats), stored_size=stored_size)


def identify(data: bytes, max_pixels: int, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The picture in the bytes of a file, of which nothing but the header is read yet.

    Raises:
        BadPicture: not a picture of these ``formats``, or more than ``max_pixels`` pixels.
    """
    if not data:
        raise BadPicture("the image file is empty")
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise BadPicture(_what_it_is(data[:64], formats)) from None
    _check_pixels(picture, max_pixels)
    return picture


def _check_pixels(picture: Image.Image, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise BadPicture(
            f"the picture claims {picture.width}x{picture.height} pixels, more than "
            f"max_pixels {max_pixels}"
        )


def upright_rgb(picture: Image.Image, *, stored_size: tuple[int, ...] | None = None) -> Image.Image:
    """A picture of any mode as upright RGB, as a viewer would show it.

    EXIF orientation is applied, transparency laid on white, 16-bit gray scaled to 8 bits.

    Args:
        picture: as Pillow opened it.
        stored_size: (height, width) of what was drawn on the picture, such as its label map; where
            it was drawn on the picture as it is stored, orientation is not applied.

    Raises:
        BadPicture: it holds values that are no numbers.
        OSError: it is cut off.
    """
    picture.load()
    turned = picture.getexif().get(_EXIF_ORIENTATION, 1) != 1
    if turned and stored_size != (picture.height, picture.width):
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float64)
        if not np.isfinite(values).all():
            raise BadPicture("its pixels are not finite numbers (NaN or infinite)")
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        picture = Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def size_if_plain(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(height, width) of an upright, complete JPEG in gray or YCbCr; None for any other file.

    What decoders disagree about (CMYK, stored rotation, an end that is missing) is Pillow's.

    Raises:
        BadPicture: more than ``max_pixels`` pixels.
    """
    if not data.startswith(b"\xff\xd8") or not data.rstrip(b"\0").endswith(_END_OF_JPEG):
        return None
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG",))
    except UnidentifiedImageError:
        return None
    _check_pixels(picture, max_pixels)
    plain = picture.mode == "L" or (
        picture.mode == "RGB" and picture.info.get("adobe_transform", 1) == 1
    )
    upright = picture.getexif().get(_EXIF_ORIENTATION, 1) == 1
    return (picture.height, picture.width) if plain and upright else None


def _what_it_is(head: bytes, formats: tuple[str, ...]) -> str:
    """Why the file that begins with ``head`` wasn't opened."""
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        try:
            known = accepts is not None and accepts(head) is True
        except Exception:
            continue
        if known and name in formats:
            return f"a broken {name} file"
        if known:
            return f"it is of the format {name}, which is not opened (but {', '.join(formats)})"
    for name, marks in _NO_PICTURES.items():
        if any(head.startswith(mark) or head[4:].startswith(mark) for mark in marks):
            return f"it is {name} file, which is not opened (but {', '.join(formats)})"
    return "not a picture of a known format"
