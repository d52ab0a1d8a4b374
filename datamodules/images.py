"""One's own images: a folder, a pattern, single files, or a tar; no labels, any words."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from common.errors import InvalidSetting, MissingFile
from common.pictures import ENDINGS
from datamodules._contents import describe_file, describe_group
from datamodules._datamodule import ShardDataModule
from datamodules._decode import Decoder
from datamodules._remote import check_protocol, is_remote, without_query
from datamodules._samples import DatasetInfo
from datamodules._shards import ShardStream, name_shards
from datamodules._spool import Spool
from datamodules._tar import MAX_KEY, TARS, Entry, Span

log = logging.getLogger(__name__)

NOT_READ = tuple(
    f".{ending}"
    for ending in (
        *("heic", "heif", "jxl", "svg", "psd", "xcf", "tga", "ico", "eps", "ps", "pdf"),
        *(
            "jp2",
            "j2k",
            "ppm",
            "pgm",
            "jfif",
            "jpe",
            "raw",
            "dng",
            "cr2",
            "cr3",
            "nef",
            "arw",
            "orf",
        ),
    )
)
"""Endings of pictures that are not looked for in a folder; there they are counted, and said."""

INFO = DatasetInfo(name="images", labels="none")


class Picture(NamedTuple):
    """An image file, and its path below what was asked for, which its key is made of."""

    file: Path
    below: Path


class Images(ShardDataModule):
    """Own images and own words; needs no labels and no conversion.

    Loose files are read in groups, which take the place of shards: a run's results come in one file
    a group, and a run that was stopped goes on with the groups that are missing.

    Args:
        path: a folder (with its sub-folders), a pattern in quotes ("photos/*.jpg"), a file, a tar of
            images, or a list of these.
        group: images a group.
        **kwargs: of every DataModule.
    """

    info = INFO

    def __init__(self, path: str | list[str], group: int = 200, **kwargs: Any) -> None:
        if group < 1:
            raise InvalidSetting(f"--data.group must be at least 1, got {group}")
        super().__init__(shards=path, **kwargs)
        self.group = group

    @cached_property
    def found(self) -> tuple[dict[str, list[Entry]], list[str]]:
        """The groups of loose files by name, and the tars."""
        specs = [self.shards] if isinstance(self.shards, str) else self.shards
        pictures, tars = find_images(specs)
        entries = as_entries(pictures)
        starts = range(0, len(entries), self.group)
        return {f"images-{i // self.group:05d}": entries[i : i + self.group] for i in starts}, tars

    def lacking(self, need: str) -> str:
        """How to give what a task needs."""
        if need == "classes":
            return (
                'say what to look for with --data.names "[cat, remote control]", or '
                "--data.names FILE.txt with one name a line"
            )
        return "own images come without it"

    def shard_list(self) -> list[tuple[str, str]]:
        """(name, name or path) of all groups and tars."""
        groups, tars = self.found
        return [(name, name) for name in groups] + name_shards(tars)

    def sample_counts(self) -> dict[str, int]:
        """Images in each group; those of tars are not known."""
        return {name: len(entries) for name, entries in self.found[0].items()}

    def contents(self) -> dict[str, dict[str, Any]]:
        """What tells whether a group, or a tar, is still the same, by name."""
        groups, tars = self.found
        found: dict[str, dict[str, Any]] = {}
        for name, entries in groups.items():
            spans = [(entry.key, span) for entry in entries for span in entry.members.values()]
            with suppress(OSError):
                found[name] = describe_group((key, Path(span.path)) for key, span in spans)
        for name, url in name_shards(tars):
            if not is_remote(url):
                with suppress(OSError):
                    found[name] = describe_file(Path(url))
        return found

    def stream(self, decoder: Decoder, spool: Spool) -> ShardStream:
        """Batches of the groups and tars."""
        return FileStream(self.batch_size, decoder, spool, self.found[0])


class FileStream(ShardStream):
    """A `ShardStream` in which some shards are groups of loose files, by name."""

    def __init__(
        self, batch_size: int, decoder: Decoder, spool: Spool, groups: dict[str, list[Entry]]
    ) -> None:
        super().__init__(batch_size, decoder, spool)
        self.groups = {name: groups[name] for name, _ in spool.shards if name in groups}

    @contextmanager
    def _entries(self, url: str) -> Iterator[list[Entry]]:
        if url in self.groups:
            yield self.groups[url]
        else:
            with super()._entries(url) as entries:
                yield entries


def find_images(specs: Sequence[str]) -> tuple[list[Picture], list[str]]:
    """The image files, and the tars, that ``specs`` stand for; each file once.

    A folder gives its images and those of its sub-folders, in order of their paths; if it holds none
    but tars, it gives those. Hidden files are left alone.

    Raises:
        MissingFile: nothing is found for one of ``specs``.
    """
    pictures: dict[Path, Picture] = {}
    tars: list[str] = []
    for spec in specs:
        before = len(pictures) + len(tars)
        if is_remote(spec) and not without_query(spec).endswith(TARS):
            raise InvalidSetting(
                f"--data.path {without_query(spec)}: of other machines, only tars are read"
            )
        check_protocol(spec)
        for name in [spec] if os.path.exists(spec) or is_remote(spec) else sorted(glob(spec)):
            found = Path(name)
            if without_query(name).endswith(TARS):
                tars.append(name)
            elif not found.is_dir():
                pictures.setdefault(found, Picture(found, Path(found.name)))
            else:
                inside = [Picture(file, file.relative_to(found)) for file in walk(found)]
                images = [p for p in inside if p.file.suffix[1:].lower() in ENDINGS]
                _say_what_is_left_out(name, [p.file for p in inside])
                for picture in images:
                    pictures.setdefault(picture.file, picture)
                if not images:
                    tars += [str(p.file) for p in inside if p.file.name.endswith(TARS)]
        if len(pictures) + len(tars) == before and not os.path.isfile(spec):
            raise MissingFile(
                f"no images at {spec!r} (seen from {os.getcwd()}): give a folder, a pattern in quotes, "
                f"a file or a tar with --data.path; known endings: {', '.join(ENDINGS)}"
            )
    return list(pictures.values()), list(dict.fromkeys(tars))


@rank_zero_only
def _say_what_is_left_out(folder: str, files: Sequence[Path]) -> None:
    counts = Counter(file.suffix.lower() for file in files)
    left_out = [f"{counts[ending]} {ending}" for ending in NOT_READ if counts[ending]]
    if left_out:
        log.warning(
            "pictures in %s that are left out: %s; these kinds are not read, convert them to JPEG or PNG",
            *(folder, ", ".join(left_out)),
        )


def walk(folder: Path) -> Iterator[Path]:
    """All files below ``folder`` that are not hidden, in order of their paths."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    yield from sorted(found, key=lambda path: path.parts)


