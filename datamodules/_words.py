"""The words that stand for classes: a data set's own, a published evaluation's, or the user's.

Those of published evaluations lie in ``datamodules/words/DATASET/WORDING.txt``, each with its source.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from common.errors import InvalidSetting, MissingFile
from datamodules._samples import DatasetInfo, Wording

FOLDER = Path(__file__).parent / "words"


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


def packaged(name: str) -> dict[str, Path]:
    """Wordings of a data set that have a file: name -> path."""
    return {path.stem: path for path in sorted((FOLDER / name).glob("*.txt"))}


def read_wording(path: Path, info: DatasetInfo) -> Wording:
    """The words of a file: one class a line in the order of labels, with commas between its words.

    Where there is a line more than there are classes, the first is that of the background. A phrase with
    a comma in it stands in double quotes; ``#`` begins a comment.

    Raises:
        InvalidSetting: it has another number of lines, or one without a word.
    """
    text = path.read_text(encoding="utf-8-sig")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    words = [
        tuple(word.strip() for word in row if word.strip())
        for row in csv.reader(lines, skipinitialspace=True)
    ]
    count = len(info.classes)
    if len(words) not in (count, count + 1) or not all(words):
        raise InvalidSetting(
            f"{path} has words for {len(words)} classes, but {info.name} has {count}: give one line a "
            "class, in the order of `lightning list datasets`, led by one for the background if need be"
        )
    if len(words) == count:
        return Wording(tuple(words))
    return Wording(tuple(words[1:]), words[0])


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
    files = packaged(info.name)
    if synonyms.endswith(".txt") or os.path.isfile(synonyms):
        if not os.path.isfile(synonyms):
            raise MissingFile(f"--data.synonyms {synonyms!r}: no such file in {os.getcwd()}")
        files = {synonyms: Path(synonyms)}
    elif synonyms not in (known := ("none", "raw", *wordings, *files)):
        raise InvalidSetting(f"--data.synonyms {synonyms!r}: {info.name} has {', '.join(known)}")
    if background and not info.zero_is_background:
        raise InvalidSetting(f"--data.background true: {info.name} has no background, only void")
    if synonyms in wordings or synonyms in files:
        found = wordings.get(synonyms) or read_wording(files[synonyms], info)
        words, background_words = found
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
