"""ADE20K scene parsing (ADEChallengeData2016): labels, official layout, DataModule."""

# ruff: noqa: E501  (the official lines as they are)
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from datamodules._convert import Members, Source, first_of, folder_with, label_of, sample_members
from datamodules._datamodule import ShardDataModule
from datamodules._download import Archive
from datamodules._samples import DatasetInfo, Wording

SYNONYMS = (
    "wall",
    "building, edifice",
    "sky",
    "floor, flooring",
    "tree",
    "ceiling",
    "road, route",
    "bed",
    "windowpane, window",
    "grass",
    "cabinet",
    "sidewalk, pavement",
    "person, individual, someone, somebody, mortal, soul",
    "earth, ground",
    "door, double door",
    "table",
    "mountain, mount",
    "plant, flora, plant life",
    "curtain, drape, drapery, mantle, pall",
    "chair",
    "car, auto, automobile, machine, motorcar",
    "water",
    "painting, picture",
    "sofa, couch, lounge",
    "shelf",
    "house",
    "sea",
    "mirror",
    "rug, carpet, carpeting",
    "field",
    "armchair",
    "seat",
    "fence, fencing",
    "desk",
    "rock, stone",
    "wardrobe, closet, press",
    "lamp",
    "bathtub, bathing tub, bath, tub",
    "railing, rail",
    "cushion",
    "base, pedestal, stand",
    "box",
    "column, pillar",
    "signboard, sign",
    "chest of drawers, chest, bureau, dresser",
    "counter",
    "sand",
    "sink",
    "skyscraper",
    "fireplace, hearth, open fireplace",
    "refrigerator, icebox",
    "grandstand, covered stand",
    "path",
    "stairs, steps",
    "runway",
    "case, display case, showcase, vitrine",
    "pool table, billiard table, snooker table",
    "pillow",
    "screen door, screen",
    "stairway, staircase",
    "river",
    "bridge, span",
    "bookcase",
    "blind, screen",
    "coffee table, cocktail table",
    "toilet, can, commode, crapper, pot, potty, stool, throne",
    "flower",
    "book",
    "hill",
    "bench",
    "countertop",
    "stove, kitchen stove, range, kitchen range, cooking stove",
    "palm, palm tree",
    "kitchen island",
    "computer, computing machine, computing device, data processor, electronic computer, information processing system",
    "swivel chair",
    "boat",
    "bar",
    "arcade machine",
    "hovel, hut, hutch, shack, shanty",
    "bus, autobus, coach, charabanc, double-decker, jitney, motorbus, motorcoach, omnibus, passenger vehicle",
    "towel",
    "light, light source",
    "truck, motortruck",
    "tower",
    "chandelier, pendant, pendent",
    "awning, sunshade, sunblind",
    "streetlight, street lamp",
    "booth, cubicle, stall, kiosk",
    "television, television receiver, television set, tv, tv set, idiot box, boob tube, telly, goggle box",
    "airplane, aeroplane, plane",
    "dirt track",
    "apparel, wearing apparel, dress, clothes",
    "pole",
    "land, ground, soil",
    "bannister, banister, balustrade, balusters, handrail",
    "escalator, moving staircase, moving stairway",
    "ottoman, pouf, pouffe, puff, hassock",
    "bottle",
    "buffet, counter, sideboard",
    "poster, posting, placard, notice, bill, card",
    "stage",
    "van",
    "ship",
    "fountain",
    "conveyer belt, conveyor belt, conveyer, conveyor, transporter",
    "canopy",
    "washer, automatic washer, washing machine",
    "plaything, toy",
    "swimming pool, swimming bath, natatorium",
    "stool",
    "barrel, cask",
    "basket, handbasket",
    "waterfall, falls",
    "tent, collapsible shelter",
    "bag",
    "minibike, motorbike",
    "cradle",
    "oven",
    "ball",
    "food, solid food",
    "step, stair",
    "tank, storage tank",
    "trade name, brand name, brand, marque",
    "microwave, microwave oven",
    "pot, flowerpot",
    "animal, animate being, beast, brute, creature, fauna",
    "bicycle, bike, wheel, cycle",
    "lake",
    "dishwasher, dish washer, dishwashing machine",
    "screen, silver screen, projection screen",
    "blanket, cover",
    "sculpture",
    "hood, exhaust hood",
    "sconce",
    "vase",
    "traffic light, traffic signal, stoplight",
    "tray",
    "ashcan, trash can, garbage can, wastebin, ash bin, ash-bin, ashbin, dustbin, trash barrel, trash bin",
    "fan",
    "pier, wharf, wharfage, dock",
    "crt screen",
    "plate",
    "monitor, monitoring device",
    "bulletin board, notice board",
    "shower",
    "radiator",
    "glass, drinking glass",
    "clock",
    "flag",
)
"""The official synonyms of each class; the first is its name."""

WORDS = tuple(tuple(line.split(", ")) for line in SYNONYMS)
INFO = DatasetInfo(name="ade20k", classes=tuple(words[0] for words in WORDS))


class ADE20K(ShardDataModule):
    """ADE20K: 150 classes of scenes, label 0 everything else.

    Evaluations of training-free segmentation compare on the 2,000 images of ``val``; what has label 0
    doesn't count there.
    """

    info = INFO
    wordings: ClassVar = {"official": Wording(WORDS)}
    archives: ClassVar = (
        Archive(
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
        ),
    )
    layout: ClassVar[str] = """\
  ADEChallengeData2016/            (this folder or one above it)
    images/validation/ADE_val_00000001.jpg ...
    annotations/validation/ADE_val_00000001.png ..."""

    @classmethod
    def source(cls, source: str, split: str = "val") -> Source:
        """The samples of a split in the official layout.

        Args:
            source: folder of the data set.
            split: train or val.

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
        """
        part = {"val": "validation", "train": "training"}.get(split, split)
        root = folder_with(f"annotations/{part}", Path(source), "ADEChallengeData2016")
        maps = first_of((root / "annotations" / part,), cls.layout)
        images = first_of((root / "images" / part,), cls.layout)
        ids = sorted(p.stem for p in maps.glob("*.png"))
        return Source(INFO, split, ids, partial(read_sample, images, maps))


def read_sample(images: Path, maps: Path, image_id: str) -> Members:
    """The JPEG as it is, the label map as indices, and a json.

    Raises:
        BadSample: a file is missing or broken, or image and map don't fit.
    """
    label = label_of(maps / f"{image_id}.png")
    return sample_members(INFO, image_id, images / f"{image_id}.jpg", label)
