"""Remote shards: each is fetched once a rank into a spool folder and dropped when all have read it."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from webdataset.gopen import gopen

from datamodules._tar import ShardError


def is_remote(url: str) -> bool:
    """Whether ``url`` must be fetched, or unpacked, before it can be read at random places."""
    return "://" in url or url.startswith("pipe:") or url.endswith((".gz", ".tgz"))


@dataclass(frozen=True)
class Spool:
    """A folder that the loader workers of one rank share.

    Args:
        folder: where shards lie while they are read.
        readers: how many workers read every shard; the last one to finish deletes it.
        retries: how often a failing fetch is tried again, waiting 1, 2, 4... seconds between.
    """

    folder: str
    readers: int
    retries: int = 3

    @contextmanager
    def local(self, url: str) -> Iterator[Path]:
        """Path of a local, seekable copy of the shard at ``url``.

        Raises:
            ShardError: it could not be fetched.
        """
        if not is_remote(url):
            yield Path(url.removeprefix("file:"))
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
        partial = Path(f"{path}.partial")
        for attempt in range(self.retries + 1):
            try:
                with gopen(url, "rb") as source, open(partial, "wb") as target:
                    packed = url.endswith((".gz", ".tgz"))
                    unpacked = gzip.GzipFile(fileobj=source) if packed else source
                    shutil.copyfileobj(unpacked, target, 1 << 20)
                partial.replace(path)
                return
            except Exception as error:  # every transport has its own
                if attempt == self.retries:
                    raise ShardError(
                        f"{url} could not be fetched in {self.retries + 1} tries: {error}"
                    ) from None
                time.sleep(2**attempt)
