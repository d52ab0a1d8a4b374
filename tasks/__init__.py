"""The tasks of the paper as LightningModules, their runs, and the command line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks._predict import predict
    from tasks._task import BackboneConfig, Task
    from tasks.analysis import Analysis
    from tasks.explainability import Explainability
    from tasks.interactive import Interactive
    from tasks.multimodal import Multimodal
    from tasks.opinions import Opinions
    from tasks.recognition import Recognition
    from tasks.run import Run
    from tasks.run.callback import ResultWriter
    from tasks.segmentation import Segmentation

TASKS = {
    "analysis": "Analysis",
    "explainability": "Explainability",
    "interactive": "Interactive",
    "multimodal": "Multimodal",
    "opinions": "Opinions",
    "recognition": "Recognition",
    "segmentation": "Segmentation",
}
"""Module -> class of each task."""

_HOMES = {
    "BackboneConfig": "_task",
    "Task": "_task",
    "ResultWriter": "run.callback",
    "Run": "run",
    "predict": "_predict",
    **{cls: module for module, cls in TASKS.items()},
}

__all__ = [
    "TASKS",
    "Analysis",
    "BackboneConfig",
    "Explainability",
    "Interactive",
    "Multimodal",
    "Opinions",
    "Recognition",
    "ResultWriter",
    "Run",
    "Segmentation",
    "Task",
    "predict",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
