"""Multimodal visualisation: which word of its caption does an image fit, and where (Fig. 11)?"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor

from datamodules._samples import Batch
from surgery import Texts, similarity_map
from surgery.captions import place_tokens, read_captions
from surgery.texts import empty_text
from surgery.tokens import rank_tokens
from tasks._draw import Look, caption_figure
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.measures.multimodal import TOP, MultimodalMeasures
from tasks.run.results import Facts, ImageResult, Similarities, Tokens


class Multimodal(Task):
    """Which tokens of its caption does each image fit, and where is the best one?

    Every token of the caption, [start] and [end] included, has a feature: what the text tower says
    at its position. Their cosines with the image's class token rank them, and the best one gets a
    similarity map. A sample without a caption has no result but says so.

    Args:
        backbone: which CLIP, and how it is read.
        redundant: remove what the token's feature shares with the empty text before the map is made;
            the authors advise against it for whole sentences.
    """

    needs = ("captions",)

    measured_by = MultimodalMeasures
    measures: MultimodalMeasures

    def __init__(self, backbone: BackboneConfig = DEFAULT_BACKBONE, redundant: bool = True) -> None:
        super().__init__(backbone)
        self.redundant = redundant

    def configure_texts(self) -> None:
        """Captions come with the images; only the empty text is known before."""
        empty = empty_text(self.backbone)  # also in place of classes, of which there are none
        self.texts = Texts(empty, empty)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """Scores and ranks of each caption's tokens, and the map of the best one."""
        if not batch.samples:
            return []
        assert self.texts is not None  # set before the first batch
        redundant = self.texts.empty if self.redundant else None
        captions = read_captions(self.backbone, [sample.caption or "" for sample in batch.samples])
        results = []
        encoded = self.encode_images(batch.images)
        for i, (sample, tokens) in enumerate(zip(batch.samples, encoded, strict=True)):
            if sample.caption is None:
                results.append(ImageResult(sample.key, (Facts({"caption": None}),)))
                continue
            caption = captions[i]
            scores = caption.scores(tokens.class_token)
            order = rank_tokens(scores)
            self.measures.update(caption.ids[order.cpu()], self.backbone.model.vocab_size)
            best_map = place_tokens(tokens, caption.features[order[:1]], redundant)[0, :, 0]
            said = Tokens(
                caption=sample.caption,
                truncated=caption.truncated,
                tokens=caption.readable,
                scores=[round(score, 6) for score in scores.tolist()],
                ranks=(order.argsort() + 1).tolist(),
            )
            answer = (
                said,
                Facts({"size": list(sample.size)}),
                Similarities(
                    best_map.unflatten(0, tokens.grid).half().cpu().numpy()[None], single=True
                ),
            )
            draw = None
            if self.draws:
                values = similarity_map(best_map[None, :, None], tokens.grid, sample.size)[0, 0]
                best = order[:TOP].tolist()
                picture = batch.images[i].cpu()
                drawn = (picture, values.cpu(), list(said.tokens), best, self.look)
                draw = partial(draw_figure, *drawn)
            results.append(ImageResult(sample.key, answer, draw))
        return results


def draw_figure(
    image: Tensor, values: Tensor, tokens: list[str], best: list[int], look: Look
) -> dict[str, np.ndarray]:
    """The picture of Fig. 11."""
    return {"caption.jpg": caption_figure(image, values, tokens, best, look)}
