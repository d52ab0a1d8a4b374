"""What sharpens similarity maps by the pixels of the image that they are of; one file each."""

from surgery.refine.pamr import Affinities, pamr

__all__ = ["Affinities", "pamr"]
