"""``dataset.json``: what is said of the shards beside it, and whether they are all there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import InvalidSetting, MissingFile

NAME = "dataset.json"
UNFINISHED = "unfinished"
"""Key under which a conversion that has not come to its end says how much there will be."""


def read_dataset_json(folder: Path, *, half_made: bool = False) -> dict[str, Any]:
    """The description beside shards; empty if there is none, as with img2dataset's.

    Args:
        folder: where the shards are.
        half_made: also read that of a conversion which is under way or was broken off.

    Raises:
        InvalidSetting: it isn't valid.
        MissingFile: the data set is only half made.
    """
    path = folder / NAME
    if not path.exists():
        if not half_made and any(
            folder.glob("*.tar.json")
        ):  # what a conversion knows of its shards
            raise _half_made(folder, {})
        return {}
    try:
        described = json.loads(path.read_text())
        if not isinstance(described, dict):
            raise ValueError("it is not an object")
        for shard in described.get("shards", []):
            if not (isinstance(shard["name"], str) and isinstance(shard["samples"], int)):
                raise ValueError(f"a shard is described as {shard}"[:200])
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidSetting(
            f"{path} is not valid ({type(error).__name__}: {error}): convert the data set again"
        ) from None
    if UNFINISHED in described and not half_made:
        raise _half_made(folder, described)
    return described


def _half_made(folder: Path, described: dict[str, Any]) -> MissingFile:
    planned = described.get(UNFINISHED, {}).get("shards")
    there = len(list(folder.glob("*.tar")))
    count = f"{there} of {planned} shards are there" if planned else f"{there} shards, no {NAME}"
    return MissingFile(
        f"{folder} holds a data set that is only half made ({count}): run the command that makes it "
        "again to go on, wait for it if it is still running, or delete the folder"
    )
