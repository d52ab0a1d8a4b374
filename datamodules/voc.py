"""PASCAL VOC 2012 semantic segmentation: labels, official layout, DataModule."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from datamodules._convert import Members, Source, first_of, folder_with, label_of, sample_members
from datamodules._datamodule import ShardDataModule
from datamodules._download import Archive
from datamodules._samples import DatasetInfo, Wording, colour_table

CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
SPACED = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
"""The official names, where they join words."""

READABLE = {"aeroplane": "airplane"}
BACKGROUND_WORDS = (
    "sky",
    "wall",
    "tree",
    "wood",
    "grass",
    "road",
    "sea",
    "river",
    "mountain",
    "sands",
    "desk",
    "bed",
    "building",
    "cloud",
    "lamp",
    "door",
    "window",
    "wardrobe",
    "ceiling",
    "shelf",
    "curtain",
    "stair",
    "floor",
    "hill",
    "rail",
    "fence",
)
"""What stands for the background of VOC21 in the evaluations of SCLIP, NACLIP and ProxyCLIP."""

RENAMED = {"boat": ("ship",), "diningtable": ("table",)}
CLOTHES = ("shirt", "jeans", "dress", "sweater", "skirt", "jacket")
PERSON = ("person", *(f"person in {c}" for c in CLOTHES))
TV = ("television monitor", "tv monitor", "monitor", "television", "screen")
SCLIP = {**RENAMED, "person": PERSON, "tvmonitor": TV}
INFO = DatasetInfo(
    name="voc",
    classes=CLASSES,
    prompts=tuple(SPACED.get(name, name) for name in CLASSES),
    palette=colour_table(len(CLASSES) + 1)[1:],
    zero_is_background=True,
)


class VOC(ShardDataModule):
    """PASCAL VOC 2012: 20 objects, label 0 background, 255 void (object borders).

    The paper evaluates explainability on the 1,449 images of ``val`` at 224 x 224 (Table 1). As a
    segmentation set it is VOC20, which leaves the background out, or with ``background`` VOC21.
    ``synonyms readable`` says "airplane" for the official "aeroplane".
    """

    info = INFO
    wordings: ClassVar = {
        "sclip": Wording(tuple(SCLIP.get(name, (name,)) for name in CLASSES), BACKGROUND_WORDS),
        "readable": Wording(tuple((READABLE.get(p, p),) for p in INFO.prompts)),
        "proxyclip": Wording(
            tuple(RENAMED.get(name, (name,)) for name in CLASSES), BACKGROUND_WORDS
        ),
    }
    archives: ClassVar = (
        Archive(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
        ),
    )
    layout: ClassVar[str] = """\
  VOCdevkit/VOC2012/               (this folder or one above it)
    ImageSets/Segmentation/val.txt
    JPEGImages/2007_000033.jpg ...
    SegmentationClass/2007_000033.png ..."""

    @classmethod
    def source(cls, source: str, split: str = "val") -> Source:
        """The samples of a split in the official layout.

        Args:
            source: folder of the data set.
            split: train, val or trainval.

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
        """
        root = folder_with("ImageSets", Path(source), "VOC2012", "VOCdevkit/VOC2012")
        ids = first_of((root / "ImageSets" / "Segmentation" / f"{split}.txt",), cls.layout)
        for needed in ("JPEGImages", "SegmentationClass"):
            first_of((root / needed,), cls.layout)
        return Source(INFO, split, tuple(ids.read_text().split()), partial(read_sample, root))


def read_sample(root: Path, image_id: str) -> Members:
    """The JPEG as it is, the label map as indices, and a json.

    Raises:
        BadSample: a file is missing, or image and mask don't fit.
    """
    label = label_of(root / "SegmentationClass" / f"{image_id}.png")
    return sample_members(INFO, image_id, root / "JPEGImages" / f"{image_id}.jpg", label)
