"""Which source this is: a version says little between two releases."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_WINGS = ("common", "configs", "datamodules", "surgery", "tasks")
_KINDS = (".py", ".yaml", ".csv")


@cache
def source_digest() -> str:
    """Digest of all that decides a run's numbers here, files of code, of configs and of tables.

    ``lightning --version`` shows it, so that a checkout can be told to be the one of a ``run.json``.

    Returns:
        16 hex digits.
    """
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for wing in _WINGS:
        files = (path for path in (root / wing).rglob("*") if path.suffix in _KINDS)
        for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
