"""One image, some names, maps: the method for a person at a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import InvalidSetting, MissingFile
from surgery.backbone import load_backbone
from surgery.features import feature_surgery, similarity_map, similarity_to_points
from surgery.prompts import TEMPLATES
from surgery.texts import Texts
from surgery.visualize import heat_map

if TYPE_CHECKING:
    from PIL.Image import Image

WRITTEN = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of the pictures that `Explanation.save` writes."""


@dataclass(frozen=True)
class Explanation:
    """What an image shows of T names.

    Attributes:
        image: uint8 [H, W, 3].
        names: T of them.
        maps: [T, H, W] in [0, 1].
        scores: [T], cosine of the image's class token with each name.
        similarity: [h*w, T] on the token grid.
        grid: (h, w).
        points: for each name its points [K, 2] (x, y in pixels) and labels [K] (1 on it, 0 off it).
    """

    image: Tensor
    names: tuple[str, ...]
    maps: Tensor
    scores: Tensor
    similarity: Tensor
    grid: tuple[int, int]
    points: tuple[tuple[Tensor, Tensor], ...]

    def overlays(self) -> Tensor:
        """The maps as heat over the image: uint8 [T, H, W, 3]."""
        return torch.stack([heat_map(self.image, values) for values in self.maps])

    def save(self, path: str | Path) -> None:
        """Write the image and its T overlays, side by side, as a picture.

        Args:
            path: where; its ending names the format, a PNG if it has none.

        Raises:
            InvalidSetting: the ending is that of no format that can be written.
        """
        from PIL import Image

        path = Path(path)
        path = path if path.suffix else path.with_name(f"{path.name}.png")
        if path.suffix.lower() not in WRITTEN:
            raise InvalidSetting(f"{path}: a picture's ending is one of {', '.join(WRITTEN)}")
        row = torch.cat([self.image, *self.overlays()], dim=1)
        Image.fromarray(row.numpy()).save(path)

    def show(self) -> None:
        """Show the image and its overlays in a matplotlib figure."""
        try:
            from matplotlib import pyplot
        except ImportError:
            raise ImportError(
                "show() draws with matplotlib, which is not installed: `pip install matplotlib`, "
                "or write a picture with save(path)"
            ) from None
        titles = ("image", *(f"{n} {s:.3f}" for n, s in zip(self.names, self.scores, strict=True)))
        figure, axes = pyplot.subplots(1, len(titles), figsize=(3 * len(titles), 3), squeeze=False)
        pictures = (self.image, *self.overlays())
        for axis, title, picture in zip(axes[0], titles, pictures, strict=True):
            axis.imshow(picture.numpy())
            axis.set_title(title)
            axis.set_axis_off()
        figure.tight_layout()
        pyplot.show()


class Explainer:
    """`Explainer(model, pretrained)(image, names)`; options as of `load_backbone`, and a device.

    A file with more than `max_pixels` pixels is refused before it is unpacked.
    """

    def __init__(
        self,
        model: str | Path,
        pretrained: str | Path | None = None,
        *,
        templates: Sequence[str] = TEMPLATES,
        device: str | torch.device = "cpu",
        max_pixels: int = 100_000_000,
        **options: Any,
    ) -> None:
        self.backbone = load_backbone(model, pretrained, **options).to(device)
        self.templates = tuple(templates)
        self.max_pixels = max_pixels

    @torch.inference_mode()
    def __call__(
        self, image: "Image | str | Path | Tensor", names: str | Sequence[str]
    ) -> Explanation:
        """Explain a PIL image, a path, or a uint8 tensor [3, H, W] by one or more names.

        A single name is compared with the empty text, several with what they share.

        Raises:
            MissingFile: there is no such file.
            InvalidSetting: the file is no picture, or can't be read; names it.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        backbone = self.backbone
        picture = _open(image, self.max_pixels)
        pixels = torch.from_numpy(np.array(_squash(picture, backbone.image_size)))
        batch = pixels.permute(2, 0, 1)[None].to(backbone.device)
        tokens = backbone.encode_image(backbone.preprocess(batch))
        texts = Texts.encode(backbone, names, self.templates)
        text = texts.features
        similarity = feature_surgery(
            tokens.patch_tokens, tokens.class_token, text, redundant=texts.redundant(backbone)
        ).cpu()
        size = (picture.height, picture.width)
        maps = similarity_map(similarity, tokens.grid, size)[0]
        scores = torch.nn.functional.normalize(tokens.class_token[0], dim=-1) @ text.T
        points = tuple(
            similarity_to_points(column, tokens.grid, size) for column in similarity[0].T
        )
        shown = torch.from_numpy(np.array(picture))
        return Explanation(shown, names, maps, scores.cpu(), similarity[0], tokens.grid, points)


def _open(image: "Image | str | Path | Tensor", max_pixels: int) -> "Image":
    """As an upright RGB picture, opened as ``lightning predict`` does."""
    from PIL import Image

    from common.pictures import BadPicture, open_picture, upright_rgb

    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"image: expected uint8 [3, H, W], given {image.dtype} {list(image.shape)}"
            )
        return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if not isinstance(image, str | Path):
        return upright_rgb(image)
    try:
        return open_picture(Path(image).read_bytes(), max_pixels)
    except FileNotFoundError:
        raise MissingFile(f"{image}: no such file in {Path.cwd()}") from None
    except BadPicture as error:
        raise InvalidSetting(f"{image}: {error}") from None
    except Exception as error:  # broken bytes may break a decoder in any way
        raise InvalidSetting(f"{image} can't be read as a picture: {error}") from error


def _squash(picture: "Image", size: tuple[int, int]) -> "Image":
    """To (height, width), not keeping the ratio, as in the paper."""
    from PIL import Image

    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
