"""Multimodal visualisation: which word of its caption does an image fit, and where (Fig. 11)?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules._samples import Batch, Sample
from surgery import Texts, similarity_map
from surgery.captions import CaptionTokens, place_tokens, read_captions
from surgery.devices import send
from surgery.texts import empty_text
from surgery.tokens import rank_tokens, token_similarity
from surgery.towers import ImageTokens
from tasks._draw import Look, caption_figure
from tasks._task import DEFAULT_BACKBONE, BackboneConfig, Task
from tasks._transfer import Copy, Later, send_rows
from tasks.measures.multimodal import TOP, MultimodalMeasures
from tasks.run.image import ImageResult
from tasks.run.results import Facts, Similarities, Tokens


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

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> Sequence[ImageResult]:
        """Scores and ranks of each caption's tokens, and the map of the best one."""
        if not batch.samples:
            return []
        captions = read_captions(self.backbone, [sample.caption or "" for sample in batch.samples])
        encoded = self.encode_images(batch.images)
        groups: dict[object, list[int]] = {}
        for i, sample in enumerate(batch.samples):
            if sample.caption is not None:
                # A CPU takes each by itself, with the digits that it has alone.
                kind = i if self.device.type == "cpu" else encoded[i].grid
                groups.setdefault(kind, []).append(i)
        found = [
            self._rank([encoded[i] for i in group], [captions[i] for i in group])
            for group in groups.values()
        ]
        pictures = batch.images if self.draws else []
        copy = Copy([*(tensor for part in found for tensor in part), *pictures])
        samples = batch.samples
        grids = [tokens.grid for tokens in encoded]

        def make() -> list[ImageResult]:
            arrived = iter(copy.tensors())
            answers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
            for group in groups.values():
                part = (next(arrived), next(arrived), next(arrived))
                for i, scores, order, best in zip(group, *part, strict=True):
                    length = len(captions[i].ids)
                    answers[i] = scores[:length], order[:length], best
            return [
                self._result(sample, captions[i], grids[i], answers.get(i), next(arrived, None))
                for i, sample in enumerate(samples)
            ]

        return Later(len(samples), make)

    def _rank(
        self, images: Sequence[ImageTokens], captions: Sequence[CaptionTokens]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [G,L] of the tokens of G captions, their order, and the best one's similarity [G,N].

        L is the length of the longest; what comes after a caption's end is last in its order.

        Args:
            images: G of one size.
            captions: of each.
        """
        assert self.texts is not None  # set before the first batch
        tokens = ImageTokens(
            torch.cat([image.class_token for image in images]),
            torch.cat([image.patch_tokens for image in images]),
            images[0].grid,
        )
        words = pad_sequence([caption.features for caption in captions], batch_first=True)
        ids = pad_sequence([caption.ids for caption in captions], batch_first=True)
        counts = send_rows([[len(caption.ids) for caption in captions]], words.device)[0]
        scores = token_similarity(tokens.class_token, words)
        if len(captions) > 1:
            after = torch.arange(words.shape[1], device=scores.device) >= counts[:, None]
            scores = scores.masked_fill(after, -torch.inf)
        order = rank_tokens(scores)
        ranked = send(ids, words.device).gather(1, order)
        self.measures.update(ranked, counts, self.backbone.model.vocab_size)
        best = words.gather(1, order[:, :1, None].expand(-1, -1, words.shape[2]))
        best = best[0] if len(best) == 1 else best
        redundant = self.texts.empty if self.redundant else None
        return scores, order, place_tokens(tokens, best, redundant)[:, :, 0]

    def _result(
        self,
        sample: Sample,
        caption: CaptionTokens,
        grid: tuple[int, int],
        found: tuple[Tensor, Tensor, Tensor] | None,
        image: Tensor | None,
    ) -> ImageResult:
        """What is said of an image."""
        if found is None:
            return ImageResult(sample.key, (Facts({"caption": None}),))
        scores, order, best_map = found
        said = Tokens(
            caption=sample.caption or "",
            truncated=caption.truncated,
            tokens=caption.readable,
            scores=[round(score, 6) for score in scores.tolist()],
            ranks=(order.argsort() + 1).tolist(),
        )
        values = best_map.unflatten(0, grid).half().numpy()[None]
        answer = (said, Facts({"size": list(sample.size)}), Similarities(values, single=True))
        draw = None
        if image is not None:
            enlarged = similarity_map(best_map[None, :, None], grid, sample.size)[0, 0]
            best = order[:TOP].tolist()
            draw = partial(draw_figure, image, enlarged, list(said.tokens), best, self.look)
        return ImageResult(sample.key, answer, draw)


def draw_figure(
    image: Tensor, values: Tensor, tokens: list[str], best: list[int], look: Look
) -> dict[str, np.ndarray]:
    """The picture of Fig. 11."""
    return {"caption.jpg": caption_figure(image, values, tokens, best, look)}
