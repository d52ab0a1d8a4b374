"""Fetches one shard of another machine, or unpacks one of this; what may pass is tried again."""

from __future__ import annotations

import base64
import errno
import gzip
import logging
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from datamodules._remote import PACKED, is_remote, without_query
from datamodules._tar import ShardError, index_shard, said_by

log = logging.getLogger(__name__)

TIMEOUT = 60.0
MAX_SHARD_BYTES = 8 << 30

_CHUNK = 1 << 16
_LOOK = 0.1  # seconds between two looks at a transfer
_SIGN_OF_LIFE = 30.0  # seconds
_TRY_AGAIN = (408, 425, 429)  # of HTTP's 4xx, those that are not for ever


class NoRoom(ShardError):
    """The disk is full."""


class FetchStopped(Exception):
    """Nobody wants the shard any more."""


class _Hopeless(Exception):
    """A fetch that would fail again in the same way."""


@dataclass(frozen=True)
class Limits:
    """When a fetch is given up.

    Attributes:
        timeout: seconds without a byte after which a try has failed.
        max_bytes: largest shard, fetched or unpacked.
        retries: how often a failing fetch is tried again, waiting 1, 2, 4... seconds between.
    """

    timeout: float = TIMEOUT
    max_bytes: int = MAX_SHARD_BYTES
    retries: int = 3


def fetch(url: str, path: Path, limits: Limits | None = None, stop: Event | None = None) -> None:
    """Bring the shard at ``url`` to ``path``, which appears when it is complete.

    Args:
        url: a remote or packed shard.
        path: where its plain tar shall be.
        limits: when to give up.
        stop: ends the fetch once it is set.

    Raises:
        ShardError: it could not be fetched.
        NoRoom: the disk is full.
        FetchStopped: ``stop`` was set.
    """
    _Fetch(url, limits or Limits(), stop or Event()).to(path)


