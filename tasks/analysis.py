"""The paper's looks into CLIP: attention, modules, redundant features (Figures 4 to 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import InvalidSetting
from datamodules.samples import Batch
from surgery import feature_surgery, similarity
from surgery.analysis import (
    ATTENTIONS,
    MODULES,
    BlockView,
    affinity,
    cells,
    check_blocks,
    foreground_selection,
    map_likeness,
    walk_blocks,
)
from tasks.base import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.measures.analysis import AnalysisMeasures
from tasks.measures.base import label_masks
from tasks.run.results import Facts, ImageResult


class Analysis(Task):
    """What does CLIP's attention select, what do its modules say, and what do all texts share?

    Three analyses of the paper, each measured on the positive labels of every image, averaged over
    the images of a class and then over classes. The numbers of each image are in its json, those of
    the run in one csv an analysis, with a plot.

    Args:
        backbone: which CLIP, and how it is read. The first two analyses look into the blocks of a
            plain ViT whatever ``attention`` says, the third at the maps that it gives.
        selection: mFSR of raw and consistent self-attention in every block (Eq. 4, Fig. 4b); needs
            masks. How it is measured: ``surgery.analysis.foreground_selection``.
        affinity: cosine of every attention and FFN module's output with the text features of the
            positive labels (Eq. 5, Fig. 5).
        redundancy: how like the maps of positive labels are to the empty text's, before and after
            feature surgery (Fig. 6).
        text_features: safetensors file with features of the class texts, in place of prompts.
    """

    needs = ("classes", "mask")

    measured_by = AnalysisMeasures
    measures: AnalysisMeasures

    empty: Tensor | None
    """[1,C] feature of the empty text."""

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
        self.register_buffer("empty", None, persistent=False)

    def configure_texts(self) -> None:
        """Class texts, and the empty one; a backbone without blocks is refused here already."""
        if self.selection or self.affinity:
            check_blocks(self.backbone)
        super().configure_texts()
        tokenizer = self.backbone.tokenizer
        self.empty = self.backbone.encode_text(tokenizer([""]).to(self.backbone.device))

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """All numbers of each image."""
        results = []
        for i, (key, image) in enumerate(zip(batch.keys, batch.images, strict=True)):
            positives, label = batch.positives[i] or (), batch.labels[i]
            values: dict[str, Tensor] = {}
            if positives:
                values = self._measure(image, positives, label)
                self.measures.update(values, positives)
            names = [self.info.classes[index] for index in positives]
            results.append(ImageResult(key, (Facts(_record(names, values)),)))
        return results

    def _measure(
        self, image: Tensor, positives: tuple[int, ...], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Analysis -> values [P, ...] of an image uint8 [3,S,S'] and its positive labels."""
        pixels = self.backbone.preprocess(image[None])
        values: dict[str, Tensor] = {}
        if self.redundancy:
            values["redundancy"] = self._redundancy(pixels, positives)
        if self.selection or self.affinity:
            values |= self._look_inside(pixels, positives, label)
        return values

    def _redundancy(self, pixels: Tensor, positives: tuple[int, ...]) -> Tensor:
        """[P, 2 stages, 2 kinds of likeness] to the empty text's map."""
        assert self.text is not None
        assert self.empty is not None  # both are set before the first batch
        tokens = self.backbone.encode_image(pixels)
        plain = similarity(tokens.patch_tokens, torch.cat([self.text, self.empty]))[0]
        freed = feature_surgery(
            tokens.patch_tokens,
            tokens.class_token,
            self.text,
            redundant=self.empty if len(self.text) == 1 else None,
        )[0]
        chosen = list(positives)
        maps = (plain[:, chosen], freed[:, chosen])
        return torch.stack([map_likeness(m, plain[:, -1]) for m in maps], dim=1)

    def _look_inside(
        self, pixels: Tensor, positives: tuple[int, ...], label: Tensor | None
    ) -> dict[str, Tensor]:
        """Selection [P, blocks, 2 attentions, 3 ratios], affinity [P, blocks, 2 modules, 2 tokens]."""
        assert self.text is not None
        text = self.text[list(positives)]
        selected: list[Tensor] = []
        affine: list[Tensor] = []

        def see(block: BlockView) -> None:
            if self.selection and label is not None:
                inside, counted = self._cells(label, positives, block.grid)
                ratios = [
                    foreground_selection(block.weights[kind][0, 1:, 1:], inside, counted)
                    for kind in ATTENTIONS
                ]
                selected.append(torch.stack(ratios, dim=1))
            if self.affinity:
                angles = [affinity(block.outputs[module][0], text) for module in MODULES]
                affine.append(torch.stack(angles, dim=1))

        walk_blocks(self.backbone, pixels, see)
        lists = {"selection": selected, "affinity": affine}
        return {name: torch.stack(rows, dim=1) for name, rows in lists.items() if rows}

    def _cells(
        self, label: Tensor, positives: tuple[int, ...], grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """bool [P,N]: cells that an object covers by half or more, and those not mostly void."""
        foreground, valid = label_masks(label, positives, self.info)
        foreground = foreground & valid
        return cells(foreground, grid) >= 0.5, cells(valid.expand_as(foreground), grid) > 0.5


def _record(names: list[str], values: dict[str, Tensor]) -> dict[str, object]:
    """The json of an image: class -> analysis -> nested lists, NaN as null."""
    return {
        name: {kind: _rounded(numbers[i].tolist()) for kind, numbers in values.items()}
        for i, name in enumerate(names)
    }


def _rounded(value: object) -> object:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return None if value != value else round(value, 6)
    return value
