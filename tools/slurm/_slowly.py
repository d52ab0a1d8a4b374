"""A callback for `try_scripts.py`: makes a run slow enough to be disturbed."""

from __future__ import annotations

import os
import time

from lightning.pytorch import Callback


class Slowly(Callback):
    """Waits before each batch, in its job's first life only.

    Args:
        seconds: so long.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = 0.0 if os.environ.get("SLURM_RESTART_COUNT") else seconds

    def on_predict_batch_start(self, *_: object) -> None:
        """Wait."""
        time.sleep(self.seconds)
