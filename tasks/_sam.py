"""SAM and SAM 2 through transformers, and what tasks that use them share."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import InvalidSetting
from datamodules._datamodule import ShardDataModule
from surgery.fingerprint import Fingerprint
from surgery.sources import download
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.run.results import Masks, Points

Prompt = tuple[Tensor, Tensor]
"""Points [K,2] as (x, y) in pixels of an image, and labels [K], 1 on the object and 0 off it."""


def need_transformers() -> None:
    """Check that the extra is installed.

    Raises:
        InvalidSetting: says how to install it.
    """
    if find_spec("transformers") is None:
        raise InvalidSetting(
            "--model.sam needs transformers: `pip install clip-surgery-lightning[sam]`. Without "
            "--model.sam, points and their accuracy are there all the same"
        )


class SamTask(Task):
    """Base of tasks that may give points to SAM, ``--model.sam``.

    Args:
        backbone: see `Task`.
        text_features: see `Task`.
        sam: weights of SAM or SAM 2, see `PointSegmenter`.
    """

    def __init__(
        self,
        backbone: BackboneConfig = DEFAULT_BACKBONE,
        text_features: str | None = None,
        sam: str | None = None,
    ) -> None:
        super().__init__(backbone, text_features)
        self.sam = sam
        self.segmenter: PointSegmenter | None = None

    def setup(self, stage: str) -> None:
        """Also load SAM, which reads images at their own size."""
        self.wants_originals |= self.sam is not None
        super().setup(stage)
        if self.sam is not None:
            self.segmenter = PointSegmenter(self.sam)

    def check_data(self, datamodule: ShardDataModule) -> None:
        """Also refuse SAM where it is not installed."""
        super().check_data(datamodule)
        if self.sam is not None:
            need_transformers()

    def networks(self) -> list[str]:
        """CLIP's, and SAM's."""
        return [*super().networks(), *([f"SAM from {self.sam}"] if self.sam else [])]

    def fingerprints(self) -> dict[str, str]:
        """Digests of the weights of the backbone and of SAM."""
        sam = {} if self.segmenter is None else {"sam": self.segmenter.fingerprint()}
        return {**super().fingerprints(), **sam}

    def segment(
        self, original: Tensor | None, prompts: Sequence[Prompt]
    ) -> list[tuple[Tensor, float]]:
        """SAM's mask of each prompt on an image at its own size, and its score; none without SAM."""
        if self.segmenter is None or original is None:
            return []
        found: list[tuple[Tensor, float]] = self.segmenter(original, prompts)
        return found


def points_result(
    size: tuple[int, int],
    names: Sequence[str],
    numbers: Sequence[int],
    prompts: Sequence[Prompt],
    masks: Sequence[tuple[Tensor, float]],
    *,
    words: bool = False,
) -> Points:
    """Points of P texts and their masks as a result.

    Args:
        size: (height, width) of the image.
        names: of the texts.
        numbers: class index of each, or its place.
        prompts: points of each.
        masks: what `SamTask.segment` made of them.
        words: see `Masks`.
    """
    return Points(
        size,
        {name: points.tolist() for name, (points, _) in zip(names, prompts, strict=True)},
        {name: labels.tolist() for name, (_, labels) in zip(names, prompts, strict=True)},
        Masks(names, numbers, np.stack([m.numpy() for m, _ in masks]), words) if masks else None,
        [score for _, score in masks],
    )


class PointSegmenter(nn.Module):
    """A frozen SAM or SAM 2.

    Args:
        name: of the weights on the Hugging Face hub (facebook/sam-vit-base,
            facebook/sam2.1-hiera-tiny, ...), or a folder with weights and processor.

    Raises:
        InvalidSetting: a folder with nothing of the kind, or neither SAM nor SAM 2.
        DownloadFailed: a name that can't be fetched.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        need_transformers()
        import transformers

        config = _fetch(transformers.AutoConfig, name)
        # SAM 2 is published with the weights of its video model, of which the image model is a part.
        kinds = {"sam": "Sam", "sam2": "Sam2", "sam2_video": "Sam2"}
        if config.model_type not in kinds:
            raise InvalidSetting(
                f"--model.sam {name} is a {config.model_type!r}, expected one of {', '.join(kinds)}"
            )
        kind = kinds[config.model_type]
        self.model: Any = _fetch(getattr(transformers, f"{kind}Model"), name)
        self.processor: Any = _fetch(getattr(transformers, f"{kind}Processor"), name)
        self.requires_grad_(False)
        self.eval()

    def fingerprint(self) -> str:
        """Digest of all weights."""
        return Fingerprint().of(self.model, {})

    def forward(self, image: Tensor, prompts: Sequence[Prompt]) -> list[tuple[Tensor, float]]:
        """The best mask of each prompt, by SAM's own estimate of its IoU.

        The image is encoded once, and the points of a prompt go through the decoder in one call.

        Args:
            image: uint8 [3,H,W].
            prompts: points and their labels.

        Returns:
            for each prompt its mask, bool [H,W], and the estimated IoU; for one without points nothing,
            and 0.
        """
        counts = [len(labels) for _, labels in prompts if len(labels)]
        nothing = torch.zeros(image.shape[1:], dtype=torch.bool), 0.0
        if not counts:
            return [nothing for _ in prompts]
        points = [point.tolist() for group, _ in prompts for point in group]
        labels = [int(label) for _, group in prompts for label in group]
        # As a single prompt: the processor only brings the points to the network's scale.
        inputs = self.processor(
            images=image.permute(1, 2, 0).cpu().numpy(),
            input_points=[[points]],
            input_labels=[[labels]],
            return_tensors="pt",
        )
        device = self.model.device
        embedding = self.model.get_image_embeddings(inputs["pixel_values"].to(device))
        groups = zip(
            inputs["input_points"].float().to(device).split(counts, dim=2),
            inputs["input_labels"].to(device).split(counts, dim=2),
            strict=True,
        )
        sizes = {k: inputs[k] for k in ("original_sizes", "reshaped_input_sizes") if k in inputs}
        found = (self._decode(embedding, group, signs, sizes) for group, signs in groups)
        return [next(found) if len(labels) else nothing for _, labels in prompts]

    def _decode(
        self, embedding: Any, points: Tensor, labels: Tensor, sizes: dict[str, Tensor]
    ) -> tuple[Tensor, float]:
        found = self.model(
            image_embeddings=embedding,
            input_points=points,
            input_labels=labels,
            multimask_output=True,
        )
        best = int(found.iou_scores[0, 0].argmax())
        masks = found.pred_masks[:, :, best : best + 1].float().cpu()
        mask = self.processor.post_process_masks(masks, **sizes)[0][0, 0]
        return mask.to(torch.bool), float(found.iou_scores[0, 0, best])


def _fetch(kind: Any, name: str) -> Any:
    """What transformers makes of a folder, or of a name on the hub."""
    if not Path(name).is_dir():
        return download(
            f"--model.sam {name}",
            lambda: kind.from_pretrained(name),
            "give a folder with SAM's weights and processor",
        )
    try:
        return kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InvalidSetting(f"--model.sam {name}: {' '.join(str(error).split())}") from None
