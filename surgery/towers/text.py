"""CLIP's text tower: texts to features, whole or token by token."""

from typing import Any

import torch
from torch import Tensor, nn

from common.errors import InvalidSetting
from surgery.devices import send
from surgery.precision import wide_norm


class TextTower:
    """The text side of an open_clip model, on its weights.

    Attributes:
        model: open_clip's model.
        name: as it is called in errors.
        context_length: longest text in tokens.
        causal: attention is causal and a text is read off at its end token (the largest id), as
            CLIP's is; only such a tower has a feature for each token.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        self.context_length = int(model.context_length)
        text = self._text
        pooling = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        masked = getattr(text, "attn_mask", None) is not None
        self.causal = pooling == "argmax" and masked and getattr(text, "cls_emb", None) is None

    @property
    def _text(self) -> Any:
        return getattr(self.model, "text", self.model)

    def encode(self, token_ids: Tensor) -> Tensor:
        """Features of texts; what follows the longest text's end is not computed.

        Args:
            token_ids: integers [T, L], L at most `context_length`.

        Returns:
            [T, C], not normalised.

        Raises:
            InvalidSetting: the ids are not the model's.
        """
        self._check(token_ids)
        if not self.causal:
            # Other poolings may read any position: give them the length they were trained on.
            padding = self.context_length - token_ids.shape[1]
            pad_id = getattr(self._text, "pad_id", 0)
            padded = nn.functional.pad(token_ids, (0, padding), value=pad_id)
            features: Tensor = self.model.encode_text(padded)
            return features
        end = token_ids.argmax(dim=-1)
        states = self._states(token_ids[:, : int(end.max()) + 1])
        return self._project(states[torch.arange(len(end), device=end.device), end])

    def encode_tokens(self, token_ids: Tensor) -> Tensor:
        """Features [T, L, C] of every token of texts [T, L], not normalised.

        Of ids of the host, a GPU is not asked whether they are the model's.
        """
        self._check(token_ids)
        self._need_causal()
        return self._project(self._states(send(token_ids, self.model.logit_scale.device)))

    def encode_embedded(self, embeddings: Tensor) -> Tensor:
        """Features [T, L, C] at every position of embedded texts [T, L, D]; see `Backbone`."""
        self._need_causal()
        width = self.table.shape[1]
        if embeddings.ndim != 3 or embeddings.shape[2] != width:
            raise ValueError(
                f"embeddings: expected [T, L, {width}], given {list(embeddings.shape)}"
            )
        return self._project(self._run(embeddings.to(self.table.dtype)))

    @property
    def table(self) -> Tensor:
        """Embeddings [V, D] of the tokens of the vocabulary."""
        weight: Tensor = self._text.token_embedding.weight
        return weight

    def taught(self) -> Tensor | None:
        """Which tokens of the vocabulary the weights know, bool [V]; None: there is no saying.

        A token that no weights were stored for has nothing but zeros.
        """
        table = getattr(getattr(self._text, "token_embedding", None), "weight", None)
        return None if table is None else (table != 0).any(dim=1).cpu()

    def _states(self, token_ids: Tensor) -> Tensor:
        return self._run(self._text.token_embedding(token_ids))

    def _run(self, x: Tensor) -> Tensor:
        """Token embeddings [T, L, D] through the text tower's blocks."""
        text, length = self._text, x.shape[1]
        x = x + text.positional_embedding[:length]
        mask = text.attn_mask[:length, :length]
        states: Tensor = text.transformer(x, attn_mask=mask.to(x.dtype))
        return states

    def _project(self, states: Tensor) -> Tensor:
        """Final norm and projection, in float32."""
        with torch.autocast(states.device.type, enabled=False):
            x = wide_norm(self._text.ln_final, states)
            projection = self._text.text_projection
            if projection is None:
                return x
            if isinstance(projection, nn.Linear):
                bias = None if projection.bias is None else projection.bias.to(x.dtype)
                return nn.functional.linear(x, projection.weight.to(x.dtype), bias)
            return x @ projection.to(x.dtype)

    def _need_causal(self) -> None:
        if not self.causal:
            raise InvalidSetting(f"{self.name}: its text tower has no feature for each token")

    def _check(self, token_ids: Tensor) -> None:
        if token_ids.ndim != 2 or token_ids.is_floating_point():
            raise InvalidSetting(
                f"token_ids: expected integers [T, L], given {token_ids.dtype} "
                f"{list(token_ids.shape)}"
            )
        if not 0 < token_ids.shape[1] <= self.context_length:
            raise InvalidSetting(
                f"token_ids: expected 1 to {self.context_length} positions, "
                f"given {token_ids.shape[1]}"
            )
        if not len(token_ids):
            raise ValueError("token_ids: expected one or more texts, given none")
        if not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self.model.vocab_size:
            raise InvalidSetting(
                f"token_ids: expected ids from 0 to {self.model.vocab_size - 1}, given "
                f"{int(token_ids.min())} to {int(token_ids.max())}; is the tokenizer the model's?"
            )
