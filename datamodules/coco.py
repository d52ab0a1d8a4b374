"""COCO 2017 objects: labels, official layout, DataModule."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from datamodules._convert import (
    Members,
    Source,
    SourceError,
    first_of,
    image_members,
    image_size,
    json_bytes,
    png_bytes,
)
from datamodules._datamodule import ShardDataModule
from datamodules._download import Archive
from datamodules._samples import VOID, DatasetInfo
from datamodules._tar import BadSample

CLASSES = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Official ids between 1 and 90 that no class has."""
PALETTE = (
    (220, 20, 60),
    (119, 11, 32),
    (0, 0, 142),
    (0, 0, 230),
    (106, 0, 228),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 70),
    (0, 0, 192),
    (250, 170, 30),
    (100, 170, 30),
    (220, 220, 0),
    (175, 116, 175),
    (250, 0, 30),
    (165, 42, 42),
    (255, 77, 255),
    (0, 226, 252),
    (182, 182, 255),
    (0, 82, 0),
    (120, 166, 157),
    (110, 76, 0),
    (174, 57, 255),
    (199, 100, 0),
    (72, 0, 118),
    (255, 179, 240),
    (0, 125, 92),
    (209, 0, 151),
    (188, 208, 182),
    (0, 220, 176),
    (255, 99, 164),
    (92, 0, 73),
    (133, 129, 255),
    (78, 180, 255),
    (0, 228, 0),
    (174, 255, 243),
    (45, 89, 255),
    (134, 134, 103),
    (145, 148, 174),
    (255, 208, 186),
    (197, 226, 255),
    (171, 134, 1),
    (109, 63, 54),
    (207, 138, 255),
    (151, 0, 95),
    (9, 80, 61),
    (84, 105, 51),
    (74, 65, 105),
    (166, 196, 102),
    (208, 195, 210),
    (255, 109, 65),
    (0, 143, 149),
    (179, 0, 194),
    (209, 99, 106),
    (5, 121, 0),
    (227, 255, 205),
    (147, 186, 208),
    (153, 69, 1),
    (3, 95, 161),
    (163, 255, 0),
    (119, 0, 170),
    (0, 182, 199),
    (0, 165, 120),
    (183, 130, 88),
    (95, 32, 0),
    (130, 114, 135),
    (110, 129, 133),
    (166, 74, 118),
    (219, 142, 185),
    (79, 210, 114),
    (178, 90, 62),
    (65, 70, 15),
    (127, 167, 115),
    (59, 105, 106),
    (142, 108, 45),
    (196, 172, 0),
    (95, 54, 80),
    (128, 76, 255),
    (201, 57, 1),
    (246, 0, 122),
    (191, 162, 208),
)
IDS = tuple(i for i in range(1, 91) if i not in UNUSED_IDS)
"""Official category id of each class."""

INFO = DatasetInfo(name="coco", classes=CLASSES, palette=PALETTE)
ANNOTATIONS = Archive(
    "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
    "md5:f4bbac642086de4f52a3fdda2de5fa2c",
)
IMAGES_2017 = (
    Archive(
        "http://images.cocodataset.org/zips/val2017.zip",
        "md5:442b8da7639aecaf257c1dceb8ba8c80",
        splits=("val",),
    ),
    Archive(
        "http://images.cocodataset.org/zips/train2017.zip",
        "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
        splits=("train",),
    ),
)


class Region(NamedTuple):
    """One annotation: class index, whether it is a crowd, and its polygons or RLE."""

    label: int
    crowd: bool
    segmentation: Any


