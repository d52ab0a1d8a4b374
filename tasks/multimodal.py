"""Multimodal visualisation: which word of its caption does an image fit, and where (Fig. 11)?"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from datamodules.samples import Batch
from surgery import feature_surgery, similarity, similarity_map
from surgery.tokens import rank_tokens, readable, token_similarity, tokenise
from surgery.towers import ImageTokens
from surgery.visualize import heat_map
from tasks._captions import caption_strip
from tasks.base import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks.measures.multimodal import TOP, MultimodalMeasures
from tasks.run.results import ImageResult


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

    empty: Tensor | None
    """[1,C] feature of the empty text."""

    def __init__(self, backbone: BackboneConfig = DEFAULT_BACKBONE, redundant: bool = True) -> None:
        super().__init__(backbone)
        self.redundant = redundant
        self.register_buffer("empty", None, persistent=False)

    def configure_texts(self) -> None:
        """Captions come with the images; only the empty text is known before."""
        tokenizer = self.backbone.tokenizer
        self.empty = self.backbone.encode_text(tokenizer([""]).to(self.backbone.device))

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[ImageResult]:
        """Scores and ranks of each caption's tokens, and the map of the best one."""
        if not batch.keys:
            return []
        tokenizer = self.backbone.tokenizer
        captions = [caption or "" for caption in batch.captions]
        texts = tokenise(tokenizer, captions, self.backbone.context_length)
        features = self.backbone.encode_text_tokens(texts.ids.to(self.backbone.device))
        results = []
        for i, tokens in enumerate(self.encode_images(batch.images)):
            if batch.captions[i] is None:
                results.append(ImageResult(batch.keys[i], {"json": {"caption": None}}))
                continue
            ids, words = texts.ids[i, : texts.lengths[i]], features[i, : texts.lengths[i]]
            scores = token_similarity(tokens.class_token, words[None])[0]
            order = rank_tokens(scores)
            self.measures.update(ids[order.cpu()], self.backbone.model.vocab_size)
            found = self._similarity(tokens, words[order[:1]])[0, :, 0]
            record = {
                "key": batch.keys[i],
                "caption": batch.captions[i],
                "truncated": texts.truncated[i],
                "tokens": readable(tokenizer, ids.tolist()),
                "scores": [round(score, 6) for score in scores.tolist()],
                "ranks": (order.argsort() + 1).tolist(),
            }
            image = batch.images[i] if self.draws else None
            results.append(_result(record, found, tokens.grid, image, batch.sizes[i]))
        return results

    def _similarity(self, tokens: ImageTokens, text: Tensor) -> Tensor:
        if not self.redundant:
            return similarity(tokens.patch_tokens, text)
        return feature_surgery(tokens.patch_tokens, tokens.class_token, text, redundant=self.empty)


def _result(
    record: dict[str, Any],
    found: Tensor,
    grid: tuple[int, int],
    image: Tensor | None,
    size: tuple[int, int],
) -> ImageResult:
    """Files and the table's row of an image with its best token's similarity [N].

    The image, uint8 [3,S,S'], is only given where it is to be drawn.
    """
    tokens, ranks = record["tokens"], record["ranks"]
    best = [ranks.index(rank) for rank in range(1, min(TOP, len(ranks)) + 1)]
    members = {
        "map.npy": found.unflatten(0, grid).half().cpu().numpy(),
        "json": {**record, "best": tokens[best[0]], "size": list(size), "grid": list(grid)},
    }
    row = {name: value for name, value in record.items() if name != "key"}
    if image is None:
        return ImageResult(record["key"], members, rows={"tokens": row})
    values = similarity_map(found[None, :, None], grid, size)[0, 0]
    draw = partial(draw_figure, image.cpu(), values.cpu(), tokens, best)
    return ImageResult(record["key"], members, draw, {"tokens": row})


def draw_figure(
    image: Tensor, values: Tensor, tokens: list[str], best: list[int]
) -> dict[str, np.ndarray]:
    """The picture of Fig. 11: image, map, and below them the caption with its best tokens coloured.

    image uint8 [3,S,S'], enlarged to the map [H,W] in [0, 1].
    """
    large = F.interpolate(image[None].float(), size=values.shape, mode="bilinear", antialias=True)
    picture = large[0].round().clamp(0, 255).byte().permute(1, 2, 0)
    pair = np.concatenate([picture.numpy(), heat_map(picture, values).numpy()], axis=1)
    return {"caption.jpg": np.concatenate([pair, caption_strip(tokens, best, pair.shape[1])])}
