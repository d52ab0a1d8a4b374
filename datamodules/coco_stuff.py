"""COCO-Stuff 164k: labels, official layout, DataModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from datamodules import coco
from datamodules._convert import Members, Source, first_of, label_of, mapped, sample_members
from datamodules._datamodule import ShardDataModule
from datamodules._download import Archive
from datamodules._samples import VOID, DatasetInfo

STUFF = (
    "banner",
    "blanket",
    "branch",
    "bridge",
    "building-other",
    "bush",
    "cabinet",
    "cage",
    "cardboard",
    "carpet",
    "ceiling-other",
    "ceiling-tile",
    "cloth",
    "clothes",
    "clouds",
    "counter",
    "cupboard",
    "curtain",
    "desk-stuff",
    "dirt",
    "door-stuff",
    "fence",
    "floor-marble",
    "floor-other",
    "floor-stone",
    "floor-tile",
    "floor-wood",
    "flower",
    "fog",
    "food-other",
    "fruit",
    "furniture-other",
    "grass",
    "gravel",
    "ground-other",
    "hill",
    "house",
    "leaves",
    "light",
    "mat",
    "metal",
    "mirror-stuff",
    "moss",
    "mountain",
    "mud",
    "napkin",
    "net",
    "paper",
    "pavement",
    "pillow",
    "plant-other",
    "plastic",
    "platform",
    "playingfield",
    "railing",
    "railroad",
    "river",
    "road",
    "rock",
    "roof",
    "rug",
    "salad",
    "sand",
    "sea",
    "shelf",
    "sky-other",
    "skyscraper",
    "snow",
    "solid-other",
    "stairs",
    "stone",
    "straw",
    "structural-other",
    "table",
    "tent",
    "textile-other",
    "towel",
    "tree",
    "vegetable",
    "wall-brick",
    "wall-concrete",
    "wall-other",
    "wall-panel",
    "wall-stone",
    "wall-tile",
    "wall-wood",
    "water-other",
    "waterdrops",
    "window-blind",
    "window-other",
    "wood",
)
CLASSES = coco.CLASSES + STUFF
PIXELS = (*(i - 1 for i in coco.IDS), *range(91, 182))
"""Value of each class in the official maps: its id minus 1; the ids of eleven classes are unused."""

ODD = {
    "playingfield": "playing field",
    "waterdrops": "water drops",
    "window-blind": "window blind",
    "ceiling-tile": "ceiling tile",
    "structural-other": "structure",
}


def readable(name: str) -> str:
    """A class name as one says it: ``wall-brick`` is a brick wall, ``sky-other`` just sky."""
    what, _, kind = name.partition("-")
    return ODD.get(name) or (what if kind in ("", "other", "stuff") else f"{kind} {what}")


INFO = DatasetInfo(
    name="coco_stuff",
    classes=CLASSES,
    prompts=tuple(readable(name) for name in CLASSES),
    zero_is_background=False,
)
LAYOUT = """\
  annotations/val2017/000000000139.png ...   (or stuffthingmaps_trainval2017/val2017/, or val2017/;
                                              *_labelTrainIds.png are accepted too)
  images/val2017/000000000139.jpg ...        (or val2017/)"""
MAPS = Archive(
    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
    "stuffthingmaps_trainval2017.zip",
    into="annotations",
)
CONVERTED = "_labelTrainIds.png"


class COCOStuff(ShardDataModule):
    """COCO-Stuff: 171 things and stuff, 255 void.

    The paper segments the 5,000 images of ``val`` at 512 x 512.
    """

    info = INFO
    layout: ClassVar[str] = LAYOUT
    archives: ClassVar = (MAPS, *coco.IMAGES_2017)

    @classmethod
    def source(cls, source: str, split: str = "val") -> Source:
        """The samples of a split in the official layout.

        Args:
            source: folder of the data set.
            split: train or val.

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
        """
        return maps_source(INFO, source, split, as_it_is)


def as_it_is(label: np.ndarray) -> np.ndarray:
    """Class indices are COCO-Stuff's own label values."""
    return label


def maps_source(
    info: DatasetInfo, source: str, split: str, relabel: Callable[[np.ndarray], np.ndarray]
) -> Source:
    """Samples of ``stuffthingmaps``, with ``relabel`` from indices 0-170 and 255 to label values.

    Raises:
        SourceError: the layout isn't there; shows what was expected and found.
    """
    root, name = Path(source), f"{split}2017"
    places = (root / "images" / name, root / name)
    images = next((p for p in places if next(p.glob("*.jpg"), None)), places[0])
    maps = first_of(
        (
            root / "annotations" / name,
            root / "stuffthingmaps_trainval2017" / name,
            root / "stuffthingmaps" / name,
            # a folder that holds the maps only
            root / name if images != root / name else root / "annotations" / name,
        ),
        LAYOUT,
    )
    first_of((images,), LAYOUT)
    converted = next(maps.glob(f"*{CONVERTED}"), None) is not None
    variant = "labelTrainIds (0-170)" if converted else "official ids minus 1 (0-181)"
    ending = CONVERTED if converted else ".png"
    ids = sorted(p.name.removesuffix(ending) for p in maps.glob(f"*{ending}"))
    read = partial(read_sample, info, images, maps, ending, relabel)
    return Source(info, split, ids, read, extra={"variant": variant})


def read_sample(
    info: DatasetInfo,
    images: Path,
    maps: Path,
    ending: str,
    relabel: Callable[[np.ndarray], np.ndarray],
    image_id: str,
) -> Members:
    """The JPEG as it is, the label map as indices, and a json.

    Raises:
        BadSample: a file is missing or broken, or image and map don't fit.
    """
    mask = maps / f"{image_id}{ending}"
    table = np.full(VOID + 1, -1, np.int16)
    table[VOID] = VOID
    table[list(range(len(CLASSES)) if ending == CONVERTED else PIXELS)] = range(len(CLASSES))
    label = relabel(mapped(label_of(mask), table, mask))
    return sample_members(info, image_id, images / f"{image_id}.jpg", label)
