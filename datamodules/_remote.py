"""Remote shards: each is fetched once a rank into a spool folder and dropped when all have read it."""

from __future__ import annotations

import base64
import errno
import fcntl
import gzip
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit, urlunsplit

from filelock import FileLock

from common.errors import InvalidSetting
from datamodules._tar import ShardError, index_shard, said_by

log = logging.getLogger(__name__)

TIMEOUT = 60.0
MAX_SHARD_BYTES = 8 << 30
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocols that need an extra of this package, and which."""

_CHUNK = 1 << 16
_SIGN_OF_LIFE = 30.0  # seconds
_TRY_AGAIN = (408, 425, 429)  # of HTTP's 4xx, those that are not for ever
_PACKED = (".gz", ".tgz")
_PREFIX = "clip_surgery_shards_"
_OWNER = "owner.lock"


class _Hopeless(Exception):
    """A fetch that would fail again in the same way."""


def is_remote(url: str) -> bool:
    """Whether ``url`` is not a file of this machine."""
    return "://" in url or url.startswith("pipe:")


def needs_spool(url: str) -> bool:
    """Whether ``url`` must be fetched, or unpacked, before it can be read at random places."""
    return is_remote(url) or url.endswith(_PACKED)


def without_query(text: str) -> str:
    """A URL, or a text with URLs, without what may be secret in them: queries, names and passwords.

    What is stored or shown goes through this: the query of a presigned URL is its signature.
    """
    text = re.sub(r"(\w+://)[^\s/'\"@]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1", text)


def check_protocol(url: str) -> None:
    """Refuse a URL that nothing here can open, before anything is.

    Raises:
        InvalidSetting: its protocol is unknown, or needs a package that is not installed.
    """
    protocol = url.split("://")[0]
    if not is_remote(url) or url.startswith("pipe:") or protocol in ("http", "https"):
        return
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        how = f"pip install 'clip-surgery-lightning[{extra}]'" if extra else str(error)
        raise InvalidSetting(f"shards at {protocol}:// need a package more: {how}") from None
    except ValueError:
        raise InvalidSetting(
            f"{without_query(url)}: nothing here opens {protocol}://; http(s), s3 and gs are usual"
        ) from None


@dataclass(frozen=True)
class Spool:
    """A folder that the loader workers of one rank share.

    Attributes:
        folder: where shards lie while they are read.
        readers: how many workers read every shard; the last one to finish deletes it.
        timeout: seconds without a byte after which a fetch is given up.
        max_bytes: largest shard, fetched or unpacked.
        retries: how often a failing fetch is tried again, waiting 1, 2, 4... seconds between.
    """

    folder: str
    readers: int
    timeout: float = TIMEOUT
    max_bytes: int = MAX_SHARD_BYTES
    retries: int = 3

    @contextmanager
    def local(self, url: str) -> Iterator[Path]:
        """Path of a local, seekable copy of the shard at ``url``.

        Raises:
            ShardError: it could not be fetched.
        """
        if not needs_spool(url):
            yield Path(url)
            return
        path = Path(self.folder) / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}.tar"
        failure, count, lock = (
            Path(f"{path}.failed"),
            Path(f"{path}.count"),
            FileLock(f"{path}.lock"),
        )
        with lock:
            # A failure is kept: all workers must see the same shard, or they would lose count of
            # whose turn it is.
            if not path.exists() and not failure.exists():
                try:
                    self._fetch(url, path)
                except ShardError as error:
                    failure.write_text(str(error))
        try:
            if failure.exists():
                raise ShardError(failure.read_text())
            yield path
        finally:
            with lock:
                done = (int(count.read_text()) if count.exists() else 0) + 1
                count.write_text(str(done))
                if done >= self.readers:
                    path.unlink(missing_ok=True)

    def _fetch(self, url: str, path: Path) -> None:
        """Bring the shard at ``url`` to ``path``, which appears when it is complete.

        Raises:
            ShardError: it could not be fetched.
        """
        shown = without_query(url)
        for attempt in range(self.retries + 1):
            # Its own name each time: a stalled attempt may still hold the one before.
            partial = Path(f"{path}.{attempt}.partial")
            try:
                self._try(url, partial)
                partial.replace(path)
                return
            except _Hopeless as error:
                raise ShardError(f"{shown} could not be fetched: {error}") from None
            except Exception as error:  # every transport has its own
                reason = without_query(_reason(error))
            finally:
                partial.unlink(missing_ok=True)
            if attempt < self.retries:
                log.warning(
                    "%s: %s; trying again in %d s (%d of %d)",
                    *(shown, reason, 2**attempt, attempt + 1, self.retries),
                )
                time.sleep(2**attempt)
        raise ShardError(f"{shown} could not be fetched in {self.retries + 1} tries: {reason}")

    def _try(self, url: str, partial: Path) -> None:
        packed = urlsplit(url).path.endswith(_PACKED) and not url.startswith("pipe:")
        source, complete = Path(url), True
        try:
            if is_remote(url):
                source = Path(f"{partial}.packed") if packed else partial
                complete = self._receive(url, source)
            if packed:
                self._unpack(source, partial, complete)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _Hopeless(
                    f"no room in {tempfile.gettempdir()}, the folder for temporary files: set TMPDIR "
                    "to one on another disk"
                ) from None
            raise
        finally:
            if source not in (partial, Path(url)):
                source.unlink(missing_ok=True)
        if not complete:
            # Nobody said how long it is: only the tar itself tells whether this is all of it.
            index_shard(partial, "what came")

    def _receive(self, url: str, target: Path) -> bool:
        """Fetch ``url``; returns whether its length is known to be right.

        Raises:
            TimeoutError: nothing came for too long.
        """
        transfer = _Transfer(url, target, self.timeout)
        transfer.start()
        size, since = 0, time.monotonic()
        told = since
        while transfer.is_alive():
            transfer.join(1.0)
            now = time.monotonic()
            before, size = size, _size(target)
            if size != before:
                since = now
            if size > self.max_bytes:
                raise _too_large(self.max_bytes)
            if transfer.is_alive() and now - since > self.timeout:
                raise TimeoutError(f"nothing came for {self.timeout:g} s (--data.timeout)")
            if now - told > _SIGN_OF_LIFE:
                log.info("%s: still fetching, %d MB so far", without_query(url), size >> 20)
                told = now
        if transfer.error:
            raise transfer.error
        return transfer.complete

    def _unpack(self, source: Path, target: Path, complete: bool) -> None:
        try:
            with gzip.open(source) as packed, open(target, "wb") as plain:
                while chunk := packed.read(1 << 20):
                    if plain.tell() + len(chunk) > self.max_bytes:
                        raise _too_large(self.max_bytes)
                    plain.write(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            if complete:
                raise _Hopeless(f"can't be unpacked: {said_by(error)}") from None
            raise


class _Transfer(Thread):
    """Fetches one URL into a file; a thread, so that whoever waits for it can give up.

    Attributes:
        error: why it failed.
        complete: whether the source said how much there is, and all of it came.
    """

    def __init__(self, url: str, target: Path, timeout: float) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.target = target
        self.timeout = timeout
        self.error: Exception | None = None
        self.complete = False

    def run(self) -> None:
        """Fetch."""
        try:
            if self.url.startswith("pipe:"):
                self.complete = _from_command(self.url.removeprefix("pipe:"), self.target)
            elif self.url.startswith(("http://", "https://")):
                self.complete = _from_http(self.url, self.target, self.timeout)
            else:
                self.complete = _from_store(self.url, self.target)
        except Exception as error:  # every transport has its own
            self.error = error


def _from_http(url: str, target: Path, timeout: float) -> bool:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
    if at:
        login = base64.b64encode(unquote(user).encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        said = f"HTTP {error.code} {error.reason}"
        if error.code < 500 and error.code not in _TRY_AGAIN:
            raise _Hopeless(said) from None
        raise ConnectionError(said) from None
    with answer, open(target, "wb", buffering=0) as file:
        while chunk := answer.read1(_CHUNK):
            file.write(chunk)
        came, length = file.tell(), answer.headers.get("Content-Length")
        if length is not None and came != int(length):
            raise ConnectionError(f"broke off after {came} of {length} bytes")
        return length is not None or bool(answer.chunked)  # a chunked body has an end of its own


def _from_store(url: str, target: Path) -> bool:
    """By fsspec, which knows S3, Google's storage and many others."""
    from fsspec.core import url_to_fs

    try:
        store, path = url_to_fs(url)
        size = store.info(path).get("size")
        store.get_file(path, str(target))
    except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
        raise _Hopeless(without_query(f"{type(error).__name__}: {error}")) from None
    if size is not None and target.stat().st_size != size:
        raise ConnectionError(f"broke off after {target.stat().st_size} of {size} bytes")
    return size is not None


