"""The paper's looks into CLIP: attention, modules, redundant features (Figures 4 to 6)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import InvalidSetting
from datamodules._samples import Batch, Sample
from surgery import similarity, similarity_map
from surgery.analysis import (
    ATTENTIONS,
    affinity,
    cells,
    check_blocks,
    foreground_selection,
    look_inside,
    map_distance,
    map_likeness,
    strongest,
)
from surgery.devices import send
from surgery.texts import empty_text
from tasks._draw import Look, heat_maps, mark_cell
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks._transfer import Copy
from tasks.measures._measures import label_masks
from tasks.measures.analysis import DISTANCES, SELECTIONS, STAGES, AnalysisMeasures
from tasks.run.image import ImageResult
from tasks.run.results import Facts
from tasks.run.stored import Files, slug


class Cosines(NamedTuple):
    """Cosines [N, P + 1] of patches with an image's positive labels and the empty text, which is last."""

    plain: Tensor
    architecture: Tensor
    grid: tuple[int, int]


class Analysis(Task):
    """What does CLIP's attention select, what do its modules say, and what do all texts share?

    Three analyses of the paper, as it defines them:

    - Selection (Eq. 4, Fig. 4): the share of the attention that lies on the object, in the last block,
      for the one token at the highest score of the label's similarity map; mean over all positive
      labels of a class, then over classes. Raw attention is asked by the token of plain CLIP's map,
      consistent attention by that of the reformed one (``mFSR_consistent``) and by the same token as
      the raw one (``mFSR_consistent_same_token``). ``mFSR_blind`` is what attention that sees nothing
      would have. ``fsr_survival.csv`` is Fig. 4b.
    - Affinity (Eq. 5, Fig. 5): cosine of each module's class token, times the last projection, with an
      image's positive labels, averaged over images. The paper names no norm before the projection:
      ``affinity_last_ffn`` has none, ``affinity_last_ffn_ln_post`` CLIP's own. Two lines stand beside:
      the final class token's cosine with positive and with negative labels.
    - Redundancy (Fig. 6): L1 distance of positive labels' maps, scaled to [0, 1] at the image's size, to
      the empty text's map and to nothing, averaged over all positive labels; of plain CLIP, and of the
      reformed attention (``_architecture``).

    The numbers of each image are in its json. With ``--writer.overlays`` the pictures of Fig. 4a and
    Fig. 6 are drawn for each positive label: ``attention.*.jpg`` (raw and consistent attention of the
    token, which is marked) and ``redundant.*.jpg`` (maps of the text and of the empty text: plain CLIP's,
    then the reformed one's).

    Args:
        backbone: which CLIP, and how it is read: "reformed" above is what ``attention`` says.
        selection: measure foreground selection; needs masks.
        affinity: measure the affinity of modules.
        redundancy: measure what maps share with the empty text's.
        text_features: safetensors file with features of the class texts, in place of prompts.
    """

    needs = ("classes", "mask")

    measured_by = AnalysisMeasures
    measures: AnalysisMeasures

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        selection: bool = True,
        affinity: bool = True,
        redundancy: bool = True,
        text_features: str | None = None,
    ) -> None:
        super().__init__(backbone, text_features)
        if not (selection or affinity or redundancy):
            raise InvalidSetting(
                "no analysis is left: set selection, affinity or redundancy to true"
            )
        self.selection = selection
        self.affinity = affinity
        self.redundancy = redundancy
        if not selection:
            self.needs = ("classes", "positives")

    def configure_texts(self) -> None:
        """Class texts, and the empty one; a backbone without blocks is refused here already."""
        if self.selection or self.affinity:
            check_blocks(self.backbone)
        super().configure_texts()
        self.texts = self.texts and replace(self.texts, empty=empty_text(self.backbone))

    def on_predict_start(self) -> None:
        """Texts and measures stay on the host: there are hundreds of small steps for each image."""

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """All numbers of each image, and its pictures where they are wanted."""
        parts = [image[None] for image in batch.images]
        if self.device.type != "cpu" and isinstance(batch.images, Tensor):
            parts = [batch.images]
        looks = [self._look(self.backbone.preprocess(part)) for part in parts]
        labels = [s.label for s in batch.samples if s.label is not None]
        pictures = batch.images if self.draws else []
        tensors = [tensor for look in looks for tensor in look.values()]
        arrived = iter(Copy([*tensors, *labels, *pictures]).tensors())
        images = []
        for look in looks:
            here = {name: next(arrived) for name in look}
            count = len(here["plain"])
            images += [{name: of[i] for name, of in here.items()} for i in range(count)]
        on_host = [None if s.label is None else next(arrived) for s in batch.samples]
        return [
            self._look_at(sample, look, label, next(arrived, None))
            for sample, look, label in zip(batch.samples, images, on_host, strict=True)
        ]

    def _look(self, pixels: Tensor) -> dict[str, Tensor]:
        """What the network says of b images that differs from image to image: tensors [b,...].

        Patch tokens of ``plain`` CLIP and ``reformed`` ones; of a ViT also, of `Inside`, the attention of
        `ATTENTIONS`, ``modules`` and ``normed_modules``, and the ``final`` class token.
        """
        seen: dict[str, Tensor] = {}
        if self.backbone.tower.has_modules:
            inside = look_inside(self.backbone, pixels)
            plain = inside.tokens
            seen |= inside.attention | {"final": plain.class_token}
            seen |= {"modules": inside.modules, "normed_modules": inside.normed_modules}
        else:
            plain = self.backbone.with_attention("raw").encode_image(pixels)
        assert self.texts is not None  # set before the first batch
        texts = send(self.texts.features, pixels.device)
        reformed = self.backbone.encode_image(pixels, texts)
        return seen | {"plain": plain.patch_tokens, "reformed": reformed.patch_tokens}

    def _look_at(
        self, sample: Sample, seen: dict[str, Tensor], label: Tensor | None, image: Tensor | None
    ) -> ImageResult:
        """What is measured on an image.

        Args:
            sample: with its labels.
            seen: of `_look`, of this image alone.
            label: the truth.
            image: uint8 [3,S,S'] to draw on, or None.
        """
        positives, size = sample.positives or (), sample.size
        names = [self.info.classes[index] for index in positives]
        if not positives:
            return ImageResult(sample.key, (Facts({"classes": {}}),))
        cosines = self._similarities(seen, positives, self._grid(sample))
        values: dict[str, Tensor] = {}
        drawn: list[partial[Files]] = []
        endings = [f"{i:03d}-{slug(name)}.jpg" for i, name in zip(positives, names, strict=True)]
        if self.selection and "modules" in seen and label is not None:
            foreground, _ = label_masks(label, positives, self.info)
            values["selection"], queries = _selection(seen, cosines, foreground)
            rows = torch.stack([seen[k][1 + queries[k], 1:] for k in ATTENTIONS], dim=1)
            drawn.append(
                partial(draw_rows, rows=rows, queries=queries, grid=cosines.grid, look=self.look)
            )
        if self.affinity and "modules" in seen:
            values |= self._affinity(seen, positives)
        if self.redundancy:
            values["redundancy"], maps = _redundancy(cosines, size)
            drawn.append(partial(draw_maps, maps=maps, look=self.look))
        self.measures.update(values, positives)

        def draw() -> Files:
            assert image is not None  # else it is not called
            return {k: v for one in drawn for k, v in one(image, size, endings).items()}

        facts = Facts(_record(names, values))
        return ImageResult(sample.key, (facts,), None if image is None else draw)

    def _grid(self, sample: Sample) -> tuple[int, int]:
        assert isinstance(sample.image, Tensor)  # decoded
        return self.backbone.tower.grid((sample.image.shape[1], sample.image.shape[2]))

    def _similarities(
        self, seen: dict[str, Tensor], positives: tuple[int, ...], grid: tuple[int, int]
    ) -> Cosines:
        """Cosines on the token grid, plain CLIP's and those of the reformed attention."""
        assert self.texts is not None
        assert self.texts.empty is not None  # both are set before the first batch
        text = torch.cat([self.texts.features[list(positives)], self.texts.empty])
        plain, reformed = (similarity(seen[k][None], text)[0] for k in ("plain", "reformed"))
        return Cosines(plain, reformed, grid)

    def _affinity(self, seen: dict[str, Tensor], positives: tuple[int, ...]) -> dict[str, Tensor]:
        """The modules' affinity [2, 2 * blocks] with positive labels, the final class token's [2]."""
        assert self.texts is not None
        text = self.texts.features
        chosen = list(positives)
        rest = [i for i in range(len(text)) if i not in positives]
        modules = torch.stack([seen["modules"], seen["normed_modules"]]).flatten(1, 2)
        final = [affinity(seen["final"], text[rows]) for rows in (chosen, rest)]
        return {"modules": affinity(modules, text[chosen]), "final": torch.stack(final)}


