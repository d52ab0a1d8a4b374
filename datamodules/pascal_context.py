"""PASCAL Context: labels, official layouts, DataModule."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from datamodules._convert import (
    Members,
    Source,
    SourceError,
    first_of,
    folder_with,
    label_of,
    sample_members,
)
from datamodules._datamodule import ShardDataModule
from datamodules._download import Archive
from datamodules._samples import DatasetInfo, Wording, colour_table
from datamodules._tar import BadSample

CLASSES = (
    "aeroplane",
    "bag",
    "bed",
    "bedclothes",
    "bench",
    "bicycle",
    "bird",
    "boat",
    "book",
    "bottle",
    "building",
    "bus",
    "cabinet",
    "car",
    "cat",
    "ceiling",
    "chair",
    "cloth",
    "computer",
    "cow",
    "cup",
    "curtain",
    "dog",
    "door",
    "fence",
    "floor",
    "flower",
    "food",
    "grass",
    "ground",
    "horse",
    "keyboard",
    "light",
    "motorbike",
    "mountain",
    "mouse",
    "person",
    "plate",
    "platform",
    "pottedplant",
    "road",
    "rock",
    "sheep",
    "shelves",
    "sidewalk",
    "sign",
    "sky",
    "snow",
    "sofa",
    "table",
    "track",
    "train",
    "tree",
    "truck",
    "tvmonitor",
    "wall",
    "water",
    "window",
    "wood",
)
SPACED = {"pottedplant": "potted plant", "tvmonitor": "tv monitor"}
"""The official names, where they join words."""

READABLE = {"aeroplane": "airplane"}
"""As in the list of the paper's released demo."""

INFO = DatasetInfo(
    name="pascal_context",
    classes=CLASSES,
    prompts=tuple(SPACED.get(name, name) for name in CLASSES),
    palette=colour_table(len(CLASSES) + 1)[1:],
)


class PascalContext(ShardDataModule):
    """PASCAL Context: 59 classes on VOC 2010 images, label 0 everything else.

    The paper uses the 5,105 images of ``val`` (5,104 in the common conversion): 224 x 224 for
    explainability, 512 x 512 for segmentation. As a segmentation set it is Context59, which leaves
    the background out, or with ``background`` Context60. ``synonyms readable`` says "airplane" for
    the official "aeroplane".
    """

    info = INFO
    wordings: ClassVar = {"readable": Wording(tuple((READABLE.get(p, p),) for p in INFO.prompts))}
    archives: ClassVar = (
        Archive(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
            "md5:da459979d0c395079b5c75ee67908abb",
        ),
        Archive(
            "https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",
            into="VOCdevkit/VOC2010",
        ),
        Archive(
            "https://cs.stanford.edu/~roozbeh/pascal-context/labels.txt", into="VOCdevkit/VOC2010"
        ),
    )
    layout: ClassVar[str] = """\
  VOCdevkit/VOC2010/               (this folder or one above it)
    JPEGImages/2008_000002.jpg ...
  and either 59 classes
    SegmentationClassContext/2008_000002.png ...   (0 background, 1-59 in alphabetical order)
    ImageSets/SegmentationContext/val.txt
  or the 459 of the release
    trainval/2008_000002.mat ...
    labels.txt
    ImageSets/Main/val.txt"""

    @classmethod
    def source(cls, source: str, split: str = "val") -> Source:
        """The samples of a split in either layout; the PNGs are taken where both are there.

        Args:
            source: folder of the data set.
            split: train, val or trainval.

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
        """
        root = folder_with("JPEGImages", Path(source), "VOC2010", "VOCdevkit/VOC2010")
        first_of((root / "JPEGImages",), cls.layout)
        maps = first_of((root / "SegmentationClassContext", root / "trainval"), cls.layout)
        sets = root / "ImageSets"
        lists = (sets / "SegmentationContext" / f"{split}.txt", sets / "Main" / f"{split}.txt")
        ids = first_of(lists, cls.layout).read_text().split()
        table, variant = None, "59 classes (.png)"
        if maps.name == "trainval":
            table = label_table(first_of((root / "labels.txt", maps / "labels.txt"), cls.layout))
            ids = [image_id for image_id in ids if (maps / f"{image_id}.mat").exists()]
            variant = "459 classes (.mat), mapped by name"
        read = partial(read_sample, root, table)
        return Source(INFO, split, ids, read, extra={"variant": variant})


def label_table(file: Path) -> np.ndarray:
    """Label value of each of the 459 classes, by their names in ``labels.txt`` ("2: aeroplane").

    Raises:
        SourceError: one of the 59 classes isn't in it.
    """
    ids = {}
    for line in file.read_text().splitlines():
        number, _, name = line.partition(":")
        if name:
            ids[name.strip()] = int(number)
    missing = [name for name in CLASSES if name not in ids]
    if missing:
        raise SourceError(f"{file} does not name {', '.join(missing)}")
    table = np.zeros(max(ids.values()) + 1, np.uint8)
    for index, name in enumerate(CLASSES):
        table[ids[name]] = INFO.label_value(index)
    return table


def read_sample(root: Path, table: np.ndarray | None, image_id: str) -> Members:
    """The JPEG as it is, the label map as indices, and a json.

    Raises:
        BadSample: a file is missing or broken, or image and map don't fit.
    """
    if table is None:
        label = label_of(root / "SegmentationClassContext" / f"{image_id}.png")
    else:
        label = label_of_mat(root / "trainval" / f"{image_id}.mat", table)
    return sample_members(INFO, image_id, root / "JPEGImages" / f"{image_id}.jpg", label)


def label_of_mat(file: Path, table: np.ndarray) -> np.ndarray:
    """Label values uint8 [H,W] of a LabelMap with 459 classes.

    Raises:
        BadSample: it can't be read, or has values that ``labels.txt`` doesn't name.
    """
    from scipy.io import loadmat

    try:
        label = np.asarray(loadmat(file, variable_names=["LabelMap"])["LabelMap"]).astype(np.int64)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise BadSample(f"{file} can't be read: {error!r}") from None
    if label.min() < 0 or label.max() >= len(table):
        raise BadSample(f"{file} has values up to {label.max()}, labels.txt up to {len(table) - 1}")
    return table[label]