def _from_command(command: str, target: Path) -> bool:
    with open(target, "wb") as file:
        code = subprocess.run(command, shell=True, stdout=file, check=False).returncode
    if code:
        raise ConnectionError(f"the command ended with {code}")
    return True


def _size(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size
    return 0


def _too_large(limit: int) -> _Hopeless:
    return _Hopeless(
        f"it is, or unpacks to, more than {limit} bytes: raise --data.max_shard_bytes if it should"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, HTTPException):
        return "broke off before its end"
    if isinstance(error, ShardError | ConnectionError | TimeoutError) and error.args:
        return str(error.args[-1])
    return said_by(error)


class SpoolFolder:
    """A temporary folder that lives no longer than its process, even if that is killed.

    A killed process can't clear up; so each start clears what no living process owns. Owning is an
    open, locked file inside the folder: the system drops the lock with the last process that has it
    open, the owner or one of its loader workers.
    """

    def __init__(self) -> None:
        base = Path(tempfile.gettempdir())
        for abandoned in base.glob(f"{_PREFIX}*"):
            _clear(abandoned)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._lock = os.open(self.path / _OWNER, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / _OWNER).exists():
                return
            os.close(self._lock)  # another process took it for abandoned before it was locked

    def cleanup(self) -> None:
        """Delete the folder with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _clear(folder: Path) -> None:
    """Delete a spool folder if nobody owns it; another user's is left alone."""
    with suppress(OSError):
        lock = os.open(folder / _OWNER, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
