"""Cityscapes: labels, official layout, DataModule."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from datamodules._convert import Members, Source, first_of, label_of, mapped, sample_members
from datamodules._datamodule import ShardDataModule
from datamodules._samples import VOID, DatasetInfo

CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The same classes in *_labelIds.png."""
PALETTE = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
INFO = DatasetInfo(name="cityscapes", classes=CLASSES, palette=PALETTE, zero_is_background=False)
IMAGE = "_leftImg8bit.png"


class Cityscapes(ShardDataModule):
    """Cityscapes: 19 classes of street scenes at 2048 x 1024, 255 void.

    The paper segments the 500 images of ``val``, each cut into eight tiles of 512 x 512.
    """

    info = INFO
    registration: ClassVar[str] = (
        "register at https://www.cityscapes-dataset.com, then unpack leftImg8bit_trainvaltest.zip and "
        "gtFine_trainvaltest.zip into --source"
    )
    layout: ClassVar[str] = """\
  leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png ...
  gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png ...   (or *_labelTrainIds.png)"""

    @classmethod
    def source(cls, source: str, split: str = "val") -> Source:
        """The samples of a split in the official layout.

        Args:
            source: folder of the data set.
            split: train or val.

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
        """
        root = Path(source)
        images = first_of((root / "leftImg8bit" / split,), cls.layout)
        maps = first_of((root / "gtFine" / split,), cls.layout)
        found = sorted(images.glob(f"*/*{IMAGE}"))
        items = [(file.name.removesuffix(IMAGE), file.parent.name) for file in found]
        return Source(INFO, split, items, partial(read_sample, images, maps))


def read_sample(images: Path, maps: Path, item: tuple[str, str]) -> Members:
    """The PNG as it is, the label map as train ids, and a json.

    Raises:
        BadSample: a file is missing or broken, or image and map don't fit.
    """
    image_id, city = item
    mask = maps / city / f"{image_id}_gtFine_labelIds.png"
    converted = mask.with_name(f"{image_id}_gtFine_labelTrainIds.png")
    table = np.full(VOID + 1, -1, np.int16)
    if mask.exists() or not converted.exists():
        table[: max(IDS) + 1] = VOID  # ids that don't count in the evaluation
        table[list(IDS)] = range(len(CLASSES))
    else:
        mask = converted
        table[: len(CLASSES)] = range(len(CLASSES))
    table[VOID] = VOID
    label = mapped(label_of(mask), table, mask)
    return sample_members(INFO, image_id, images / city / f"{image_id}{IMAGE}", label)
