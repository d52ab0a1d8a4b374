"""Results to bytes, and bytes to disk: atomic, with the same bytes for the same results."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


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


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file that is either the old or the new one at any moment."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    partial.replace(path)
