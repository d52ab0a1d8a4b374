"""The tasks of the paper as LightningModules, the writer of their results, and the command line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.base import BackboneConfig, Task
    from tasks.explainability import Explainability
    from tasks.writer import ResultWriter

TASKS = {"explainability": "Explainability"}
"""Module -> class of each task."""

_HOMES = {
    "BackboneConfig": "base",
    "Task": "base",
    "ResultWriter": "writer",
    **{cls: module for module, cls in TASKS.items()},
}

__all__ = ["TASKS", "BackboneConfig", "Explainability", "ResultWriter", "Task"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
