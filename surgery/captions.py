"""Captions against images: which of their tokens an image fits, and where it sees each."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from surgery.backbone import Backbone
from surgery.features import feature_surgery, similarity
from surgery.tokens import readable, token_similarity, tokenise
from surgery.towers import ImageTokens


@dataclass(frozen=True, eq=False)
class CaptionTokens:
    """A caption of L tokens, start and end included, as the text tower reads it.

    Attributes:
        ids: int64 [L].
        features: [L, C], what the text tower says at each token's place.
        truncated: whether the caption went on where the model stops reading.
        readable: the tokens for people, see `surgery.tokens.readable`.
    """

    ids: Tensor
    features: Tensor
    truncated: bool
    readable: list[str]

    def scores(self, class_token: Tensor) -> Tensor:
        """Cosine [L] of an image, by its class token [1, C], with every token."""
        return token_similarity(class_token, self.features[None])[0]


def read_captions(backbone: Backbone, captions: Sequence[str]) -> list[CaptionTokens]:
    """One or more captions, token by token.

    Raises:
        ValueError: no caption.
    """
    tokenizer = backbone.tokenizer
    texts = tokenise(tokenizer, captions, backbone.context_length)
    features = backbone.encode_text_tokens(texts.ids)
    return [
        CaptionTokens(ids[:length], words[:length], cut, readable(tokenizer, ids[:length].tolist()))
        for ids, words, length, cut in zip(
            texts.ids, features, texts.lengths, texts.truncated, strict=True
        )
    ]


def place_tokens(image: ImageTokens, features: Tensor, redundant: Tensor | None) -> Tensor:
    """Where an image shows tokens of its caption.

    Args:
        image: of one or more images.
        features: [L, C], of `CaptionTokens`; or [B, L, C], of each image its own.
        redundant: [1, C], the empty text's feature, which every token loses; None: it loses nothing.

    Returns:
        Similarities [B, h*w, L].
    """
    if redundant is None:
        return similarity(image.patch_tokens, features)
    return feature_surgery(image.patch_tokens, image.class_token, features, redundant=redundant)
