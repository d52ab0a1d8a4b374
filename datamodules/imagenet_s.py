"""ImageNet-S: segmentation of ImageNet's validation images; labels, official layout, DataModule."""

from __future__ import annotations

import io
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from datamodules._convert import Members, Source, SourceError, first_of, folder_with, sample_members
from datamodules._datamodule import ShardDataModule
from datamodules._dataset_json import read_dataset_json
from datamodules._remote import is_remote
from datamodules._samples import DatasetInfo
from datamodules._tar import BadSample

CLASSES_50 = {
    "n01443537": "goldfish",
    "n01491361": "tiger shark",
    "n01531178": "goldfinch",
    "n01644373": "tree frog",
    "n02104029": "Kuvasz",
    "n02119022": "red fox",
    "n02123597": "Siamese cat",
    "n02133161": "American black bear",
    "n02165456": "ladybug",
    "n02281406": "sulphur butterfly",
    "n02325366": "cottontail rabbit",
    "n02342885": "hamster",
    "n02396427": "wild boar",
    "n02483362": "gibbon",
    "n02504458": "African bush elephant",
    "n02510455": "giant panda",
    "n02690373": "airliner",
    "n02747177": "trash can",
    "n02783161": "ballpoint pen",
    "n02814533": "station wagon",
    "n02859443": "boathouse",
    "n02917067": "high-speed train",
    "n02992529": "mobile phone",
    "n03014705": "storage chest",
    "n03047690": "clogs",
    "n03095699": "container ship",
    "n03197337": "digital watch",
    "n03201208": "dining table",
    "n03445777": "golf ball",
    "n03452741": "grand piano",
    "n03584829": "clothes iron",
    "n03630383": "lab coat",
    "n03775546": "mixing bowl",
    "n03791053": "vespa",
    "n03874599": "padlock",
    "n03891251": "park bench",
    "n04026417": "purse",
    "n04335435": "tram",
    "n04380533": "table lamp",
    "n04404412": "television",
    "n04447861": "toilet seat",
    "n04507155": "umbrella",
    "n04522168": "vase",
    "n04557648": "water bottle",
    "n04562935": "water tower",
    "n04612504": "sailboat",
    "n06794110": "traffic or street sign",
    "n07749582": "lemon",
    "n07831146": "carbonara",
    "n12998815": "agaric",
}
"""Synset -> readable name of ImageNet-S50, in the order of the label values."""

SIZES = (50, 300, 919)
IGNORED = 1000
"""Value of void pixels in the official masks, R + 256 G."""

INFO = DatasetInfo(name="imagenet_s", classes=tuple(CLASSES_50.values()))


class ImageNetS(ShardDataModule):
    """ImageNet-S50, S300 or S919: label 0 everything else.

    The paper evaluates explainability on the 752 images of S50's ``validation``. Which of the three the
    shards hold is written beside them; of remote shards, S50 is expected.
    """

    info = INFO
    registration: ClassVar[str] = (
        "register at https://image-net.org for the images, then make the folder with the tools of "
        "github.com/LUSSeg/ImageNet-S, which also has the masks"
    )
    layout: ClassVar[str] = """\
  ImageNetS50/                     (this folder or one above it; or ImageNetS300, ImageNetS919)
    validation/n01443537/ILSVRC2012_val_00000262.JPEG ...
    validation-segmentation/n01443537/ILSVRC2012_val_00000262.png ...   (or beside the images)"""

    def __init__(self, shards: str | list[str], **kwargs: Any) -> None:
        described = described_by(shards)
        if described.get("dataset") == INFO.name:
            self.info = DatasetInfo(INFO.name, tuple(described["classes"]))
        super().__init__(shards, **kwargs)

    @classmethod
    def source(
        cls, source: str, split: str = "validation", categories: str | None = None
    ) -> Source:
        """The samples of a split in the official layout.

        Args:
            source: folder of the data set.
            split: validation or train-semi.
            categories: file that lists the synsets, one a line (ImageNetS_categories_im300.txt); by
                default the folders of the split say which they are.

        Raises:
            SourceError: the layout isn't there; shows what was expected and found.
        """
        split = "validation" if split == "val" else split
        root = folder_with(split, Path(source), *(f"ImageNetS{size}" for size in SIZES))
        images = first_of((root / split,), cls.layout)
        maps = root / f"{split}-segmentation"
        maps = maps if maps.exists() else images
        synsets = find_synsets(images, Path(categories) if categories else None)
        names = CLASSES_50 if synsets == list(CLASSES_50) else readable_names()
        classes = tuple(names.get(synset, synset) for synset in synsets)
        items = [
            (image.stem, image.parent.name, image.name)
            for synset in synsets
            for image in sorted((images / synset).glob("*"))
            if image.suffix.lower() in (".jpeg", ".jpg")
        ]
        info = DatasetInfo(INFO.name, classes)
        extra = {"variant": f"ImageNet-S{len(synsets)}", "synsets": synsets}
        return Source(info, split, items, partial(read_sample, info, images, maps), extra=extra)


def described_by(shards: str | list[str]) -> dict[str, Any]:
    """The ``dataset.json`` beside local shards; empty where there is none."""
    first = shards if isinstance(shards, str) else shards[0]
    folder = Path(first) if Path(first).is_dir() else Path(first).parent
    return {} if is_remote(first) else read_dataset_json(folder)


def find_synsets(images: Path, categories: Path | None) -> list[str]:
    """The synsets in the order of the label values, which is that of their names.

    Raises:
        SourceError: the folders don't say which of the three data sets it is.
    """
    if categories:
        return sorted(
            line.split()[0] for line in categories.read_text().splitlines() if line.strip()
        )
    folders = sorted(p.name for p in images.iterdir() if p.is_dir() and p.name.startswith("n"))
    if folders and set(folders) <= set(CLASSES_50):
        return list(CLASSES_50)
    if len(folders) not in SIZES:
        raise SourceError(
            f"{images} has {len(folders)} synset folders, not 50, 300 or 919: give the official list "
            f"with --categories ImageNetS_categories_im300.txt"
        )
    return folders


def readable_names() -> dict[str, str]:
    """Synset -> the name that open_clip uses, of ImageNet's thousand."""
    from open_clip import IMAGENET_CLASSNAMES

    listed = resources.files("timm.data._info").joinpath("imagenet_synsets.txt").read_text()
    return dict(zip(listed.split(), IMAGENET_CLASSNAMES, strict=True))


def read_sample(info: DatasetInfo, images: Path, maps: Path, item: tuple[str, str, str]) -> Members:
    """The JPEG as it is, the label map as indices, and a json.

    Raises:
        BadSample: a file is missing or broken, or image and mask don't fit.
    """
    image_id, synset, name = item
    label = label_of_rgb(maps / synset / f"{image_id}.png").copy()
    label[label == IGNORED] = info.void
    return sample_members(info, image_id, images / synset / name, label)


def label_of_rgb(mask: Path) -> np.ndarray:
    """Values R + 256 G, int32 [H,W], of an official mask.

    Raises:
        BadSample: it isn't there, is broken, or no RGB PNG.
    """
    try:
        with Image.open(io.BytesIO(mask.read_bytes()), formats=("PNG",)) as image:
            if image.mode != "RGB":
                raise BadSample(f"{mask} has mode {image.mode}, expected RGB")
            rgb = np.asarray(image).astype(np.int32)
    except FileNotFoundError:
        raise BadSample(f"{mask} is missing") from None
    except OSError as error:
        raise BadSample(f"{mask} can't be read: {error}") from None
    value: np.ndarray = rgb[..., 0] + 256 * rgb[..., 1]
    return value
