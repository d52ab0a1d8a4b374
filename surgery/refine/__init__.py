"""What sharpens similarity maps by the pixels of the image that they are of; one file each."""

from collections.abc import Callable, Mapping

from torch import Tensor

from surgery.refine.pamr import Affinities, pamr

REFINEMENTS: Mapping[str, Callable[[Tensor], Callable[[Tensor], Tensor]]] = {
    "pamr": lambda image: Affinities.of(image).refine_one,
}
"""By name, what makes of a normalised image [1, 3, H, W] a function that refines its maps [c, H, W]."""

__all__ = ["REFINEMENTS", "Affinities", "pamr"]
