"""What each task measures: kept shard by shard, merged and reported without the task and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from datamodules._samples import DatasetInfo
from tasks import TASKS
from tasks.measures._measures import Cell, Measures, Report, Table

__all__ = ["Cell", "Measures", "Report", "Table", "measures_of", "path_of"]


_OURS = {task: (f"tasks.measures.{module}", f"{task}Measures") for module, task in TASKS.items()}
"""Task -> module and class of what it measures."""


def measures_of(
    task: str, info: DatasetInfo, settings: Mapping[str, Any], path: str | None = None
) -> Measures:
    """The empty measures of a task, with its settings.

    Args:
        task: name of its class.
        info: the data set.
        settings: of the task.
        path: ``module.Class`` of the measures, as `path_of` tells; by default those of the project's
            task of that name.

    Raises:
        KeyError: they are not the project's, which alone are imported, or a setting is missing.
    """
    places = {f"{module}.{cls}": (module, cls) for module, cls in _OURS.values()}
    places[path_of(Measures)] = (Measures.__module__, Measures.__qualname__)
    module, cls = places[path] if path else _OURS[task]
    measures: type[Measures] = getattr(import_module(module), cls)
    return measures.of(info, settings)


def path_of(measures: type[Measures]) -> str:
    """Module and class of measures, as ``run.json`` names them."""
    return f"{measures.__module__}.{measures.__qualname__}"
