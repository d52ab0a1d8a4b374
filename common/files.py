"""Files written so that they are whole or not there, and the small encodings that all wings share."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_OPEN_FILES = (
    1 << 16
)  # far more than a run needs; some programs walk through all that they may have


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file that is either the old or the new one at any moment, whoever else writes it too."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def raise_open_files() -> None:
    """Let this process, and those that it starts, have as many open files as it may allow itself.

    Each batch that waits in shared memory is one, and so is each connection to a loader worker.
    """
    with suppress(ImportError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with suppress(OSError, ValueError):  # some systems allow less than they say
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def file_digest(path: str | Path, kind: str = "sha256") -> str:
    """Checksum of a file, in hex; of a kind that `hashlib` knows."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def finite(value: Any) -> Any:
    """``value`` (of dicts, lists and numbers) with NaN as None: JSON knows no NaN.

    Example:
        >>> finite({"mIoU": float("nan"), "images": 3})
        {'mIoU': None, 'images': 3}
    """
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if is_nan(value) else value


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as csv.

    Example:
        >>> print(csv_text(["class", "IoU"], [["cat", 0.5]]), end="")
        class,IoU
        cat,0.5
    """
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    return buffer.getvalue()


def is_nan(value: Any) -> bool:
    """Whether ``value`` is a number that is none."""
    return isinstance(value, float) and math.isnan(value)