@dataclass(frozen=True)
class _Fetch:
    """All tries to fetch one shard."""

    url: str
    limits: Limits
    stop: Event

    def to(self, path: Path) -> None:
        shown, retries = without_query(self.url), self.limits.retries
        for attempt in range(retries + 1):
            # Its own name each time: a stalled attempt may still hold the one before.
            partial = Path(f"{path}.{attempt}.partial")
            try:
                self._try(partial)
                partial.replace(path)
                return
            except _Hopeless as error:
                raise ShardError(f"{shown} could not be fetched: {error}") from None
            except NoRoom as error:
                raise NoRoom(f"{shown} could not be fetched: {error}") from None
            except FetchStopped:
                raise
            except Exception as error:  # every transport has its own
                reason = without_query(_reason(error))
            finally:
                partial.unlink(missing_ok=True)
            if attempt < retries:
                log.warning(
                    "%s: %s; trying again in %d s (%d of %d)",
                    *(shown, reason, 2**attempt, attempt + 1, retries),
                )
                _pause(self.stop, 2**attempt)
                self._go_on()
        raise ShardError(f"{shown} could not be fetched in {retries + 1} tries: {reason}")

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise FetchStopped

    def _try(self, partial: Path) -> None:
        url = self.url
        packed = urlsplit(url).path.endswith(PACKED) and not url.startswith("pipe:")
        source, complete = Path(url), True
        try:
            if is_remote(url):
                source = Path(f"{partial}.packed") if packed else partial
                complete = self._receive(source)
            if packed:
                self._unpack(source, partial, complete)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoRoom(
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

    def _receive(self, target: Path) -> bool:
        """Fetch; returns whether the length is known to be right.

        Raises:
            TimeoutError: nothing came for too long.
        """
        transfer = _Transfer(self.url, target, self.limits.timeout)
        transfer.start()
        try:
            self._follow(transfer)
        finally:
            transfer.unwanted.set()
        if transfer.error:
            raise transfer.error
        return transfer.complete

    def _follow(self, transfer: _Transfer) -> None:
        size, since = 0, time.monotonic()
        told, alive = since, True
        while alive:
            transfer.join(_LOOK)
            self._go_on()
            now, alive = time.monotonic(), transfer.is_alive()
            before, size = size, _size(transfer.target)
            if size != before:
                since = now
            if size > self.limits.max_bytes:
                raise _too_large(self.limits.max_bytes)
            if alive and now - since > self.limits.timeout:
                raise TimeoutError(f"nothing came for {self.limits.timeout:g} s (--data.timeout)")
            if now - told > _SIGN_OF_LIFE:
                log.info("%s: still fetching, %d MB so far", without_query(self.url), size >> 20)
                told = now

    def _unpack(self, source: Path, target: Path, complete: bool) -> None:
        try:
            with gzip.open(source) as packed, open(target, "wb") as plain:
                while chunk := packed.read(1 << 20):
                    self._go_on()
                    if plain.tell() + len(chunk) > self.limits.max_bytes:
                        raise _too_large(self.limits.max_bytes)
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
        unwanted: set by whoever has given up on it.
    """

    def __init__(self, url: str, target: Path, timeout: float) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.target = target
        self.timeout = timeout
        self.error: Exception | None = None
        self.complete = False
        self.unwanted = Event()

    def run(self) -> None:
        """Fetch."""
        try:
            if self.url.startswith("pipe:"):
                self.complete = _from_command(
                    self.url.removeprefix("pipe:"), self.target, self.unwanted
                )
            elif self.url.startswith(("http://", "https://")):
                self.complete = _from_http(self.url, self.target, self.timeout, self.unwanted)
            else:
                self.complete = _from_store(self.url, self.target, self.unwanted)
        except Exception as error:  # every transport has its own
            self.error = error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Tells a password to no other server."""

    def redirect_request(self, req: urllib.request.Request, *more: Any) -> Any:
        following = super().redirect_request(req, *more)
        if following and following.host != req.host:
            following.remove_header("Authorization")
        return following


def _from_http(url: str, target: Path, timeout: float, unwanted: Event) -> bool:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
    if at:
        login = base64.b64encode(unquote(user).encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    try:
        answer = urllib.request.build_opener(_Redirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        said = f"HTTP {error.code} {error.reason}"
        if error.code < 500 and error.code not in _TRY_AGAIN:
            raise _Hopeless(said) from None
        raise ConnectionError(said) from None
    with answer:
        if unwanted.is_set():
            return False
        with open(target, "wb", buffering=0) as file:
            while not unwanted.is_set() and (chunk := answer.read1(_CHUNK)):
                file.write(chunk)
            came = file.tell()
        length = answer.headers.get("Content-Length")
        if length is not None and came != int(length):
            raise ConnectionError(f"broke off after {came} of {length} bytes")
        return length is not None or bool(answer.chunked)  # a chunked body has an end of its own


def _from_store(url: str, target: Path, unwanted: Event) -> bool:
    """By fsspec, which knows S3, Google's storage and many others."""
    from fsspec.callbacks import Callback
    from fsspec.core import url_to_fs

    class Followed(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            if unwanted.is_set():
                raise FetchStopped

    try:
        store, path = url_to_fs(url)
        size = store.info(path).get("size")
        if unwanted.is_set():
            return False
        store.get_file(path, str(target), callback=Followed())
    except (FileNotFoundError, PermissionError, ImportError, ValueError) as error:
        raise _Hopeless(without_query(f"{type(error).__name__}: {error}")) from None
    if size is not None and target.stat().st_size != size:
        raise ConnectionError(f"broke off after {target.stat().st_size} of {size} bytes")
    return size is not None


def _from_command(command: str, target: Path, unwanted: Event) -> bool:
    with open(target, "wb") as file:
        # A group of its own, so that all that the shell starts can be ended.
        process = subprocess.Popen(command, shell=True, stdout=file, start_new_session=True)
    while process.poll() is None:
        if unwanted.wait(_LOOK / 10):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise ConnectionError(f"the command ended with {process.returncode}")
    return True


def _pause(stop: Event, seconds: float) -> None:
    stop.wait(seconds)


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
