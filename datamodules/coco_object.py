"""COCO-Object: the 80 things of COCO-Stuff's maps against everything else."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from common.errors import InvalidSetting
from datamodules import coco, coco_stuff, voc
from datamodules._convert import Source
from datamodules._datamodule import ShardDataModule
from datamodules._samples import VOID, DatasetInfo, Wording

CLASSES = coco.CLASSES
INFO = DatasetInfo(
    name="coco_object",
    classes=CLASSES,
    palette=coco.PALETTE,
    background_words=("background",),
)
PERSON = (*voc.PERSON, "body")
NOT_INDOORS = tuple(
    word
    for word in voc.BACKGROUND_WORDS
    if word
    not in ("lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "fence")
)
"""ProxyCLIP's words for the background: those of VOC21 but for furniture and parts of rooms."""


class COCOObject(ShardDataModule):
    """COCO-Object: 80 objects and the background (stuff and unlabelled), for segmentation.

    Evaluations of training-free segmentation compare on the 5,000 images of ``val``.
    """

    info = INFO
    layout: ClassVar[str] = coco_stuff.LAYOUT
    archives: ClassVar = coco_stuff.COCOStuff.archives
    wordings: ClassVar = {
        "sclip": Wording(
            tuple(PERSON if name == "person" else (name,) for name in CLASSES), voc.BACKGROUND_WORDS
        ),
        "proxyclip": Wording(tuple((name,) for name in CLASSES), NOT_INDOORS),
    }

    @classmethod
    def source(cls, source: str, split: str = "val", unlabelled: str = "background") -> Source:
        """The samples of a split in the layout of COCO-Stuff.

        Args:
            source: folder of the data set.
            split: train or val.
            unlabelled: what pixels without any label count as: background or void.

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
            InvalidSetting: another word than these two.
        """
        if unlabelled not in ("background", "void"):
            raise InvalidSetting(f"--unlabelled is background or void, not {unlabelled!r}")
        relabel = unlabelled_is_void if unlabelled == "void" else unlabelled_is_background
        found = coco_stuff.maps_source(INFO, source, split, relabel)
        found.extra["unlabelled"] = unlabelled
        return found


def unlabelled_is_background(label: np.ndarray) -> np.ndarray:
    """Label values [H,W] of objects from those of COCO-Stuff."""
    return np.where(label < len(CLASSES), label + 1, 0).astype(np.uint8)


def unlabelled_is_void(label: np.ndarray) -> np.ndarray:
    """The same with 255 left as it is."""
    return np.where(label == VOID, VOID, unlabelled_is_background(label)).astype(np.uint8)
