"""What each task measures: kept shard by shard, merged and reported without the task and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from datamodules._samples import DatasetInfo
from tasks import TASKS
from tasks.measures._measures import Cell, Measures, Report, Table

__all__ = ["Cell", "Measures", "Report", "Table", "measures_of"]


def measures_of(task: str, info: DatasetInfo, settings: Mapping[str, Any]) -> Measures:
    """The empty measures of a task by its class name, with its settings.

    Raises:
        KeyError: not one of the project's tasks, or a setting is missing.
    """
    modules = {cls: module for module, cls in TASKS.items()}
    module = import_module(f"tasks.measures.{modules[task]}")
    measures: type[Measures] = getattr(module, f"{task}Measures")
    return measures.of(info, settings)
