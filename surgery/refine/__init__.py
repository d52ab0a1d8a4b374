"""What sharpens similarity maps by the pixels of the image that they are of; one file each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from surgery.refine.pamr import DILATIONS, Affinities, pamr
from surgery.refine.tlp import tlp

__all__ = ["REFINEMENTS", "Affinities", "Refinement", "pamr", "tlp"]


@dataclass(frozen=True)
class Refinement:
    """A way to refine maps.

    Attributes:
        prepare: of a normalised image [1, 3, H, W], texts [T, C] and options, makes what refines maps
            [T, H, W].
        options: names of its options.
        together: whether it needs the maps of all texts at once.
    """

    prepare: Callable[..., Callable[[Tensor], Tensor]]
    options: tuple[str, ...]
    together: bool = False


def _prepare_pamr(
    image: Tensor, text: Tensor, *, dilations: tuple[int, ...] = DILATIONS, **options: Any
) -> Callable[[Tensor], Tensor]:
    known = Affinities.of(image, dilations)
    return lambda maps: known.refine(maps[None], **options)[0]


def _prepare_tlp(image: Tensor, text: Tensor, **options: Any) -> Callable[[Tensor], Tensor]:
    return partial(tlp, image, text=text, **options)


REFINEMENTS: Mapping[str, Refinement] = {
    "pamr": Refinement(_prepare_pamr, ("steps", "dilations")),
    "tlp": Refinement(_prepare_tlp, ("grid",), together=True),
}
"""Values of ``--model.refine``."""
