"""The tasks of the paper as LightningModules, their runs, and the command line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; each is imported when it is first used
    from tasks._predict import predict as predict
    from tasks._task import BackboneConfig as BackboneConfig
    from tasks._task import Task as Task
    from tasks.analysis import Analysis as Analysis
    from tasks.explainability import Explainability as Explainability
    from tasks.interactive import Interactive as Interactive
    from tasks.multimodal import Multimodal as Multimodal
    from tasks.opinions import Opinions as Opinions
    from tasks.recognition import Recognition as Recognition
    from tasks.run import Run as Run
    from tasks.run.callback import ResultWriter as ResultWriter
    from tasks.segmentation import Segmentation as Segmentation

TASKS = {
    "analysis": "Analysis",
    "explainability": "Explainability",
    "interactive": "Interactive",
    "multimodal": "Multimodal",
    "opinions": "Opinions",
    "recognition": "Recognition",
    "segmentation": "Segmentation",
}
"""Module -> class of each task. A new one is a row here and above; what it measures: `tasks.measures`."""

_HOMES = {
    "BackboneConfig": "_task",
    "Task": "_task",
    "ResultWriter": "run.callback",
    "Run": "run",
    "predict": "_predict",
    **{cls: module for module, cls in TASKS.items()},
}

__all__ = ["TASKS", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
