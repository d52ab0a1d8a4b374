"""Data in: one file a data set (its labels, how its layout becomes shards, its DataModule)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.shards import ShardDataModule
    from datamodules.voc import VOC

DATASETS = {"voc": "VOC"}
"""Name under ``lightning shards`` -> DataModule class, in the module of that name."""

_HOMES = {"ShardDataModule": "shards", **{cls: name for name, cls in DATASETS.items()}}

__all__ = ["DATASETS", "VOC", "ShardDataModule"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
