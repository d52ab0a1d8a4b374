"""Texts token by token: what each token is, and how well its feature fits an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.precision import widen

START, END = "[start]", "[end]"
_LONGEST = 50  # characters of a token


@dataclass(frozen=True)
class TokenisedTexts:
    """T texts as a text tower reads them.

    Attributes:
        ids: int64 [T, L], L the length of the longest text; what follows a text's end token is
            padding.
        lengths: tokens of each text, start and end included.
        truncated: whether the text had more tokens than the model reads, so that its end token
            replaced one of them.
    """

    ids: Tensor
    lengths: tuple[int, ...]
    truncated: tuple[bool, ...]


def tokenise(tokenizer: Any, texts: Sequence[str], context_length: int) -> TokenisedTexts:
    """Token ids of one or more texts, cropped to the longest.

    Args:
        tokenizer: open_clip's, whose end token has the largest id.
        texts: T of them.
        context_length: most tokens that the model reads.

    Returns:
        The texts, token by token.

    Raises:
        ValueError: no text.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts: expected a list of one or more texts, given {texts!r}")
    # Byte-pair encoding takes quadratic time in the length of a word, and what is cut off below is
    # far beyond the last token that is read.
    most = _LONGEST * context_length
    texts = [" ".join(text[: 16 * most].split())[:most] for text in texts]
    ids = tokenizer(texts, context_length=context_length)
    # A text that is cut ends at the last place there is; with one more, at the one after.
    room = tokenizer(texts, context_length=context_length + 1)
    ends = ids.argmax(dim=-1)
    truncated = (room.argmax(dim=-1) >= context_length).tolist()
    longest = int(ends.max()) + 1
    return TokenisedTexts(
        ids[:, :longest], tuple((ends + 1).tolist()), tuple(bool(cut) for cut in truncated)
    )


def readable(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The tokens of one text, start and end included, as words for people.

    Args:
        tokenizer: open_clip's.
        ids: of the text's tokens.

    Returns:
        One a token: the first is "[start]", the last "[end]"; a BPE piece that does not end its
        word is followed by "-" ("trou-", "ser"); bytes that are only a part of a character are
        shown as U+FFFD.

    Example:
        >>> from open_clip import SimpleTokenizer
        >>> tokenizer = SimpleTokenizer()
        >>> readable(tokenizer, [49406, *tokenizer.encode("a zebracorn"), 49407])
        ['[start]', 'a', 'ze-', 'brac-', 'orn', '[end]']
    """
    return [START, *(piece(tokenizer, index) for index in ids[1:-1]), END]


def piece(tokenizer: Any, index: int) -> str:
    """One token of the vocabulary, not start or end, as in `readable`."""
    if not hasattr(tokenizer, "byte_decoder"):  # a Hugging Face tokenizer: its own notation
        return str(tokenizer.tokenizer.convert_ids_to_tokens(index))
    if index not in tokenizer.decoder:
        return f"[{index}]"
    text = str(tokenizer.decode([index]))
    return text.rstrip() if text.endswith(" ") else f"{text}-"


def token_similarity(class_token: Tensor, token_features: Tensor) -> Tensor:
    """Cosine of images with every token of their own texts.

    Args:
        class_token: [B, C].
        token_features: [B, L, C] as `Backbone.encode_text_tokens` gives them.

    Returns:
        [B, L], in [-1, 1].

    Raises:
        ValueError: shapes that do not fit.
    """
    if token_features.ndim != 3 or class_token.shape != (
        token_features.shape[0],
        token_features.shape[2],
    ):
        raise ValueError(
            f"expected class_token [B, C] and token_features [B, L, C], given "
            f"{list(class_token.shape)} and {list(token_features.shape)}"
        )
    with torch.autocast(class_token.device.type, enabled=False):
        image = F.normalize(widen(class_token), dim=-1)
        return (F.normalize(widen(token_features), dim=-1) @ image[:, :, None])[:, :, 0]


def rank_tokens(scores: Tensor) -> Tensor:
    """Positions [..., L] of tokens from the highest score [..., L] to the lowest; of equals the first."""
    return scores.argsort(descending=True, stable=True)
