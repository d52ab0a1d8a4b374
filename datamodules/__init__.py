"""Data in: one file a data set (its labels, how its layout becomes shards, its DataModule)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; each is imported when it is first used
    from datamodules._datamodule import ShardDataModule as ShardDataModule
    from datamodules._drawing import draw_scene as draw_scene
    from datamodules.ade20k import ADE20K as ADE20K
    from datamodules.cityscapes import Cityscapes as Cityscapes
    from datamodules.coco import COCO as COCO
    from datamodules.coco_object import COCOObject as COCOObject
    from datamodules.coco_stuff import COCOStuff as COCOStuff
    from datamodules.gcc3m import GCC3M as GCC3M
    from datamodules.imagenet_s import ImageNetS as ImageNetS
    from datamodules.images import Images as Images
    from datamodules.nus_wide import NUSWide as NUSWide
    from datamodules.pascal_context import PascalContext as PascalContext
    from datamodules.shapes import Shapes as Shapes
    from datamodules.voc import VOC as VOC

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
"""Name of a data set -> its DataModule, in the module of that name. A new one is a row here and above."""

READ_AS_THEY_ARE = frozenset({"gcc3m", "images"})
"""Those that ``lightning shards`` has nothing to convert of."""

_HOMES = {
    "ShardDataModule": "_datamodule",
    "draw_scene": "_drawing",
    **{cls: name for name, cls in DATASETS.items()},
}

__all__ = ["DATASETS", "READ_AS_THEY_ARE", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