def _selection(
    seen: dict[str, Tensor], cosines: Cosines, foreground: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """FSR [P, 4] in the order of ``SELECTIONS``, and which patch asks [P] for each attention.

    seen: of `Analysis._look`. foreground: bool [P,H,W]. Void pixels are not of the object, as Eq. 4 has
    it.
    """
    shares = cells(foreground, cosines.grid)
    queries = {
        "raw": strongest(cosines.plain[:, :-1]),
        "consistent": strongest(cosines.architecture[:, :-1]),
    }
    values = [foreground_selection(seen[kind], queries[kind], shares) for kind in ATTENTIONS]
    values.append(foreground_selection(seen["consistent"], queries["raw"], shares))
    return torch.stack([*values, shares.mean(dim=1)], dim=1), queries


def _redundancy(cosines: Cosines, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """[P, 2, 4] by ``STAGES`` and ``DISTANCES``; maps [2, P + 1, H, W], the empty text's last."""
    rows, maps = [], []
    for scores in (cosines.plain, cosines.architecture):
        enlarged_maps = similarity_map(scores[None], cosines.grid, size)[0]
        distance = map_distance(enlarged_maps[:-1], enlarged_maps[-1])
        rows.append(torch.cat([distance, map_likeness(scores[:, :-1], scores[:, -1])], dim=1))
        maps.append(enlarged_maps)
    return torch.stack(rows, dim=1), torch.stack(maps)


def draw_rows(
    image: Tensor,
    size: tuple[int, int],
    endings: list[str],
    *,
    rows: Tensor,
    queries: dict[str, Tensor],
    grid: tuple[int, int],
    look: Look,
) -> Files:
    """Fig. 4a: each label's rows of raw and consistent attention [P, 2, N], the query token in white."""
    drawn = {}
    for p, ending in enumerate(endings):
        pair = heat_maps(image, similarity_map(rows[p].T[None], grid, size)[0], look)
        for one, kind in zip(pair, ATTENTIONS, strict=True):
            mark_cell(one, int(queries[kind][p]), grid)
        drawn[f"attention.{ending}"] = np.concatenate(pair, axis=1)
    return drawn


def draw_maps(
    image: Tensor, size: tuple[int, int], endings: list[str], *, maps: Tensor, look: Look
) -> Files:
    """Fig. 6: maps [2, P + 1, H, W] of labels and the empty text, plain CLIP's and the reformed."""
    pictures = [heat_maps(image, stage, look) for stage in maps]
    return {
        f"redundant.{ending}": np.concatenate(
            [stage[i] for stage in pictures for i in (p, -1)], axis=1
        )
        for p, ending in enumerate(endings)
    }


def _record(names: list[str], values: dict[str, Tensor]) -> dict[str, object]:
    """The json of an image: numbers of each label, and of the modules."""
    labels: dict[str, dict[str, float]] = {name: {} for name in names}
    for i, name in enumerate(names):
        if "selection" in values:
            labels[name] |= _named("FSR_{}", SELECTIONS, values["selection"][i])
        if "redundancy" in values:
            for stage, numbers in zip(STAGES, values["redundancy"][i], strict=True):
                labels[name] |= _named(f"{{}}_{stage}", DISTANCES, numbers)
    record: dict[str, object] = {"classes": labels}
    if "modules" in values:
        plain, normed = values["modules"].tolist()
        positive, negative = values["final"].tolist()
        record["affinity"] = {
            "modules": [_rounded(value) for value in plain],
            "modules_ln_post": [_rounded(value) for value in normed],
            "positive": _rounded(positive),
            "negative": _rounded(negative),
        }
    return record


def _named(name: str, kinds: tuple[str, ...], numbers: Tensor) -> dict[str, float]:
    return {
        name.format(kind): round(number, 6)
        for kind, number in zip(kinds, numbers.tolist(), strict=True)
    }


def _rounded(value: float) -> float | None:
    return None if value != value else round(value, 6)
