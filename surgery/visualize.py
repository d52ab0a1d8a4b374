"""Heat maps over images, and pictures of several; only colour maps other than jet need matplotlib."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.errors import InvalidSetting
from common.nearest import nearest

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALLEST = 160  # pixels: shorter side of a panel, so that there is room for its title


def jet(values: Tensor) -> Tensor:
    """Colours of values in [0, 1] from blue over green and yellow to red: uint8 [..., 3].

    Example:
        >>> jet(torch.tensor([0.0, 0.5, 1.0])).tolist()
        [[0, 0, 128], [128, 255, 128], [128, 0, 0]]
    """
    # Each channel is a trapezoid, centred on 3/4 (red), 1/2 (green) and 1/4 (blue).
    centres = torch.tensor([0.75, 0.5, 0.25], device=values.device)
    colours = 1.5 - 4 * (values.float()[..., None].clamp(0, 1) - centres).abs()
    return colours.clamp(0, 1).mul(255).round().to(torch.uint8)


def colours(values: Tensor, colour_map: str = "jet") -> Tensor:
    """Colours of values in [0, 1]: uint8 [..., 3].

    Args:
        values: of any shape.
        colour_map: ``jet``, or any other of matplotlib's by its name, such as ``viridis`` or
            ``cividis``, which the colour-blind can read.

    Raises:
        InvalidSetting: matplotlib doesn't know it, or is not installed.
    """
    if colour_map == "jet":
        return jet(values)
    try:
        from matplotlib import colormaps
    except ImportError:
        raise InvalidSetting(
            f"the colour map {colour_map!r} is matplotlib's, which is not installed: "
            "`pip install 'clip-surgery-lightning[plots]'`, or take jet"
        ) from None
    if colour_map not in colormaps:
        near = ", ".join(nearest(colour_map, colormaps, 3) or ["viridis", "cividis", "jet"])
        raise InvalidSetting(f"no colour map {colour_map!r}; did you mean {near}?")
    steps = torch.linspace(0, 1, 256, dtype=torch.float32)  # numpy has no bfloat16
    table = colormaps[colour_map](steps.numpy(), bytes=True)[:, :3]
    cells = values.float().clamp(0, 1).mul(255).round().long()
    return torch.from_numpy(table.copy()).to(values.device)[cells]


def heat_map(
    image: Tensor, values: Tensor, *, opacity: float = 0.6, colour_map: str = "jet"
) -> Tensor:
    """A similarity map laid over its image.

    Args:
        image: uint8 [H, W, 3].
        values: [H, W] in [0, 1].
        opacity: share of the colours in [0, 1].
        colour_map: see `colours`.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: the image is of another type or size.
    """
    if image.dtype != torch.uint8 or image.shape != (*values.shape, 3):
        raise ValueError(
            f"expected an image uint8 [{', '.join(map(str, values.shape))}, 3], "
            f"given {image.dtype} {list(image.shape)}"
        )
    mixed = image.float().lerp(colours(values, colour_map).float(), opacity)
    return mixed.round().to(torch.uint8)


def contact_sheet(
    rows: Sequence[Sequence[tuple[str, Tensor]]], largest: int | None = None
) -> "Image":
    """Panels with their titles above them, on white.

    Args:
        rows: titles and pictures uint8 [H, W, 3], all of one size; rows may differ in length.
        largest: longer side of a panel in pixels; None: its own. Small ones are enlarged by a whole
            number.

    Returns:
        The picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = rows[0][0][1].shape[:2]
    scale: float = max(1, -(-_SMALLEST // min(height, width)))
    if largest is not None:
        scale = largest / max(height, width)
    width, height = max(1, round(scale * width)), max(1, round(scale * height))
    letters = max(12, width // 20)
    head = round(1.7 * letters)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * width, len(rows) * (head + height)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = i * (head + height)
        for j, (title, pixels) in enumerate(row):
            panel = Image.fromarray(pixels.cpu().numpy())
            if panel.size != (width, height):
                panel = panel.resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(panel, (j * width, top + head))
            size = letters
            while size > 9 and ImageFont.load_default(size).getlength(title) > width - 4:
                size -= 1
            font = ImageFont.load_default(size)
            while len(title) > 1 and font.getlength(title) > width - 4:
                title = f"{title[:-2]}\N{HORIZONTAL ELLIPSIS}"
            place = ((j + 0.5) * width, top + head / 2)
            draw.text(place, title, fill="black", font=font, anchor="mm")
    return sheet
