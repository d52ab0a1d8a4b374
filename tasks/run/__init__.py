"""A run's folder: what it is a run of, what is finished, its results; free of Lightning and weights."""

from tasks.run.errors import RunError, Stopped
from tasks.run.folder import Run

__all__ = ["Run", "RunError", "Stopped"]
