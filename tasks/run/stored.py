"""What is stored of one image, and how arrays and tables become files and are read again."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datamodules._samples import DatasetInfo

Files = dict[str, np.ndarray]
"""File ending -> array: label values [H,W] (``*.png``), numbers (``*.npy``), RGB (``*.jpg``)."""


@dataclass(frozen=True)
class Stored:
    """What is stored of one image: its json, the bytes of its other files, its rows in the tables."""

    key: str
    record: Mapping[str, Any]
    files: Mapping[str, bytes]
    rows: Mapping[str, Mapping[str, Any]]
    info: DatasetInfo

    def array(self, ending: str) -> np.ndarray:
        """A ``*.png`` or ``*.npy`` as it was given to be written."""
        stream = io.BytesIO(self.files[ending])
        if ending.endswith(".npy"):
            numbers: np.ndarray = np.load(stream, allow_pickle=False)
            return numbers
        with Image.open(stream, formats=("PNG",)) as image:
            return np.asarray(image)

    @property
    def methods(self) -> list[str]:
        """Names of the explanation methods that say something of the image."""
        return list(self.record.get("methods", ()))

    def of(self, method: str) -> Stored:
        """What is stored of one of them, under the names that it has where there is only one."""
        outer = {name: value for name, value in self.record.items() if name != "methods"}
        prefix = f"{method}."
        files = {k.removeprefix(prefix): v for k, v in self.files.items() if k.startswith(prefix)}
        record = {**outer, **self.record["methods"][method]}
        return replace(self, record=record, files=files)


def slug(name: str) -> str:
    """A class name as part of a file name.

    Example:
        >>> slug("Remote control (TV)")
        'remote-control-tv'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "class"


def encode(ending: str, array: np.ndarray, palette: list[int]) -> bytes:
    """Bytes of a file, by its ending.

    Raises:
        ValueError: an ending that nothing is known of.
    """
    kind = ending.rsplit(".", 1)[-1]
    buffer = io.BytesIO()
    if kind == "png":
        image = Image.fromarray(array)
        if array.dtype == np.uint8:  # 16-bit label maps have no colours
            image.putpalette(palette)
        # Level 1 is several times faster than the default and hardly larger on flat masks.
        image.save(buffer, "PNG", compress_level=1)
    elif kind == "jpg":
        Image.fromarray(array).save(buffer, "JPEG", quality=90)
    elif kind == "npy":
        np.save(buffer, array, allow_pickle=False)
    else:
        raise ValueError(f"don't know how to write {ending!r}")
    return buffer.getvalue()


class Row(NamedTuple):
    """An image's row in a table, without its key.

    Attributes:
        names: of the columns.
        values: one a column; an array where all columns are of its type.
    """

    names: Sequence[str]
    values: Sequence[Any] | np.ndarray


class ColumnTable:
    """A table that gets row after row and becomes columns.

    Args:
        names: of the columns; ``key`` comes before them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.keys: list[str] = []
        self.rows: list[Sequence[Any] | np.ndarray] = []

    def add(self, key: str, values: Sequence[Any] | np.ndarray) -> None:
        """Add an image's row."""
        self.keys.append(key)
        self.rows.append(values)

    def encode(self) -> bytes:
        """A parquet file of the table."""
        import pyarrow
        from pyarrow import parquet

        columns: Iterable[Any] = zip(*self.rows, strict=True)
        if isinstance(self.rows[0], np.ndarray):
            columns = np.ascontiguousarray(np.stack(self.rows, axis=1))
        arrays = [self.keys, *(c if isinstance(c, np.ndarray) else list(c) for c in columns)]
        table = pyarrow.table([pyarrow.array(a) for a in arrays], ["key", *self.names])
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd")
        return sink.getvalue().to_pybytes()


def decode_table(data: bytes) -> dict[str, dict[str, Any]]:
    """Key -> row of a parquet file that a `ColumnTable` made."""
    import pyarrow
    from pyarrow import parquet

    rows = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    return {row["key"]: row for row in rows}
