"""Data in: one file a data set (its labels, how its layout becomes shards, its DataModule)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules._datamodule import ShardDataModule
    from datamodules.ade20k import ADE20K
    from datamodules.cityscapes import Cityscapes
    from datamodules.coco import COCO
    from datamodules.coco_object import COCOObject
    from datamodules.coco_stuff import COCOStuff
    from datamodules.gcc3m import GCC3M
    from datamodules.imagenet_s import ImageNetS
    from datamodules.images import Images
    from datamodules.nus_wide import NUSWide
    from datamodules.pascal_context import PascalContext
    from datamodules.shapes import Shapes
    from datamodules.voc import VOC

DATASETS = {
    "ade20k": "ADE20K",
    "cityscapes": "Cityscapes",
    "coco": "COCO",
    "coco_object": "COCOObject",
    "coco_stuff": "COCOStuff",
    "gcc3m": "GCC3M",
    "imagenet_s": "ImageNetS",
    "images": "Images",
    "nus_wide": "NUSWide",
    "pascal_context": "PascalContext",
    "shapes": "Shapes",
    "voc": "VOC",
}
"""Name of a data set -> its DataModule, in the module of that name."""

READ_AS_THEY_ARE = frozenset({"gcc3m", "images"})
"""Those that ``lightning shards`` has nothing to convert of."""

_HOMES = {"ShardDataModule": "_datamodule", **{cls: name for name, cls in DATASETS.items()}}

__all__ = [
    "ADE20K",
    "COCO",
    "DATASETS",
    "GCC3M",
    "READ_AS_THEY_ARE",
    "VOC",
    "COCOObject",
    "COCOStuff",
    "Cityscapes",
    "ImageNetS",
    "Images",
    "NUSWide",
    "PascalContext",
    "Shapes",
    "ShardDataModule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
