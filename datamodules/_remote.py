"""URLs of shards: which are remote, what of them is secret, and which nothing here opens."""

from __future__ import annotations

import re

from common.errors import InvalidSetting

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocols that need an extra of this package, and which."""

PACKED = (".gz", ".tgz")


def is_remote(url: str) -> bool:
    """Whether ``url`` is not a file of this machine."""
    return "://" in url or url.startswith("pipe:")


def needs_spool(url: str) -> bool:
    """Whether ``url`` must be fetched, or unpacked, before it can be read at random places."""
    return is_remote(url) or url.endswith(PACKED)


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
        raise InvalidSetting(f"{protocol}:// needs a package more: {how}") from None
    except ValueError:
        raise InvalidSetting(
            f"{without_query(url)}: nothing here opens {protocol}://; http(s), s3 and gs are usual"
        ) from None
