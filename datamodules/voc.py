"""PASCAL VOC 2012 semantic segmentation: labels, official layout, DataModule."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from datamodules._convert import Members, Source, need_folder, sample_members
from datamodules._decode import read_index_png
from datamodules._tar import BadSample
from datamodules.samples import DatasetInfo, colour_table
from datamodules.shards import ShardDataModule

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
READABLE = {
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv monitor",
}
INFO = DatasetInfo(
    name="voc",
    classes=CLASSES,
    prompts=tuple(READABLE.get(name, name) for name in CLASSES),
    palette=colour_table(len(CLASSES) + 1)[1:],
    background=True,
)


class VOC(ShardDataModule):
    """PASCAL VOC 2012: 20 objects, label 0 background, 255 void (object borders).

    The paper evaluates explainability on the 1,449 images of ``val`` at 224 x 224 (Table 1).
    """

    info = INFO
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
        folder = Path(source)
        places = (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012")
        root = next((r for r in places if (r / "ImageSets").exists()), folder)
        ids = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        need_folder(ids, cls.layout)
        need_folder(root / "JPEGImages", cls.layout)
        need_folder(root / "SegmentationClass", cls.layout)
        return Source(INFO, split, tuple(ids.read_text().split()), partial(read_sample, root))


def read_sample(root: Path, image_id: str) -> Members:
    """The JPEG as it is, the label map as indices, and a json.

    Raises:
        BadSample: a file is missing, or image and mask don't fit.
    """
    image = root / "JPEGImages" / f"{image_id}.jpg"
    mask = root / "SegmentationClass" / f"{image_id}.png"
    for path in (image, mask):
        if not path.exists():
            raise BadSample(f"{path} is missing")
    label = read_index_png(mask.read_bytes())
    return sample_members(INFO, image_id, image, label)
