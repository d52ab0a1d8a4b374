"""Warnings of torch wherever the host waits for a GPU, from the first batch on; for `gpu.sh`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback


class SyncWarnings(Callback):
    """Named on the command line as ``--trainer.callbacks``; PYTHONWARNINGS=always shows every one."""

    def on_predict_batch_start(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.set_sync_debug_mode("warn")
