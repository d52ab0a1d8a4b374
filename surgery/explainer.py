"""Images, some names, maps: the method for a person at a prompt."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from common.errors import InvalidSetting, MissingFile
from surgery.backbone import load_backbone
from surgery.captions import place_tokens, read_captions
from surgery.explanation import CaptionExplanation, Explanation, Explanations, MethodMaps
from surgery.features import similarity_map, similarity_to_points
from surgery.methods import check_methods, check_towers, explain
from surgery.opinions import ascend, mean_feature, views, word_frequencies
from surgery.prompts import TEMPLATES
from surgery.texts import Texts, empty_text, warn_of_unknown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Picture = Image | str | Path | Tensor | NDArray[Any]
    """One image: an opened one, a path, uint8 [3, H, W] of torch, or of numpy [H, W, 3] or [H, W]."""


class Explainer:
    """`Explainer(model, pretrained)(image, names)`: where in an image is what the names say?

    Args:
        model: as of `load_backbone`; "demo" (with pretrained="demo") needs no download.
        pretrained: as of the same.
        methods: names in `METHODS`, see `lightning list methods`; the first one gives an
            explanation's own maps.
        templates: prompts, with one `{}` for a name each.
        device: where it is computed.
        batch_size: images at once, where many are given.
        max_pixels: a file with more pixels is refused before it is unpacked.
        **options: of `load_backbone`.

    Example:
        >>> explain = Explainer("demo", "demo", methods=["surgery", "clip"])
        >>> explain(torch.zeros(3, 96, 96, dtype=torch.uint8), ["star", "moon"]).maps.shape
        torch.Size([2, 96, 96])
    """

    def __init__(
        self,
        model: str | Path,
        pretrained: str | Path | None = None,
        *,
        methods: Sequence[str] = ("surgery",),
        templates: Sequence[str] = TEMPLATES,
        device: str | torch.device = "cpu",
        batch_size: int = 16,
        max_pixels: int = 100_000_000,
        **options: Any,
    ) -> None:
        self.methods = tuple(check_methods(methods))
        if batch_size < 1:
            raise InvalidSetting(f"batch_size={batch_size}: expected a number of images, 1 or more")
        self.backbone = load_backbone(model, pretrained, **options).to(device)
        check_towers(self.methods, self.backbone)
        self.templates = tuple(templates)
        self.batch_size = batch_size
        self.max_pixels = max_pixels
        self._encoded: tuple[tuple[str, ...], Texts] | None = None

    def __repr__(self) -> str:
        backbone = self.backbone
        return (
            f"Explainer({backbone.title} on {backbone.device}, methods {', '.join(self.methods)})"
        )

    @overload
    def __call__(
        self,
        image: "Picture",
        names: str | Sequence[str],
        *,
        methods: Sequence[str] | None = None,
    ) -> Explanation: ...

    @overload
    def __call__(
        self,
        image: "list[Picture] | tuple[Picture, ...]",
        names: str | Sequence[str],
        *,
        methods: Sequence[str] | None = None,
    ) -> Explanations: ...

    @torch.inference_mode()
    def __call__(
        self,
        image: "Picture | list[Picture] | tuple[Picture, ...]",
        names: str | Sequence[str],
        *,
        methods: Sequence[str] | None = None,
    ) -> Explanation | Explanations:
        """Explain an image, or several, by one or more names.

        A single name is compared with the empty text, several with what they share. Names with words
        that the model was never taught are warned of.

        Args:
            image: a path, a PIL image, uint8 [3, H, W] of torch or [H, W, 3] or [H, W] of numpy; or
                a list of these, which are explained in batches.
            names: one, or a list.
            methods: in place of those that it was made with.

        Returns:
            What the image shows; of several images, a tuple of that.

        Raises:
            MissingFile: there is no such file.
            InvalidSetting: the file is no picture, or can't be read; names it. No name, no such method,
                or an array of another kind.
        """
        names = _checked(names)
        wanted = self.methods if methods is None else tuple(check_methods(methods))
        check_towers(wanted, self.backbone)
        several = isinstance(image, list | tuple)
        pictures: Sequence[Any] = image if isinstance(image, list | tuple) else [image]
        texts = self._texts(names)
        found = Explanations(
            explanation
            for start in range(0, len(pictures), self.batch_size)
            for explanation in self._explain(
                pictures[start : start + self.batch_size], names, texts, wanted
            )
        )
        return found if several else found[0]

    def _explain(
        self, given: Sequence[Any], names: tuple[str, ...], texts: Texts, methods: tuple[str, ...]
    ) -> Iterator[Explanation]:
        backbone = self.backbone
        pictures = [_open(image, self.max_pixels) for image in given]
        images = backbone.preprocess(self._pixels(pictures))
        with backbone.encoding_once(images):
            tokens = backbone.encode_image(images, texts.features)
            maps = {method: explain(backbone, images, texts, method).cpu() for method in methods}
        unit = torch.nn.functional.normalize(tokens.class_token, dim=-1)
        for i, picture in enumerate(pictures):
            size = (picture.height, picture.width)
            scores = unit[i] @ texts.features.T
            shown = torch.from_numpy(np.array(picture))
            of = {method: _maps(values[i], size) for method, values in maps.items()}
            yield Explanation(shown, names, scores.cpu(), tokens.grid, of)

    @torch.inference_mode()
    def caption(self, image: "Picture", caption: str) -> CaptionExplanation:
        """Which words of a caption does CLIP see in an image, and where (the paper's Figure 11)?

        As the task `Multimodal`: each token loses what it shares with the empty text before it is
        placed.

        Args:
            image: one, see `__call__`.
            caption: of it; the model stops reading at its `context_length`.

        Returns:
            The tokens with their scores, and where each is.

        Raises:
            MissingFile: there is no such file.
            InvalidSetting: no picture, see `__call__`, or no caption.
        """
        if not isinstance(caption, str) or not caption.strip():
            raise InvalidSetting(f"caption: expected a sentence, given {caption!r}")
        warn_of_unknown(self.backbone, [caption])
        picture = _open(image, self.max_pixels)
        tokens = self.backbone.encode_image(self.backbone.preprocess(self._pixels([picture])))
        (read,) = read_captions(self.backbone, [caption])
        placed = place_tokens(tokens, read.features, empty_text(self.backbone))[0]
        return CaptionExplanation(
            image=torch.from_numpy(np.array(picture)),
            tokens=tuple(read.readable),
            truncated=read.truncated,
            scores=read.scores(tokens.class_token).cpu(),
            grid=tokens.grid,
            similarity=placed.cpu(),
        )

    @torch.inference_mode()
    def words(self, image: "Picture", *, steps: int = 100, seed: int = 0) -> dict[str, int]:
        """Which words would CLIP itself say of an image? Found by gradient ascent on texts.

        As the task `Opinions`; takes seconds with the demo's CLIP, minutes with a large one on a CPU.

        Args:
            image: one, see `__call__`.
            steps: of the ascent; 100 to 400 are recommended.
            seed: of its random numbers.

        Returns:
            Word -> how often it was there, the most frequent first; to be explained as names.
        """
        if steps < 1:
            raise InvalidSetting(f"steps={steps}: expected a number of steps, 1 or more")
        (pixels,) = self._pixels([_open(image, self.max_pixels)])
        target = mean_feature(self.backbone, views(pixels, 16, seed), self.batch_size)
        ascent = ascend(
            self.backbone,
            self.backbone.tokenizer,
            target,
            sequences=8,
            length=5,
            steps=steps,
            lr=1.0,
            seed=seed,
            micro_batch=self.batch_size,
        )
        return word_frequencies(self.backbone.tokenizer, ascent.ids[steps // 2 :])

    def _pixels(self, pictures: "Sequence[Image]") -> Tensor:
        """Pictures as uint8 [B, 3, S, S'] in the backbone's size, on its device."""
        squashed = [np.array(_squash(picture, self.backbone.image_size)) for picture in pictures]
        batch = torch.from_numpy(np.stack(squashed)).permute(0, 3, 1, 2)
        return batch.to(self.backbone.device)

    def _texts(self, names: tuple[str, ...]) -> Texts:
        """Features of names; the last ones are kept, as one asks again with other images."""
        if self._encoded is None or self._encoded[0] != names:
            self._encoded = names, Texts.encode(self.backbone, names, self.templates)
        return self._encoded[1]


def _maps(values: Tensor, size: tuple[int, int]) -> MethodMaps:
    """Similarities [T, h, w] as what a method says of an image of a size (height, width)."""
    grid = (values.shape[1], values.shape[2])
    similarity = values.flatten(1).T
    points = tuple(similarity_to_points(column, grid, size) for column in similarity.T)
    return MethodMaps(similarity_map(similarity[None], grid, size)[0], similarity, points)


def _checked(names: str | Sequence[str]) -> tuple[str, ...]:
    given = (names,) if isinstance(names, str) else tuple(names)
    if not given or not all(isinstance(name, str) and name.strip() for name in given):
        raise InvalidSetting(f"names: expected one or more words to look for, given {names!r}")
    return given


def _open(image: Any, max_pixels: int) -> "Image":
    """As an upright RGB picture, opened as ``lightning predict`` does."""
    from PIL import Image

    from common.pictures import BadPicture, open_picture, upright_rgb

    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise InvalidSetting(_no_image("a tensor", "uint8 [3, H, W]", image))
        return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    if isinstance(image, np.ndarray):
        colours = image.shape[2:] in ((), (3,), (4,))
        if image.ndim not in (2, 3) or not colours or image.dtype != np.uint8:
            raise InvalidSetting(_no_image("an array", "uint8 [H, W, 3], or [H, W]", image))
        return upright_rgb(Image.fromarray(np.ascontiguousarray(image)))
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if not isinstance(image, str | Path):
        raise InvalidSetting(
            "image: expected a path, a PIL image, a tensor or an array, or a list of these, given "
            f"{type(image).__name__}"
        )
    try:
        return open_picture(Path(image).read_bytes(), max_pixels)
    except FileNotFoundError:
        raise MissingFile(f"{image}: no such file in {Path.cwd()}") from None
    except IsADirectoryError:
        hint = f'list its pictures, such as sorted(Path("{image}").glob("*.jpg"))'
        raise InvalidSetting(f"{image} is a folder: {hint}") from None
    except BadPicture as error:
        raise InvalidSetting(f"{image}: {error}") from None
    except Exception as error:  # broken bytes may break a decoder in any way
        raise InvalidSetting(f"{image} can't be read as a picture: {error}") from error


def _no_image(what: str, expected: str, given: Any) -> str:
    hint = ""
    if given.ndim == 4:
        hint = ". Of several images: list(x)"
    elif "float" in str(given.dtype):
        convert = "(x * 255).round().to(torch.uint8)"
        if isinstance(given, np.ndarray):
            convert = "(x * 255).round().astype(np.uint8)"
        hint = f". Of floats in [0, 1]: {convert}"
    shape = list(given.shape)
    return f"image: {what} is expected to be {expected}, given {given.dtype} {shape}{hint}"


def _squash(picture: "Image", size: tuple[int, int]) -> "Image":
    """To (height, width), not keeping the ratio, as in the paper."""
    from PIL import Image

    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
