"""A callback for `try_scripts.py`: keeps a run at work until it has been disturbed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from common import signals
from datamodules._samples import Batch


class Held(Callback):
    """Holds its process in the middle of the second shard that it reads.

    A signal ends the wait, as it would find a batch under way.

    Args:
        until: a file; once it is there, nobody is held.
    """

    def __init__(self, until: str) -> None:
        self.until = Path(until)
        self.shards = 0

    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Batch, *_: Any) -> None:
        """Wait, before the last batch of a shard."""
        self.shards += batch.last
        while self.shards > 1 and not (signals.reason() or self.until.exists()):
            time.sleep(0.1)
