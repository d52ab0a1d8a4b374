"""The words that stand for classes: a data set's own, a published evaluation's, or the user's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from common.errors import InvalidSetting, MissingFile
from datamodules._samples import DatasetInfo, Wording


def read_names(names: list[str] | str | None) -> list[str] | None:
    """Class names: a list, a text file with one a line (``#`` begins a comment), or with commas between.

    Raises:
        MissingFile: ``names`` looks like a text file, and there is none.
    """
    if not isinstance(names, str):
        return names
    if os.path.isfile(names):
        text = Path(names).read_text(encoding="utf-8-sig")
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    elif names.endswith(".txt"):
        raise MissingFile(f"--data.names {names!r}: no such file in {os.getcwd()}")
    else:
        lines = names.split(",")
    return [line.strip() for line in lines if line.strip()]


def worded(
    info: DatasetInfo,
    names: list[str] | None,
    wordings: Mapping[str, Wording],
    synonyms: str,
    background: bool | None,
) -> DatasetInfo:
    """``info`` with the words that were asked for; see `ShardDataModule`.

    Where ``info`` has no classes, ``names`` become its classes.

    Raises:
        InvalidSetting: a wording that the data set doesn't have, or names that don't fit its classes.
    """
    if names and not info.classes:
        info = replace(info, classes=tuple(names))
    if names is not None and len(names) != len(info.classes):
        raise InvalidSetting(
            f"--data.names has {len(names)} names, but {info.name} has {len(info.classes)} classes: "
            f"give one a class, in the order of `lightning list datasets`"
        )
    if synonyms not in ("none", "raw", *wordings):
        known = ", ".join(("none", "raw", *wordings))
        raise InvalidSetting(f"--data.synonyms {synonyms!r}: {info.name} has {known}")
    if background and not info.zero_is_background:
        raise InvalidSetting(f"--data.background true: {info.name} has no background, only void")
    if synonyms in wordings:
        words, background_words = wordings[synonyms]
    else:
        prompts = info.classes if synonyms == "raw" else info.prompts
        words, background_words = tuple((prompt,) for prompt in prompts), info.background_words
    if names:
        words = tuple((name,) for name in names)
    if background is None:
        background = bool(info.background_words)
    background_words = (background_words or ("background",)) if background else ()
    several = background or any(len(w) > 1 for w in words)
    return replace(
        info,
        prompts=tuple(w[0] for w in words),
        background_words=background_words,
        synonyms=((background_words,) if background_words else ()) + words if several else (),
    )
