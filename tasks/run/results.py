"""What a task can say of an image: a small set of typed results, and the files that each becomes.

Every type says which files it is written as, what it adds to the image's json and to the shard's
tables, and how it is read back; file names are known nowhere else; encodings: `tasks.run.stored`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules._samples import VOID, DatasetInfo
from tasks.run.stored import Files, Row, Stored, slug


class Result(ABC):
    """One thing that a task says of an image."""

    def files(self, info: DatasetInfo) -> Files:
        """What is written as files of its own."""
        return {}

    def record(self, key: str) -> dict[str, Any]:
        """What it adds to the image's json."""
        return {}

    def rows(self) -> dict[str, Row]:
        """Table -> the image's row in it."""
        return {}

    @classmethod
    @abstractmethod
    def read(cls, stored: Stored) -> Result | None:
        """Read back; None where the image has no such result."""


@dataclass(frozen=True)
class Facts(Result):
    """What goes to the image's json and nowhere else; reading gives the whole json."""

    values: Mapping[str, Any]

    def record(self, key: str) -> dict[str, Any]:
        """The facts."""
        return dict(self.values)

    @classmethod
    def read(cls, stored: Stored) -> Facts:
        """The image's json."""
        return cls(stored.record)


@dataclass(frozen=True)
class LabelMap(Result):
    """Which class each pixel is.

    Attributes:
        values: label values [H,W], uint8 or uint16.
        shares: name -> share of the pixels, of classes that have any.
    """

    values: np.ndarray
    shares: Mapping[str, float]

    def files(self, info: DatasetInfo) -> Files:
        """Named as label maps are named in input shards, so that the output can be read as one."""
        return {"label.png": self.values}

    def record(self, key: str) -> dict[str, Any]:
        """The shares, and the size (height, width)."""
        return {"labels": dict(self.shares), "size": list(self.values.shape)}

    @classmethod
    def read(cls, stored: Stored) -> LabelMap | None:
        """The label map."""
        if "label.png" not in stored.files:
            return None
        return cls(stored.array("label.png"), stored.record["labels"])


@dataclass(frozen=True)
class Masks(Result):
    """One mask a class, or a word.

    Attributes:
        names: of the P classes, or words.
        numbers: their class indices, or places.
        masks: bool [P,H,W].
        words: whether they are words, and no classes of the data set.
    """

    names: Sequence[str]
    numbers: Sequence[int]
    masks: np.ndarray
    words: bool = False

    def endings(self) -> list[str]:
        """The file of each."""
        return [
            f"mask.{number:03d}-{slug(name)}.png"
            for number, name in zip(self.numbers, self.names, strict=True)
        ]

    def files(self, info: DatasetInfo) -> Files:
        """Each in the colour of its class, on what is no class."""
        return {
            ending: _label_values(mask, number, info, self.words)
            for ending, number, mask in zip(self.endings(), self.numbers, self.masks, strict=True)
        }

    def record(self, key: str) -> dict[str, Any]:
        """Name -> file."""
        listed = dict(zip(self.names, self.endings(), strict=True))
        return {"words" if self.words else "labels": listed}

    @classmethod
    def read(cls, stored: Stored) -> Masks | None:
        """The masks, where each has a file."""
        words = "words" in stored.record
        listed = stored.record.get("words" if words else "labels")
        if not isinstance(listed, dict) or any(
            file not in stored.files for file in listed.values()
        ):
            return None
        return cls.read_listed(stored, listed, words=words)

    @classmethod
    def read_listed(cls, stored: Stored, listed: Mapping[str, str], *, words: bool) -> Masks:
        """The masks in ``listed``, name -> file."""
        numbers = [int(file.split(".")[1].split("-")[0]) for file in listed.values()]
        outside = 0 if words or stored.info.zero_is_background else stored.info.void
        masks = [stored.array(file) != outside for file in listed.values()]
        size = (0, *stored.record.get("size", (0, 0)))
        return cls(list(listed), numbers, np.stack(masks) if masks else np.zeros(size, bool), words)


def _label_values(mask: np.ndarray, number: int, info: DatasetInfo, words: bool) -> np.ndarray:
    """A mask bool [H,W] as label values."""
    if words:
        return np.where(mask, np.uint8(VOID), np.uint8(0))  # the one value with a colour always
    inside = info.label_type(info.label_value(number))
    # Without a background, 0 is a class: whatever is not of this one is void.
    outside = info.label_type(0 if info.zero_is_background else info.void)
    return np.where(mask, inside, outside)


@dataclass(frozen=True)
class Similarities(Result):
    """Similarities of texts and patches on the token grid, signed.

    Attributes:
        values: [T,h,w]; stored in their own precision.
        single: one text's alone, stored without the first dimension.
    """

    values: np.ndarray
    single: bool = False

    def files(self, info: DatasetInfo) -> Files:
        """``scores.npy`` [T,h,w], or ``map.npy`` [h,w] of a single text."""
        return {"map.npy": self.values[0]} if self.single else {"scores.npy": self.values}

    def record(self, key: str) -> dict[str, Any]:
        """The grid (h, w)."""
        return {"grid": list(self.values.shape[-2:])}

    @classmethod
    def read(cls, stored: Stored) -> Similarities | None:
        """The similarities."""
        if "map.npy" in stored.files:
            return cls(stored.array("map.npy")[None], single=True)
        return cls(stored.array("scores.npy")) if "scores.npy" in stored.files else None


