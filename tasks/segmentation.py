"""Semantic segmentation: one class a pixel, without training (Table 5 of the paper)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._datamodule import ShardDataModule
from datamodules._samples import VOID, Batch, DatasetInfo
from surgery.adapted import compare_adapted, text_clusters
from surgery.clusters import label_clusters
from surgery.enlarging import on_canvas
from surgery.fused import fused_labels, fused_scores, read_layers, read_parts
from surgery.labels import Refine, Rules, label_maps
from surgery.prompts import find_templates
from surgery.refine import REFINEMENTS
from surgery.windows import Window, cut_windows, whole_patches, window_similarities
from tasks._draw import Look, label_figure
from tasks._protocols import check_name, find_protocol
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks._transfer import Copy, Group, Later, groups_of
from tasks.measures.segmentation import SegmentationMeasures
from tasks.run.image import ImageResult
from tasks.run.results import Facts, LabelMap
from tasks.run.terminal import in_words

log = logging.getLogger(__name__)

Choose = Callable[[Group], Tensor]
"""Some images of a batch, and their sizes -> their labels [G, H, W], as large as the largest."""


class Segmentation(Task):
    """Which class is each pixel? A label map, mIoU and pixel accuracy.

    As in the paper: architecture surgery alone. The cosines of patches and class texts are enlarged
    to the label's size, and the largest one names the pixel's class, without a threshold. A class
    of several words (``--data.synonyms``) counts by the best of them. Where the data set has
    background words (``--data.background true``) or ``prob_thd`` is given, the background is a
    class of its own, 0 in the label map; otherwise background pixels of the truth don't count.
    What other evaluations do after that (``refine``, ``area_thd``, ``prob_thd``) is done in their order,
    see `surgery.labels`.

    Where the truth is one mask a class (COCO), pixels of several classes are void, and those of none
    are background.

    Args:
        backbone: which CLIP, and how it is read.
        background: words for what is no class, the best of them counts; by default the data set's.
            An empty list for none.
        prob_thd: a pixel is background where the softmax probability of its best word is less. The
            softmax is over all words, background words included.
        logit_scale: what cosines are multiplied with in that softmax; published evaluations use 40.
        tile: side in pixels of the tiles that images are cut into, without overlap, and which the
            backbone sees one by one (the paper's way with Cityscapes: 512). Give the size of the
            whole image as ``--data.image_size``.
        window: side in pixels of a sliding window; cosines are averaged where windows overlap.
        stride: pixels from one window to the next; half of ``window`` by default.
        text_features: features of the class texts from a file, see `Task`; in place of synonyms.
        protocol: all settings of a published evaluation but the method, by one name, see `lightning list
            protocols`: those of the texts, the images and what follows. What is set beside it, or on the
            command line, wins, and the run says where it departs.
        refine: makes the cosines follow the colours of the image, at the label's size: pamr (of NACLIP
            and others) or tlp (of PEARL).
        refine_options: steps and dilations of pamr, grid of tlp; by default as released.
        area_thd: in each image, an object that has not more than this share of the pixels of all objects
            gives way to the next likely class. Needs a background.
        softmax: float16 has cosines, their softmax and the thresholds in halves, as some published
            evaluations do on GPUs.
        templates: what the words are put into: surgery (the 85 of CLIP Surgery's code), openai (the
            first 80 of these, OpenAI's for ImageNet), vild, car, or a list of one's own with a {} each.
        rest: what becomes of pixels beyond the last whole patch of an image or a window: pad fills the
            patch up with the mean colour, drop leaves them out and stretches the cosines over them.
        enlarge: cosines of a whole image go to the label's size once, or twice: to the image's first.
        score: what says how much a word is in a place: cosine; adapted, RF-CLIP's: of like words the one
            that fits the whole image best is moved towards its best places, and the whole image's cosine
            counts for 0.3; fused, CLIPer's (of its recipe cliper): softmaxes of the tokens of all layers,
            spread by their attention; with a window, those of windows (of whole patches) and of the whole
            image count by half. There, background words only compete in the softmax, and ``prob_thd`` is
            what a map has to reach.
        class_thd: of the score fused: a class whose largest value is not above it is not in the image,
            where there is a background.
        scaled: of the score fused: maps are scaled to [0, 1] before they are compared (CLIPer's
            evaluation does so on VOC21).
        cluster_eps: cells that correlate get one label, the commonest (CLIPtrase, of whole images):
            neighbours in DBSCAN are not farther than this; 0.7 in its evaluation.
        attention_thd: of the score fused: values less than this share of a word's largest are 0 before
            they are spread.
    """

    needs = ("classes",)

    measured_by = SegmentationMeasures
    measures: SegmentationMeasures

    values: Tensor
    """[T] label value that each word stands for."""

    clusters: Tensor
    """[T] which group of like words each is of, where the score is adapted."""

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        background: list[str] | None = None,
        prob_thd: float | None = None,
        logit_scale: float = 40.0,
        tile: int | None = None,
        window: int | None = None,
        stride: int | None = None,
        text_features: str | None = None,
        protocol: str | None = None,
        refine: Literal["pamr", "tlp"] | None = None,
        refine_options: dict[str, int | list[int]] | None = None,
        area_thd: float | None = None,
        softmax: Literal["float32", "float16"] = "float32",
        templates: str | list[str] = "surgery",
        rest: Literal["pad", "drop"] = "pad",
        enlarge: Literal["once", "twice"] = "once",
        score: Literal["cosine", "adapted", "fused"] = "cosine",
        class_thd: float = 0.0,
        attention_thd: float = 0.2,
        cluster_eps: float | None = None,
        scaled: bool = True,
    ) -> None:
        super().__init__(backbone, text_features)
        if score == "fused":
            given = backbone.attention
            name = given if isinstance(given, str) else given.get("name")
            others = {"tile": tile, "refine": refine, "area_thd": area_thd}
            unfit = [f"--model.{name}" for name, value in others.items() if value is not None]
            without = f" and does without {', '.join(unfit)}" if unfit else ""
            if name != "cliper" or unfit:
                raise InvalidSetting(
                    "--model.score fused is CLIPer's: it needs "
                    f"--model.backbone.attention cliper{without}"
                )
        if cluster_eps is not None and (window or tile or score == "fused" or cluster_eps <= 0):
            raise InvalidSetting(
                "--model.cluster_eps is a distance above 0, of whole images, and not with the score fused"
            )
        if prob_thd is not None and not 0 <= prob_thd <= 1:
            raise InvalidSetting(f"--model.prob_thd is a probability in [0, 1], got {prob_thd}")
        if area_thd is not None and not 0 <= area_thd <= 1:
            raise InvalidSetting(f"--model.area_thd is a share in [0, 1], got {area_thd}")
        if refine is not None and refine not in REFINEMENTS:
            raise InvalidSetting(f"--model.refine: {', '.join(REFINEMENTS)}, not {refine!r}")
        known = REFINEMENTS[refine].options if refine else ()
        if odd := (refine_options or {}).keys() - set(known):
            raise InvalidSetting(
                f"--model.refine_options: {refine} has {', '.join(known) or 'none'}, not {min(odd)}"
            )
        if tile is not None and window is not None:
            raise InvalidSetting("give --model.tile (no overlap) or --model.window, not both")
        if stride is not None and (window is None or not 0 < stride <= window):
            raise InvalidSetting(
                f"--model.stride needs a --model.window that is not smaller, got {stride}, {window}"
            )
        self.background = background
        self.prob_thd = prob_thd
        self.logit_scale = logit_scale
        self.tile = tile
        self.window = window
        self.stride = stride
        if protocol is not None:
            check_name(protocol)
        self.protocol = protocol
        self.refine = refine
        self.refine_options = refine_options
        self.area_thd = area_thd
        self.softmax = softmax
        self.templates = templates
        self.prompt_templates = find_templates(templates)
        self.rest = rest
        self.enlarge = enlarge
        self.score = score
        self.class_thd = class_thd
        self.attention_thd = attention_thd
        self.cluster_eps = cluster_eps
        self.scaled = scaled
        self.register_buffer("values", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("clusters", torch.empty(0, dtype=torch.int64), persistent=False)

    def check_data(self, datamodule: ShardDataModule) -> None:
        """Refuse a background where no label value is left for it."""
        super().check_data(datamodule)
        if self.has_background(datamodule.info) and not datamodule.info.zero_is_background:
            raise InvalidSetting(
                f"{datamodule.info.name} has no background: its label value 0 is "
                f"{datamodule.info.classes[0]!r}; leave out --model.background and --model.prob_thd"
            )
        if self.area_thd is not None and not self.background_words(datamodule.info):
            raise InvalidSetting(
                "--model.area_thd needs words for the background, which is what remains where no object "
                "is large enough: --data.background true"
            )

    def setup(self, stage: str) -> None:
        """As of all tasks; says which protocol is followed, and where it is departed from."""
        super().setup(stage)
        if self.protocol and self.trainer.is_global_zero:
            log.info("%s", in_words(self.described()["protocol"]))

    def described(self) -> dict[str, Any]:
        """The protocol, where one is followed, its source, and what is otherwise."""
        if self.protocol is None:
            return {}
        data = self.datamodule
        found = find_protocol(self.protocol, type(data), bool(data.info.background_words))
        return {"protocol": found.described(self, data)}

    def background_words(self, info: DatasetInfo) -> tuple[str, ...]:
        """The words of the background class; none if it has none."""
        return info.background_words if self.background is None else tuple(self.background)

    def has_background(self, info: DatasetInfo) -> bool:
        """Whether the background is a class of its own."""
        return bool(self.background_words(info)) or self.prob_thd is not None

    def wording(self, info: DatasetInfo) -> list[tuple[int, tuple[str, ...]]]:
        """Label value and words of every class, the background last."""
        words: tuple[tuple[str, ...], ...] = tuple((prompt,) for prompt in info.prompts)
        if info.synonyms and not self.text_features:
            words = info.synonyms[-len(info.classes) :]  # led by the background, where there is one
        pairs = [(info.label_value(i), group) for i, group in enumerate(words)]
        return [*pairs, (0, self.background_words(info))]

    def words(self, info: DatasetInfo) -> list[str]:
        """All words of all classes, and of the background."""
        return [word for _, group in self.wording(info) for word in group]

    def configure_texts(self) -> None:
        """Features of all words, and which class each word stands for, by rising label value.

        That is the order of published evaluations, the background first.
        """
        super().configure_texts()
        values = torch.tensor([value for value, group in self.wording(self.info) for _ in group])
        order = values.argsort(stable=True)
        self.values = values[order]
        self.texts = self.texts and self.texts[order.tolist()]
        if self.score == "adapted" and self.texts is not None:
            self.clusters = text_clusters(self.texts.features)

    def has_one_image_size(self, datamodule: ShardDataModule) -> bool:
        """Windows have one size whatever the images have."""
        return bool(self.tile or self.window) or super().has_one_image_size(datamodule)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Sequence[ImageResult]:
        """The label map of each image, at its original size."""
        assert self.texts is not None  # needs = ("classes",)
        window = self.tile or self.window
        stride = self.stride or (window and (self.tile or (window + 1) // 2))
        images = list(batch.images)
        rows, columns = self.backbone.patch_size if self.score == "fused" else (1, 1)
        windows = [
            cut_windows(
                (image.shape[1] // rows * rows, image.shape[2] // columns * columns), window, stride
            )
            for image in images
        ]
        if self.score == "fused":
            choose = self.by_fused_scores(batch.images, windows, self.texts.features)
        else:
            choose = self.by_cosines(images, windows, self.texts.features)
        samples = batch.samples
        groups = groups_of(samples, [1] * len(images), self.device)
        found: list[Tensor] = []
        for group in groups:
            predicted = choose(group)
            labels = [s.label for i in group if (s := samples[i]).label is not None]
            self.measures.update(predicted, labels, [samples[i].positives or () for i in group])
            # As narrow as their values, before they leave the device; torch has few 16-bit integers.
            found.append(predicted.to(torch.uint8 if self.info.void == VOID else torch.int16))
        copy = Copy([*found, *(images if self.draws else [])])
        keys = [sample.key for sample in samples]
        counts = [len(boxes) for boxes in windows]

        def make() -> list[ImageResult]:
            arrived = iter(copy.tensors())
            maps: dict[int, np.ndarray] = {}
            for group in groups:
                arrays = next(arrived).numpy().view(self.info.label_type)
                for i, (height, width), array in zip(group, group.sizes, arrays, strict=True):
                    maps[i] = np.ascontiguousarray(array[:height, :width])
            return [
                self._result(key, next(arrived, None), maps[i], counts[i])
                for i, key in enumerate(keys)
            ]

        return Later(len(keys), make)

    def by_cosines(self, images: list[Tensor], windows: list[list[Window]], text: Tensor) -> Choose:
        """The labels of some of the images, at a size, by the cosines of their windows."""
        compare = None
        if self.score == "adapted":
            compare = compare_adapted(
                self.backbone, images, windows, text, self.clusters, rest=self.rest
            )
        scores = window_similarities(
            self.backbone, images, windows, text, rest=self.rest, compare=compare
        )

        def choose(group: Group) -> Tensor:
            labels = label_maps(
                [scores[i] for i in group],
                [windows[i] for i in group],
                [(images[i].shape[1], images[i].shape[2]) for i in group],
                group.sizes,
                self.backbone.patch_size,
                self.rules(),
                self.refiner([images[i] for i in group], group.sizes),
            )
            if self.cluster_eps is None:
                return labels
            found = []
            for i, (height, width), one in zip(group, group.sizes, labels, strict=True):
                of_image = one[:height, :width]
                found.append(
                    label_clusters(
                        self.backbone, images[i], of_image, self.cluster_eps, rest=self.rest
                    )
                )
            return on_canvas(found)

        return choose

    def by_fused_scores(
        self, images: Tensor | list[Tensor], windows: list[list[Window]], text: Tensor
    ) -> Choose:
        """The same by CLIPer's score; pixels beyond the last whole patch are left out."""
        words = self.values != 0 if self.background_words(self.info) else self.values >= 0
        scores: list[Tensor] = []
        for pixels in self.pixels(images):
            whole = whole_patches(pixels, self.backbone.patch_size, "drop")
            parts = windows[len(scores)] if self.window else []  # alike in images of one size
            scores += fused_scores(
                read_layers(self.backbone, whole),
                text,
                words,
                scale=self.logit_scale,
                threshold=self.attention_thd,
                parts=read_parts(self.backbone, whole, parts),
            ).split(1)
        background = (self.prob_thd or 0.0) if self.has_background(self.info) else None

        def choose(group: Group) -> Tensor:
            values = F.pad(self.values[words], (1, 0))
            labels = [
                fused_labels(
                    scores[i],
                    size,
                    background=background,
                    least=self.class_thd,
                    scaled=self.scaled,
                )
                for i, size in zip(group, group.sizes, strict=True)
            ]
            return on_canvas([values[one[0]] for one in labels])

        return choose

    def rules(self) -> Rules:
        """How the cosines of words become the label of a pixel."""
        return Rules(
            values=self.values,
            scale=self.logit_scale,
            threshold=self.prob_thd,
            area=self.area_thd,
            half=self.softmax == "float16",
            by_image_size=self.enlarge == "twice",
            together=self.refine is not None and REFINEMENTS[self.refine].together,
        )

    def refiner(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> Callable[[int], Refine] | None:
        """What refines the maps of each of some images at its size; None for nothing."""
        if self.refine is None:
            return None
        assert self.texts is not None  # needs = ("classes",)
        text, options = self.texts.features, self.refine_options or {}
        begin = partial(REFINEMENTS[self.refine].prepare, text=text, **options)

        def refine(i: int) -> Refine:
            pixels = self.backbone.preprocess(images[i][None])
            return begin(F.interpolate(pixels, size=sizes[i], mode="bilinear", align_corners=False))

        return refine

    def _result(
        self, key: str, image: Tensor | None, labels: np.ndarray, windows: int
    ) -> ImageResult:
        shares = np.bincount(labels.ravel()) / labels.size
        names = {self.info.label_value(i): name for i, name in enumerate(self.info.classes)}
        named = {
            names.get(value, "background"): round(share, 6)
            for value, share in enumerate(shares.tolist())
            if share
        }
        results = (LabelMap(labels, named), Facts({"views": windows}))
        draw = None
        if image is not None:
            draw = partial(draw_labels, image, labels, self.info, self.look)
        return ImageResult(key, results, draw)


def draw_labels(
    image: Tensor, labels: np.ndarray, info: DatasetInfo, look: Look
) -> dict[str, np.ndarray]:
    """The label map over the image, with the names of its colours."""
    names = {info.label_value(i): name for i, name in enumerate(info.classes)}
    names = {0: "background", **names}
    return {"label.jpg": label_figure(image, labels, info.flat_palette(), names, look)}
