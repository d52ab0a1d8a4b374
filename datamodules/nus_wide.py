"""NUS-WIDE: 81 concepts, official layout, DataModule."""

from __future__ import annotations

import ast
import csv
from functools import partial
from pathlib import Path
from typing import ClassVar

from datamodules._convert import (
    Members,
    Source,
    SourceError,
    first_of,
    image_members,
    image_size,
    json_bytes,
)
from datamodules._datamodule import ShardDataModule
from datamodules._samples import DatasetInfo, Wording

CLASSES = (
    "airport",
    "animal",
    "beach",
    "bear",
    "birds",
    "boats",
    "book",
    "bridge",
    "buildings",
    "cars",
    "castle",
    "cat",
    "cityscape",
    "clouds",
    "computer",
    "coral",
    "cow",
    "dancing",
    "dog",
    "earthquake",
    "elk",
    "fire",
    "fish",
    "flags",
    "flowers",
    "food",
    "fox",
    "frost",
    "garden",
    "glacier",
    "grass",
    "harbor",
    "horses",
    "house",
    "lake",
    "leaf",
    "map",
    "military",
    "moon",
    "mountain",
    "nighttime",
    "ocean",
    "person",
    "plane",
    "plants",
    "police",
    "protest",
    "railroad",
    "rainbow",
    "reflection",
    "road",
    "rocks",
    "running",
    "sand",
    "sign",
    "sky",
    "snow",
    "soccer",
    "sports",
    "statue",
    "street",
    "sun",
    "sunset",
    "surf",
    "swimmers",
    "tattoo",
    "temple",
    "tiger",
    "tower",
    "town",
    "toy",
    "train",
    "tree",
    "valley",
    "vehicle",
    "water",
    "waterfall",
    "wedding",
    "whales",
    "window",
    "zebra",
)
READABLE = {
    "dancing": "people dancing",
    "nighttime": "night time",
    "plane": "airplane",
    "protest": "people protesting",
    "running": "people running",
    "surf": "surfing",
}
INFO = DatasetInfo(
    name="nus_wide",
    classes=CLASSES,
    labels="positives",
)
Item = tuple[str, str, tuple[int, ...]]
"""Id, path below the folder of the images, indices of the concepts."""


class NUSWide(ShardDataModule):
    """NUS-WIDE: photographs from Flickr with 81 concepts, no masks.

    The paper recognises the concepts of the test images. Many of these are gone from Flickr: what is
    missing is left out, counted and listed in ``dataset.json``, and metrics stand over the images that
    there are. The words are the official ones; ``synonyms readable`` has friendlier ones ("night time",
    "people dancing").
    """

    info = INFO
    wordings: ClassVar = {
        "readable": Wording(tuple((READABLE.get(name, name),) for name in CLASSES))
    }
    registration: ClassVar[str] = (
        "ask the authors for the images (lms.comp.nus.edu.sg/research/NUS-WIDE.htm), then unpack them "
        "beside ImageList and Groundtruth"
    )
    layout: ClassVar[str] = """\
  ImageList/TestImagelist.txt                              (folder\\0001_417187631.jpg, one a line)
  Groundtruth/TrainTestLabels/Labels_airport_Test.txt ...  (0 or 1, one a line; 81 files)
  Flickr/boats/0001_417187631.jpg ...                      (or images/)
  or, instead of the lists,
  nus_wid_data.csv                                         (filepath,label,split_name)"""

    @classmethod
    def source(cls, source: str, split: str = "test") -> Source:
        """The samples of a split in either layout.

        Args:
            source: folder of the data set.
            split: train or test (of the csv: as it names them; val is taken for test).

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
        """
        root = Path(source)
        tables = sorted(root.glob("*.csv"))
        lists = root / "ImageList" / f"{split.capitalize()}Imagelist.txt"
        if tables and not lists.exists():
            items = from_csv(tables[0], split)
            images = root
            variant = f"csv ({tables[0].name})"
        else:
            items = from_lists(root, first_of((lists,), cls.layout), split, cls.layout)
            images = first_of((root / "Flickr", root / "images", root / "Images"), cls.layout)
            variant = "official lists"
        return Source(INFO, split, items, partial(read_sample, images), extra={"variant": variant})


def from_lists(root: Path, file: Path, split: str, layout: str) -> list[Item]:
    """The official lists: paths, and for each concept a column of 0 and 1.

    Raises:
        SourceError: a column is missing, or has another length than the list.
    """
    paths = [
        line.strip().replace("\\", "/") for line in file.read_text().splitlines() if line.strip()
    ]
    folder = root / "Groundtruth" / "TrainTestLabels"
    folder = folder if folder.exists() else root / "TrainTestLabels"
    positives: list[list[int]] = [[] for _ in paths]
    for index, name in enumerate(CLASSES):
        column = first_of((folder / f"Labels_{name}_{split.capitalize()}.txt",), layout)
        values = column.read_text().split()
        if len(values) != len(paths) or not set(values) <= {"0", "1"}:
            raise SourceError(f"{column} should have {len(paths)} lines of 0 or 1, like {file}")
        for row, value in zip(positives, values, strict=True):
            if value == "1":
                row.append(index)
    return [(make_id(p), p, tuple(row)) for p, row in zip(paths, positives, strict=True)]


def from_csv(file: Path, split: str) -> list[Item]:
    """The table in common use: ``filepath``, ``label`` (a list of concepts), ``split_name``.

    Raises:
        SourceError: other columns, unknown concepts, or no line of the split.
    """
    index_of = {name: index for index, name in enumerate(CLASSES)}
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    splits = sorted({row.get("split_name") or "" for row in rows})
    wanted = split if split in splits or split != "test" else "val"
    items = []
    try:
        for row in rows:
            if row["split_name"] == wanted:
                names = ast.literal_eval(row["label"]) if row["label"].strip() else []
                indices = sorted({index_of[name] for name in names})
                path = row["filepath"].replace("\\", "/")
                items.append((make_id(path), path, tuple(indices)))
    except (KeyError, ValueError, SyntaxError) as error:
        raise SourceError(
            f"{file} should have the columns filepath, label, split_name and the concepts' official "
            f"spelling: {error!r}"
        ) from None
    if not items:
        raise SourceError(f"{file} has no line of the split {wanted!r}; it has {splits}")
    return items


def make_id(path: str) -> str:
    """An image's id: the same file name occurs in several folders."""
    return path.rsplit(".", 1)[0].strip("/").replace("/", "-")


def read_sample(images: Path, item: Item) -> Members:
    """The JPEG as it is, and a json with the positive labels.

    Raises:
        BadSample: the image is missing or broken.
    """
    image_id, path, positives = item
    image = images / path
    width, height = image_size(image)
    record = {"id": path, "width": width, "height": height, "positives": list(positives)}
    return {**image_members(image_id, image), "json": json_bytes(record)}