_SCORES = "scores"


@dataclass(frozen=True)
class Scores(Result):
    """How much the image shows each class, scored several ways.

    Attributes:
        names: of the K classes.
        ways: way of scoring -> float32 [K]; the first one, "", is the task's own.
    """

    names: Sequence[str]
    ways: Mapping[str, np.ndarray]

    def rows(self) -> dict[str, Row]:
        """One table a way, with a column a class."""
        return {
            f"{_SCORES}_{way}".rstrip("_"): Row(self.names, values)
            for way, values in self.ways.items()
        }

    @classmethod
    def read(cls, stored: Stored) -> Scores | None:
        """The scores."""
        tables = {name: row for name, row in stored.rows.items() if name.startswith(_SCORES)}
        if not tables:
            return None
        rows = {
            name.removeprefix(_SCORES).lstrip("_"): {k: v for k, v in row.items() if k != "key"}
            for name, row in tables.items()
        }
        names = list(next(iter(rows.values())))
        return cls(names, {way: np.array([*row.values()], np.float32) for way, row in rows.items()})


@dataclass(frozen=True)
class Points(Result):
    """Prompt points of each text, and the masks that a segmenter made of them.

    Attributes:
        size: (height, width) of the image, in whose pixels points are.
        points: name -> points [K] of (x, y).
        labels: name -> [K], 1 for positive and 0 for negative points.
        masks: one a name, if there are any.
        scores: what the segmenter thinks of each mask.
    """

    size: tuple[int, int]
    points: Mapping[str, list[list[int]]]
    labels: Mapping[str, list[int]]
    masks: Masks | None = None
    scores: Sequence[float] = ()

    def files(self, info: DatasetInfo) -> Files:
        """The masks."""
        return self.masks.files(info) if self.masks else {}

    def record(self, key: str) -> dict[str, Any]:
        """Points, labels, mask and score of each text, and the size."""
        texts: dict[str, dict[str, Any]] = {
            name: {"points": self.points[name], "labels": self.labels[name]} for name in self.points
        }
        if self.masks:
            for name, file, score in zip(
                self.masks.names, self.masks.endings(), self.scores, strict=True
            ):
                texts[name] |= {"mask": file, "score": round(score, 6)}
        return {"texts": texts, "size": list(self.size)}

    @classmethod
    def read(cls, stored: Stored) -> Points | None:
        """The points, and the masks."""
        texts = stored.record.get("texts")
        if texts is None:
            return None
        listed = {name: entry["mask"] for name, entry in texts.items() if "mask" in entry}
        words = "words" in stored.record
        height, width = stored.record["size"]
        return cls(
            (height, width),
            {name: entry["points"] for name, entry in texts.items()},
            {name: entry["labels"] for name, entry in texts.items()},
            Masks.read_listed(stored, listed, words=words) if listed else None,
            [texts[name]["score"] for name in listed],
        )


@dataclass(frozen=True)
class Tokens(Result):
    """The tokens of a caption, by how well each fits the image.

    Attributes:
        caption: of the image.
        truncated: whether it was longer than the text tower reads.
        tokens: readable pieces.
        scores: cosine of each with the image.
        ranks: of each, from 1.
    """

    caption: str
    truncated: bool
    tokens: Sequence[str]
    scores: Sequence[float]
    ranks: Sequence[int]

    @property
    def best(self) -> str:
        """The token that fits best."""
        return self.tokens[self.ranks.index(1)]

    def rows(self) -> dict[str, Row]:
        """All of it in one row."""
        return {"tokens": Row(tuple(vars(self)), tuple(vars(self).values()))}

    def record(self, key: str) -> dict[str, Any]:
        """All of it, and the best token."""
        return {"key": key, **vars(self), "best": self.best}

    @classmethod
    def read(cls, stored: Stored) -> Tokens | None:
        """The tokens; None for an image without a caption."""
        if "tokens" not in stored.record:
            return None
        return cls(**{name: stored.record[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class ByMethod(Result):
    """What each of some explanation methods says of the image.

    Attributes:
        results: method -> its results, `Masks`, `Similarities` or `Points`.
    """

    results: Mapping[str, tuple[Result, ...]]

    def files(self, info: DatasetInfo) -> Files:
        """All files, led by the method's name: ``surgery.scores.npy``."""
        return {
            f"{method}.{ending}": array
            for method, results in self.results.items()
            for result in results
            for ending, array in result.files(info).items()
        }

    def record(self, key: str) -> dict[str, Any]:
        """What each adds; the files in it go without the method's name."""
        return {
            "methods": {
                method: {k: v for result in results for k, v in result.record(key).items()}
                for method, results in self.results.items()
            }
        }

    @classmethod
    def read(cls, stored: Stored) -> ByMethod | None:
        """All results of all methods."""
        if not stored.methods:
            return None
        read = {
            method: [kind.read(stored.of(method)) for kind in (Masks, Similarities, Points)]
            for method in stored.methods
        }
        return cls({m: tuple(r for r in results if r is not None) for m, results in read.items()})


KINDS: tuple[type[Result], ...] = (
    Facts,
    ByMethod,
    LabelMap,
    Masks,
    Similarities,
    Scores,
    Points,
    Tokens,
)
"""All there are."""