def as_entries(pictures: Sequence[Picture]) -> list[Entry]:
    """Samples of one member each, with keys that are unique and can be file names anywhere."""
    entries: list[Entry] = []
    taken: set[str] = set()
    for file, below in pictures:
        key = stem = make_key(below.with_suffix(""))
        if key.casefold() in taken:
            key = stem = make_key(below)
        number = 2
        while key.casefold() in taken:
            key, number = f"{stem}_{number}", number + 1
        taken.add(key.casefold())
        ending = file.suffix[1:].lower()
        span = Span(str(file), 0, file.stat().st_size)
        # Any other ending is taken for an image too: it was asked for by its name.
        entries.append(Entry(key, {ending if ending in ENDINGS else "jpg": span}))
    return entries


def make_key(path: Path) -> str:
    """A relative path as a key: letters, digits, ``-``, ``_`` and ``/``, of bounded length."""

    def plain(part: str) -> str:
        text = "".join(c if c.isalnum() or c == "-" else "_" for c in part)
        return text.strip("_") or "image"

    key = "/".join(plain(part) for part in path.parts)
    longest = MAX_KEY - 40  # room for a number, and for the endings of the results
    if len(key.encode()) <= longest:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{key.encode()[: longest - 17].decode('utf-8', 'ignore').rstrip('/')}-{digest}"
