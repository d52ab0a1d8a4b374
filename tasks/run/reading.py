"""The images of a published shard, read back from a tar or a folder."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from datamodules._samples import DatasetInfo
from tasks.run.errors import RunError
from tasks.run.image import StoredImage
from tasks.run.place import is_folder, local_copy
from tasks.run.shard import STATE, ShardRecord
from tasks.run.stored import Stored, decode_table

_TABLE = ".parquet"


def read_images(path: Path, info: DatasetInfo) -> Iterator[StoredImage]:
    """The images of a shard, in its order.

    Args:
        path: of the published shard.
        info: the data set.

    Raises:
        RunError: it is damaged.
    """
    try:
        stored = _in_folder(path) if is_folder(path) else _in_tar(path)
        tables = next(stored)[1]
        rows = {name.removesuffix(_TABLE): decode_table(data) for name, data in tables.items()}
        for key, files in stored:
            record: dict[str, Any] = json.loads(files["json"])
            own = {table: found[key] for table, found in rows.items() if key in found}
            yield StoredImage(key, Stored(key, record, files, own, info))
    except (OSError, KeyError, ValueError, tarfile.TarError) as error:
        raise RunError(f"{path} can't be read ({error!r}): delete it and run again") from None


_Files = tuple[str, Mapping[str, bytes]]


def _in_tar(path: Path) -> Iterator[_Files]:
    """(key, ending -> bytes): first the tables, then the images."""
    with local_copy(path) as copy, tarfile.open(copy) as tar:

        def read(member: tarfile.TarInfo) -> bytes:
            file = tar.extractfile(member)
            if file is None:
                raise ValueError(f"{member.name} is no file")
            return file.read()

        members = [member for member in tar.getmembers() if member.isreg()]
        yield (
            "",
            {Path(m.name).name: read(m) for m in members if m.name.endswith(_TABLE)},
        )
        images = (m for m in members if not m.name.startswith(f"{STATE}/"))
        for key, group in groupby(images, lambda member: _split(member.name)[0]):
            yield key, {_split(member.name)[1]: read(member) for member in group}


def _in_folder(path: Path) -> Iterator[_Files]:
    """The same of a folder; its record knows the order of the images."""
    yield "", {file.name: file.read_bytes() for file in (path / STATE).glob(f"*{_TABLE}")}
    for key in ShardRecord.load(path).keys:
        place = path / key
        files = sorted(place.parent.glob(f"{place.name}.*"))
        yield key, {_split(file.name)[1]: file.read_bytes() for file in files}


def _split(name: str) -> tuple[str, str]:
    """Key and ending: a key ends at the first dot of its last part."""
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending
