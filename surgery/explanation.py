"""What images show of some names: numbers, and pictures of them for a screen, a file or a notebook."""

import base64
import html
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import InvalidSetting
from surgery.features import similarity_map
from surgery.tokens import rank_tokens
from surgery.visualize import contact_sheet, heat_map

if TYPE_CHECKING:
    from PIL.Image import Image

WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of the pictures that `Explanation.save` writes."""

_IN_A_ROW = 6  # maps beside each other; more go on in the next row
_SHOWN = 240  # pixels: longer side of a panel in a notebook
_SCREENLESS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


@dataclass(frozen=True, repr=False, eq=False)
class MethodMaps:
    """What one method says of an image and T names.

    Attributes:
        maps: [T, H, W] in [0, 1].
        similarity: [h*w, T] on the token grid, before any scaling.
        points: for each name its points [K, 2] (x, y in pixels) and labels [K] (1 on it, 0 off it),
            prompts for SAM.
    """

    maps: Tensor
    similarity: Tensor
    points: tuple[tuple[Tensor, Tensor], ...]

    def __repr__(self) -> str:
        return f"MethodMaps(maps {list(self.maps.shape)}, similarity {list(self.similarity.shape)})"


@dataclass(frozen=True, repr=False, eq=False)
class Explanation:
    """What an image shows of T names; a notebook shows it as a picture.

    Attributes:
        image: uint8 [H, W, 3].
        names: T of them.
        scores: [T], cosine of the image's class token with each name.
        grid: (h, w).
        methods: name -> its maps, in the order asked for; those of the first are the explanation's
            own.
    """

    image: Tensor
    names: tuple[str, ...]
    scores: Tensor
    grid: tuple[int, int]
    methods: Mapping[str, MethodMaps]

    @property
    def maps(self) -> Tensor:
        """[T, H, W] in [0, 1], of the first method."""
        return self._first.maps

    @property
    def similarity(self) -> Tensor:
        """[h*w, T] on the token grid, of the first method."""
        return self._first.similarity

    @property
    def points(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """For each name its points [K, 2] and labels [K], of the first method."""
        return self._first.points

    @property
    def _first(self) -> MethodMaps:
        return next(iter(self.methods.values()))

    def overlays(self, method: str | None = None) -> Tensor:
        """The maps as heat over the image: uint8 [T, H, W, 3]; of the first method if none is named."""
        maps = self.maps if method is None else self.methods[method].maps
        return torch.stack([heat_map(self.image, values) for values in maps])

    def titles(self) -> tuple[str, ...]:
        """Name and score of each map."""
        return tuple(f"{n} {s:.3f}" for n, s in zip(self.names, self.scores, strict=True))

    def panels(self) -> list[list[tuple[str, Tensor]]]:
        """Rows of titled pictures uint8 [H, W, 3]: of each method the image, then its overlays."""
        rows = []
        for method in self.methods:
            cells = list(zip(self.titles(), self.overlays(method), strict=True))
            for start in range(0, len(cells), _IN_A_ROW):
                title = method if len(self.methods) > 1 else "image"
                rows.append([(title, self.image), *cells[start : start + _IN_A_ROW]])
        return rows

    def picture(self, largest: int | None = None) -> "Image":
        """The image and its overlays with their titles, a row a method.

        Args:
            largest: longer side of each panel in pixels; None: as large as the image is.
        """
        return contact_sheet(self.panels(), largest)

    def save(self, path: str | Path) -> Path:
        """Write the image and its overlays with their titles, a row a method.

        Args:
            path: where; its ending names the format, a PNG if it has none.

        Returns:
            Where it was written.

        Raises:
            InvalidSetting: the ending is that of no format that can be written, or the folder can't
                be written to.
        """
        path = Path(path)
        path = path if path.suffix else path.with_name(f"{path.name}.png")
        if path.suffix.lower() not in WRITTEN:
            raise InvalidSetting(f"{path}: a picture's ending is one of {', '.join(WRITTEN)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.picture().save(path)
        except OSError as error:
            raise InvalidSetting(f"{path} can't be written: {error}") from None
        return path

    def show(self) -> None:
        """Show the image and its overlays in a matplotlib figure; without a screen, say what to do."""
        try:
            from matplotlib import get_backend, pyplot
        except ImportError:
            raise ImportError(
                "show() draws with matplotlib, which is not installed: `pip install matplotlib`, "
                "or write a picture with save(path)"
            ) from None
        if get_backend().lower() in _SCREENLESS:
            warnings.warn(
                f"there is no screen to show a figure on (matplotlib's backend is {get_backend()}): "
                "save(path) writes the picture, and a notebook shows it where it is a cell's last line",
                stacklevel=2,
            )
            return
        rows = self.panels()
        columns = max(map(len, rows))
        size = (3 * columns, 3.2 * len(rows))
        figure, axes = pyplot.subplots(len(rows), columns, figsize=size, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for row, shown in zip(axes, rows, strict=True):
            for axis, (title, panel) in zip(row, shown, strict=False):
                axis.imshow(panel.numpy())
                axis.set_title(title)
        figure.tight_layout()
        pyplot.show()

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        what = f"{width}x{height}, {' and '.join(self.methods)}"
        return f"Explanation({what}: {', '.join(self.titles())})"

    def _repr_png_(self) -> bytes:
        # Of 256 colours: a notebook keeps this beside the HTML, for readers that show none.
        return _encoded(self.picture(_SHOWN).quantize(), "PNG")

    def _repr_html_(self) -> str:
        data = base64.b64encode(_encoded(self.picture(_SHOWN), "JPEG")).decode()
        said = html.escape(f"Heat maps over the image: {', '.join(self.titles())}", quote=True)
        return f'<img alt="{said}" style="max-width:100%" src="data:image/jpeg;base64,{data}">'


@dataclass(frozen=True, repr=False, eq=False)
class CaptionExplanation:
    """What an image shows of the L tokens of a caption, start and end included.

    Attributes:
        image: uint8 [H, W, 3].
        tokens: L of them, for people; see `surgery.tokens.readable`.
        truncated: whether the caption went on where the model stops reading.
        scores: [L], cosine of the image's class token with each token.
        grid: (h, w).
        similarity: [h*w, L] on the token grid, before any scaling.
    """

    image: Tensor
    tokens: tuple[str, ...]
    truncated: bool
    scores: Tensor
    grid: tuple[int, int]
    similarity: Tensor

    @property
    def order(self) -> list[int]:
        """Positions of the tokens, the best first."""
        return rank_tokens(self.scores).tolist()

    def map(self, position: int) -> Tensor:
        """[H, W] in [0, 1]: where the token at a position is."""
        height, width = self.image.shape[:2]
        column = self.similarity[None, :, position, None]
        return similarity_map(column, self.grid, (height, width))[0, 0]

    def __repr__(self) -> str:
        best = ", ".join(f"{self.tokens[i]} {self.scores[i]:.3f}" for i in self.order[:3])
        return f"CaptionExplanation({len(self.tokens)} tokens: {best})"


class Explanations(tuple[Explanation, ...]):
    """What several images show of the same names; a notebook shows one beneath the other."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Explanations({len(self)} images: {', '.join(self[0].names) if self else ''})"

    def _repr_html_(self) -> str:
        return "".join(f"<div>{explanation._repr_html_()}</div>" for explanation in self)


def _encoded(picture: "Image", kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=90)
    return buffer.getvalue()
