"""What the page asks for: pictures opened, words explained, points given to SAM. Nothing of gradio."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import InvalidSetting, UserError
from common.pictures import BadPicture, open_picture
from surgery.explainer import Explainer
from surgery.explanation import CaptionExplanation, Explanation
from surgery.features import similarity_to_points
from surgery.methods import METHODS, check_towers
from surgery.texts import about_unknown

if TYPE_CHECKING:
    from tasks._sam import PointSegmenter

DEMO = "demo"
WELL_KNOWN = ("ViT-B-16 openai", "ViT-L-14-336 openai", "RN50x4 openai")
"""Models that the page offers beside those of the command line: name and weights."""

BESIDE = ("surgery", "clip")
"""Methods that are chosen at first."""

LARGEST = 1024  # pixels: longer side of a picture in the page; CLIP and SAM see no more of it
MOST_NAMES = 20
_MOST_MAPS = 60  # of names times methods: 250 MB of maps of a large picture
_LONGEST = 200  # characters of a name
_WORDS = 8  # of CLIP's own that are explained
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Answer:
    """What was found, and what has to be said about it.

    Attributes:
        explanation: of the picture and the words.
        notice: words that the model was never taught; may be empty.
        counts: how often each word was there, where they are CLIP's own.
    """

    explanation: Explanation
    notice: str = ""
    counts: tuple[int, ...] = ()


class Answers:
    """Answers of one model at a time, and to one question at a time.

    Args:
        models: as a person types them, ``NAME`` or ``NAME WEIGHTS``; see `surgery.load_backbone`. The
            first one is loaded at once.
        sam: weights of SAM, see `tasks._sam.PointSegmenter`; None: no masks of points.
        device: where it is computed.
        any_model: whether other models may be asked for, too.

    Raises:
        UserError: the first model, or SAM, can't be loaded.
    """

    def __init__(
        self,
        models: Sequence[str] = (DEMO,),
        *,
        sam: str | None = None,
        device: str = "cpu",
        any_model: bool = True,
    ) -> None:
        offered = (*models, DEMO, *WELL_KNOWN) if any_model else tuple(models)
        self.models = list(dict.fromkeys(" ".join(model.split()) for model in offered))
        self.any_model = any_model
        self.device = device
        self._lock = threading.Lock()
        self._loaded = ""
        self._explainer: Explainer
        with self._lock:
            self._use(self.models[0])
        self._segmenter: PointSegmenter | None = None
        if sam is not None:
            from tasks._sam import PointSegmenter

            self._segmenter = PointSegmenter(sam).to(device)

    @property
    def has_sam(self) -> bool:
        """Whether there are masks of points."""
        return self._segmenter is not None

    def methods(self, model: str) -> tuple[str, list[str]]:
        """Load a model; its title, and the methods that are defined for it."""
        with self._lock:
            explainer = self._use(model)
            return explainer.backbone.title, [name for name in METHODS if _defined(name, explainer)]

    def explain(
        self, model: str, picture: str | Path | None, words: str, methods: Sequence[str]
    ) -> Answer:
        """Maps of words on a picture.

        Args:
            model: one of `models`, or any.
            picture: path of a file, which may be a stranger's.
            words: names with commas or line ends between them.
            methods: one or more.

        Raises:
            UserError: something of it can't be used.
        """
        names = names_in(words)
        if not methods:
            raise InvalidSetting("Choose a method, or several.")
        if len(names) * len(methods) > _MOST_MAPS:
            raise InvalidSetting(
                f"{len(names)} names by {len(methods)} methods are too many maps for a page: at most "
                f"{_MOST_MAPS}."
            )
        shown = opened(picture)
        with self._lock:
            explainer = self._use(model)
            found = explainer(shown, names, methods=list(methods))
            return Answer(found, about_unknown(explainer.backbone, names))

    def caption(
        self, model: str, picture: str | Path | None, text: str
    ) -> tuple[CaptionExplanation, str]:
        """The tokens of a caption, and a notice that may be empty."""
        if not text.strip():
            raise InvalidSetting("Type a caption of the picture.")
        shown = opened(picture)
        with self._lock:
            explainer = self._use(model)
            found = explainer.caption(shown, text)
            notice = about_unknown(explainer.backbone, [text])
        if found.truncated:
            notice += f" The model stops reading after {len(found.tokens)} tokens."
        return found, notice.strip()

    def words(self, model: str, picture: str | Path | None, steps: int, seed: int = 0) -> Answer:
        """The words that CLIP itself says of a picture, and their maps by the first of `BESIDE`."""
        shown = opened(picture)
        with self._lock:
            explainer = self._use(model)
            counts = explainer.words(shown, steps=steps, seed=seed)
            top = list(counts)[:_WORDS]
            if not top:
                raise InvalidSetting("No words came out of it: try more steps, or another seed.")
            found = explainer(shown, top, methods=BESIDE[:1])
        return Answer(found, counts=tuple(counts[word] for word in top))

    def sam_masks(
        self, explanation: Explanation, threshold: float
    ) -> dict[str, list[tuple[np.ndarray, float]]]:
        """SAM's mask of each name's points, bool [H, W], with its own estimate of the IoU, by method."""
        if self._segmenter is None:
            return {}
        prompts = [
            points_of(explanation, method, i, threshold)
            for method in explanation.methods
            for i in range(len(explanation.names))
        ]
        with self._lock:
            image = explanation.image.permute(2, 0, 1)
            found = iter(self._segmenter(image, [p for p in prompts if len(p[1])]))
        nothing = torch.zeros(image.shape[1:], dtype=torch.bool), 0.0
        asked = (next(found) if len(labels) else nothing for _, labels in prompts)
        masks = [(mask.numpy(), score) for mask, score in asked]
        count = len(explanation.names)
        return {
            method: masks[i * count : (i + 1) * count]
            for i, method in enumerate(explanation.methods)
        }

    def _use(self, model: str) -> Explainer:
        """The explainer of a model; that of the last one is kept. Call it with the lock held."""
        wanted = " ".join(model.split())
        if not wanted:
            raise InvalidSetting("Choose a model.")
        if wanted == self._loaded:
            return self._explainer
        if not self.any_model and wanted not in self.models:
            raise InvalidSetting(
                f"This page is open to other machines: it offers {', '.join(self.models)}, and no other."
            )
        name, _, weights = wanted.partition(" ")
        pretrained = weights or (DEMO if name == DEMO else None)
        self._explainer = Explainer(name, pretrained, device=self.device)
        self._loaded = wanted
        return self._explainer


def names_in(words: str) -> list[str]:
    """Names with commas or line ends between them, each once.

    Example:
        >>> names_in("star, red  heart,star")
        ['star', 'red heart']

    Raises:
        InvalidSetting: none, too many, or one that is too long.
    """
    names = list(dict.fromkeys(" ".join(word.split()) for word in re.split(r"[,;\n]", words)))
    names = [name for name in names if name]
    if not names:
        raise InvalidSetting("Type one or more words to look for, with commas between them.")
    if len(names) > MOST_NAMES:
        raise InvalidSetting(f"{len(names)} names are too many for a page: at most {MOST_NAMES}.")
    if any(len(name) > _LONGEST for name in names):
        raise InvalidSetting(f"A name has more than {_LONGEST} characters.")
    return names


def opened(picture: str | Path | None) -> Image.Image:
    """A picture file as upright RGB, its longer side at most `LARGEST`.

    Raises:
        InvalidSetting: there is none, or it can't be used.
    """
    if picture is None:
        raise InvalidSetting("Drop a picture first, or take one of the examples.")
    path = Path(picture)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidSetting(f"The picture has more than {_MAX_BYTES // 2**20} MB.")
        shown = open_picture(path.read_bytes())
    except UserError:
        raise
    except BadPicture as error:
        raise InvalidSetting(f"{path.name}: {error}") from None
    except Exception as error:  # broken bytes may break a decoder in any way
        raise InvalidSetting(f"{path.name} can't be read as a picture: {error}") from error
    if max(shown.size) > LARGEST:
        shown.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return shown


def points_of(
    explanation: Explanation, method: str, index: int, threshold: float
) -> tuple[Tensor, Tensor]:
    """Points [K, 2] (x, y) and labels [K] of a name, at a threshold in [0, 1]."""
    height, width = explanation.image.shape[:2]
    column = explanation.methods[method].similarity[:, index]
    return similarity_to_points(column, explanation.grid, (height, width), threshold=threshold)


def _defined(method: str, explainer: Explainer) -> bool:
    try:
        check_towers([method], explainer.backbone)
    except InvalidSetting:
        return False
    return True
