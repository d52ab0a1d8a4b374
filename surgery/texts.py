"""The texts that images are compared with, and what a single one is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.backbone import Backbone
from surgery.prompts import TEMPLATES, encode_prompts


@dataclass(frozen=True)
class Texts:
    """T texts as features, and the empty text beside them.

    They are float32, and stay so: no part of a network, they are not cast with it.

    Attributes:
        features: [T, C].
        empty: [1, C], feature of the empty text, in which there is nothing but what all texts
            share; None where it was not asked for.
    """

    features: Tensor
    empty: Tensor | None = None

    @classmethod
    def encode(
        cls, backbone: Backbone, names: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> "Texts":
        """Names in all templates, see `encode_prompts`; of a single one, the empty text as well."""
        texts = cls(encode_prompts(backbone, backbone.tokenizer, names, templates))
        return cls(texts.features, texts.redundant(backbone))

    def redundant(self, backbone: Backbone, *, alone: bool = False) -> Tensor | None:
        """What `feature_surgery` takes from each text.

        Several texts lose what they share; a single one shares nothing with others, so it loses
        the empty text.

        Args:
            backbone: encodes the empty text where there is none yet.
            alone: each of several texts is taken by itself, too.

        Returns:
            The feature [1, C] of the empty text; None for what the texts share.
        """
        if len(self) != 1 and not alone:
            return None
        return empty_text(backbone) if self.empty is None else self.empty

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Sequence[int]) -> "Texts":
        return Texts(self.features[rows], self.empty)

    def to(self, device: torch.device | str) -> "Texts":
        """The same on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def clone(self) -> "Texts":
        """Copies without a gradient."""
        return self._map(lambda tensor: tensor.detach().clone())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Texts":
        return Texts(change(self.features), None if self.empty is None else change(self.empty))


def empty_text(backbone: Backbone) -> Tensor:
    """Feature [1, C] of the empty text, not normalised, in float32."""
    with torch.no_grad(), torch.autocast(backbone.device.type, enabled=False):
        return backbone.encode_text(backbone.tokenizer([""]).to(backbone.device)).float()