class COCO(ShardDataModule):
    """COCO 2017: 80 objects, one mask a class and image; masks of different classes may overlap.

    The paper evaluates explainability on the 5,000 images of ``val``. Images without annotations are
    kept: they have no positive labels.
    """

    info = INFO
    archives: ClassVar = (ANNOTATIONS, *IMAGES_2017)
    layout: ClassVar[str] = """\
  annotations/instances_val2017.json
  val2017/000000000139.jpg ...       (or images/val2017/)"""

    @classmethod
    def source(
        cls,
        source: str,
        split: str = "val",
        year: int = 2017,
        crowd: Literal["void", "foreground"] = "void",
    ) -> Source:
        """The samples of a split in the official layout.

        Args:
            source: folder of the data set.
            split: train or val, or with its year: val2017.
            year: 2017 or 2014.
            crowd: what crowd regions (iscrowd 1) count as. With ``void`` they are neither foreground
                nor background of their class, and a class that an image has only as a crowd is no
                positive label of it.

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
        """
        root = Path(source)
        name = split if split.endswith(("2014", "2017")) else f"{split}{year}"
        file = first_of((root / "annotations" / f"instances_{name}.json",), cls.layout)
        images = first_of((root / name, root / "images" / name), cls.layout)
        try:
            listed = json.loads(file.read_bytes())
            items = collect(listed)
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{file} is not a COCO instances file: {error!r}") from None
        return Source(
            INFO, name[:-4], items, partial(read_sample, images, crowd), extra={"crowd": crowd}
        )


def collect(listed: dict[str, Any]) -> list[tuple[str, str, int, int, list[Region]]]:
    """(id, file name, width, height, regions) of all images, in order of their file names.

    Raises:
        SourceError: the categories are not COCO's.
    """
    index_of = {category: index for index, category in enumerate(IDS)}
    for category in listed["categories"]:
        index = index_of.get(category["id"])
        if index is None or CLASSES[index] != category["name"]:
            raise SourceError(
                f"category {category['id']} {category['name']!r} is not one of COCO's 80"
            )
    regions: dict[int, list[Region]] = {image["id"]: [] for image in listed["images"]}
    for found in listed["annotations"]:
        region = Region(
            index_of[found["category_id"]], bool(found.get("iscrowd")), found["segmentation"]
        )
        regions[found["image_id"]].append(region)
    images = sorted(listed["images"], key=lambda image: image["file_name"])
    return [
        (Path(i["file_name"]).stem, i["file_name"], i["width"], i["height"], regions[i["id"]])
        for i in images
    ]


def read_sample(images: Path, crowd: str, item: tuple[str, str, int, int, list[Region]]) -> Members:
    """The JPEG as it is, a mask for every positive label, and a json.

    Raises:
        BadSample: the image is missing or broken, or has another size than the annotations say.
    """
    image_id, file_name, width, height, regions = item
    image = images / file_name
    if image_size(image) != (width, height):
        raise BadSample(f"{image} is not {width}x{height} as its annotations say")
    members = image_members(image_id, image)
    positives = []
    for index in sorted({region.label for region in regions}):
        mask = np.zeros((height, width), np.uint8)
        of_class = [region for region in regions if region.label == index]
        # Objects after crowds: what is an object of the class is foreground in any case.
        for region in sorted(of_class, key=lambda r: not r.crowd):
            value = VOID if region.crowd and crowd == "void" else 1
            mask[rasterise(region.segmentation, height, width)] = value
        if (mask == 1).any():
            positives.append(index)
            members[f"{index:03d}.mask.png"] = png_bytes(mask, mask_palette(index, mask))
    record = {"id": image_id, "width": width, "height": height, "positives": positives}
    members["json"] = json_bytes(record)
    return members


def mask_palette(index: int, mask: np.ndarray) -> list[int]:
    """Colours of a class's mask: black, the class's, and light grey for void where there is any.

    A PNG gets no more bits a pixel than its palette needs: two colours make it one bit.
    """
    colours = [0, 0, 0, *PALETTE[index]]
    return colours + [224, 224, 192] * (VOID - 1) if (mask == VOID).any() else colours


def rasterise(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Mask bool [H,W] of polygons, or of an RLE with its counts as a list or packed."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        packed = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        packed = mask.frPyObjects(segmentation, height, width)
    else:
        packed = segmentation
    found: np.ndarray = mask.decode(packed).astype(bool)
    return found
