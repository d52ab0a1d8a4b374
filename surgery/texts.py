"""The texts that images are compared with, and what a single one is compared with."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.backbone import Backbone
from surgery.prompts import TEMPLATES, encode_prompts
from surgery.tokens import piece

log = logging.getLogger(__name__)

_FEW = 60  # words of a vocabulary that is told in full


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
        """Names in all templates, see `encode_prompts`; of a single one, the empty text as well.

        Names with words that the model was never taught are warned of.
        """
        warn_of_unknown(backbone, names)
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


def warn_of_unknown(backbone: Backbone, names: Sequence[str]) -> None:
    """Warn of names with words that the weights know nothing of, as those of the demo do of most."""
    if warning := about_unknown(backbone, names):
        log.warning("%s", warning)


def about_unknown(backbone: Backbone, names: Sequence[str]) -> str:
    """Which names have words that the weights know nothing of, in a sentence or two; else nothing."""
    taught = backbone.text_tower.taught()
    if taught is None or taught.all():
        return ""
    unknown = {name: words for name in names if (words := unknown_words(backbone, name, taught))}
    if not unknown:
        return ""
    told = (
        f"{name!r}" if words == name.split() else f"{name!r} ({', '.join(words)})"
        for name, words in unknown.items()
    )
    ids = taught.nonzero()[:, 0].tolist()
    vocabulary = sorted(word for i in ids if (word := piece(backbone.tokenizer, i)).isalpha())
    few = f": {', '.join(vocabulary)}" if len(vocabulary) <= _FEW else ""
    return (
        f"{backbone.title} was never taught the words of {', '.join(told)}: their maps and scores mean "
        f"nothing. It knows {len(vocabulary)} words{few}"
    )


def unknown_words(backbone: Backbone, name: str, taught: Tensor) -> list[str]:
    """Words of a name with a token that is not among those of which ``taught`` [V] is true."""
    words = name.split()
    if not words:
        return []
    rows = backbone.tokenizer(words)
    return [
        word
        for word, ids, end in zip(words, rows, rows.argmax(dim=-1), strict=True)
        if not taught[ids[1:end]].all()
    ]
