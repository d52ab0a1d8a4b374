"""Results to bytes: the same bytes for the same results."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class ImageResult(NamedTuple):
    """What a task says of one image; the run turns it into files.

    ``members``: file ending -> array (``*.npy``), label values uint8 [H,W] (``*.png``), or dict
    (``json``). ``overlays``: the same for pictures uint8 [H,W,3] (``*.jpg``) that are only drawn when
    the run wants them. ``rows``: table name -> this image's row in it, column -> value; the run
    makes one parquet file a table and shard, with the column ``key`` in front.
    """

    key: str
    members: dict[str, Any]
    overlays: Callable[[], dict[str, np.ndarray]] | None = None
    rows: dict[str, dict[str, Any]] | None = None


def encode(ending: str, value: Any, palette: list[int]) -> bytes:
    """Bytes of one result, by its file ending.

    Raises:
        ValueError: an ending that nothing is known of.
    """
    kind = ending.rsplit(".", 1)[-1]
    buffer = io.BytesIO()
    if kind == "png":
        image = Image.fromarray(value)
        if value.dtype == np.uint8:  # 16-bit label maps have no colours
            image.putpalette(palette)
        # Level 1 is several times faster than the default and hardly larger on flat masks.
        image.save(buffer, "PNG", compress_level=1)
    elif kind == "jpg":
        Image.fromarray(value).save(buffer, "JPEG", quality=90)
    elif kind == "npy":
        np.save(buffer, value, allow_pickle=False)
    elif kind == "json":
        return json.dumps(value, ensure_ascii=False).encode()
    elif kind == "txt":
        return str(value).encode()
    else:
        raise ValueError(f"don't know how to write {ending!r}")
    return buffer.getvalue()


def encode_table(rows: list[dict[str, Any]]) -> bytes:
    """A parquet file of rows, column -> value, all of the same columns."""
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
