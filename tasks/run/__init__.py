"""A run's folder: what it is a run of, what is finished, its results; without Lightning or weights."""

from tasks.run.errors import RunError
from tasks.run.folder import Run
from tasks.run.image import ImageResult, StoredImage
from tasks.run.results import (
    ByMethod,
    Facts,
    LabelMap,
    Masks,
    Points,
    Scores,
    Similarities,
    Tokens,
)

__all__ = [
    "ByMethod",
    "Facts",
    "ImageResult",
    "LabelMap",
    "Masks",
    "Points",
    "Run",
    "RunError",
    "Scores",
    "Similarities",
    "StoredImage",
    "Tokens",
]
