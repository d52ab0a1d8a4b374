"""Official archives fetched and unpacked: resumed where they broke off, checked, kept in their folder."""

from __future__ import annotations

import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from common.errors import UserError
from common.files import file_digest

RETRIES = 5
CHUNK = 1 << 20


class DownloadError(UserError):
    """A file can't be fetched or is not what it should be; the message says which and why."""


@dataclass(frozen=True)
class Archive:
    """A file that may be downloaded without registering.

    Attributes:
        url: where it is.
        checksum: ``md5:...`` or ``sha1:...`` where one is published.
        into: folder below ``--source`` that it is unpacked to; a file that is no archive is put there.
        splits: the splits that need it; all if empty.
    """

    url: str
    checksum: str = ""
    into: str = ""
    splits: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rsplit("/", 1)[-1]


def download(archives: Iterable[Archive], folder: Path, split: str = "") -> None:
    """Fetch and unpack what ``split`` needs into ``folder``; what is there already is not done again.

    The archives stay in ``folder/downloads`` and may be deleted afterwards.

    Raises:
        DownloadError: a file can't be fetched, differs from its checksum, or can't be unpacked.
    """
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        if archive.splits and split and split not in archive.splits:
            continue
        done = downloads / f"{archive.name}.done"
        if done.exists():
            continue
        file = fetch(archive, downloads)
        unpack(file, folder / archive.into)
        done.touch()


def fetch(archive: Archive, downloads: Path) -> Path:
    """The file of ``archive`` in ``downloads``, under its name only when it is complete.

    Raises:
        DownloadError: it can't be fetched, or differs from its checksum.
    """
    target = downloads / archive.name
    if target.exists():
        return target
    partial = downloads / f"{archive.name}.partial"
    for attempt in range(RETRIES + 1):
        try:
            append_rest(archive.url, partial)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == RETRIES:
                raise DownloadError(f"{archive.url} can't be fetched: {error}") from None
        except (OSError, HTTPException) as error:
            if attempt == RETRIES:
                raise DownloadError(
                    f"{archive.url} broke off {RETRIES + 1} times ({error}): run again to go on from "
                    f"{partial.stat().st_size if partial.exists() else 0} bytes"
                ) from None
        time.sleep(2**attempt / 4)
    kind, _, wanted = archive.checksum.partition(":")
    if wanted and (found := file_digest(partial, kind)) != wanted:
        partial.unlink()
        raise DownloadError(f"{archive.url} has {kind} {found}, published is {wanted}: run again")
    partial.replace(target)
    return target


def append_rest(url: str, partial: Path) -> None:
    """Fetch what ``partial`` lacks; a server that can't resume sends all of it again.

    Raises:
        OSError: the connection failed or ended early.
    """
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{start}":
            return  # nothing is lacking
        if error.code == 416:
            partial.unlink()
            raise OSError("the file changed meanwhile") from None
        raise
    with answer:
        start = start if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            open(partial, "ab" if start else "wb") as file,
            tqdm(
                desc=partial.name.removesuffix(".partial"),
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                disable=None,
                file=sys.stderr,
            ) as bar,
        ):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and partial.stat().st_size != total:
        raise OSError(f"{partial.stat().st_size} of {total} bytes came")


def unpack(file: Path, folder: Path) -> None:
    """Unpack a zip or tar into ``folder``, nothing outside it; another file is copied there.

    Raises:
        DownloadError: it is broken, or has members that would land outside ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as packed:
                for member in packed.namelist():
                    path = PurePosixPath(member.replace("\\", "/"))
                    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                        raise DownloadError(f"{file} has the unsafe member {member!r}")
                packed.extractall(folder)
        elif tarfile.is_tarfile(file):
            with tarfile.open(file) as bundle:
                bundle.extractall(folder, filter="data")
        else:
            shutil.copyfile(file, folder / file.name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DownloadError(
            f"{file} can't be unpacked ({error}): delete it and run again"
        ) from None
