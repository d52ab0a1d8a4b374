"""All that a task says of one image: as it is written to a run, and as it is read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from datamodules._samples import DatasetInfo
from tasks.run.results import KINDS, Result
from tasks.run.stored import Files, Row, Stored, encode

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class ImageResult:
    """What a task says of one image.

    Attributes:
        key: of the sample.
        results: what it says, in the order in which they stand in the image's json.
        draw: makes pictures, file ending -> uint8 [H,W,3]; only given where the run wants some, as
            it keeps all that it needs in memory.
    """

    key: str
    results: tuple[Result, ...] = ()
    draw: Callable[[], Files] | None = field(default=None, repr=False)

    def record(self) -> dict[str, Any]:
        """The image's json."""
        return {k: v for result in self.results for k, v in result.record(self.key).items()}

    def encode(self, info: DatasetInfo) -> dict[str, bytes]:
        """All files of the image: ending -> bytes."""
        arrays = {k: v for result in self.results for k, v in result.files(info).items()}
        arrays |= self.draw() if self.draw else {}
        palette = info.flat_palette()
        return {
            "json": json.dumps(self.record(), ensure_ascii=False).encode(),
            **{ending: encode(ending, array, palette) for ending, array in arrays.items()},
        }

    def rows(self) -> dict[str, Row]:
        """Table -> the image's row in it."""
        return {table: row for result in self.results for table, row in result.rows().items()}


@dataclass(frozen=True)
class StoredImage:
    """One image's results, read back from a run; each is decoded when it is asked for."""

    key: str
    stored: Stored = field(repr=False)

    @property
    def record(self) -> Mapping[str, Any]:
        """The image's json."""
        return self.stored.record

    @property
    def results(self) -> tuple[Result, ...]:
        """All results."""
        results = (kind.read(self.stored) for kind in KINDS)
        return tuple(result for result in results if result is not None)

    @property
    def methods(self) -> list[str]:
        """Names of the explanation methods that say something of the image; often there are none."""
        return self.stored.methods

    def get(self, kind: type[R], method: str | None = None) -> R | None:
        """The result of one type, such as `Masks`; None if there is none.

        Args:
            kind: the type.
            method: whose result; by default the first one's, where there are methods.

        Raises:
            KeyError: no such method.
        """
        result = kind.read(self.stored) if method is None else None
        if result is None and self.methods:
            result = kind.read(self.stored.of(method or self.methods[0]))
        assert result is None or isinstance(result, kind)
        return result

    @property
    def pictures(self) -> dict[str, bytes]:
        """The pictures that were drawn, file ending -> JPEG."""
        return {k: v for k, v in self.stored.files.items() if k.endswith(".jpg")}
