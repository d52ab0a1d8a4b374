"""SAM and SAM 2 through transformers: points on an image in, one mask a set of points out."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InvalidSetting
from surgery.fingerprint import Fingerprint
from surgery.sources import download


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

    def forward(
        self, image: Tensor, prompts: Sequence[tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, float]]:
        """The best mask of each prompt, by SAM's own estimate of its IoU.

        The image is encoded once, and the points of a prompt go through the decoder in one call.

        Args:
            image: uint8 [3,H,W].
            prompts: points [K,2] as (x, y) in pixels of the image, and labels [K], 1 on the object and
                0 off it; one or more points each.

        Returns:
            for each prompt its mask, bool [H,W], and the estimated IoU.
        """
        counts = [len(labels) for _, labels in prompts]
        if not counts:
            return []
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
        return [self._decode(embedding, group, signs, sizes) for group, signs in groups]

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
