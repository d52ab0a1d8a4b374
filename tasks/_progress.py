"""What a person sees of a run under way: a bar that counts images."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from datamodules._samples import Batch
from tasks._task import Task


class ImageProgress(ProgressBar):
    """Images done, images/s, and, where the shards' counts are known, the time left.

    Counts those of rank 0's share.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._enabled = True

    def disable(self) -> None:
        """No bar: Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at what is done already."""
        if not isinstance(pl_module, Task):
            return
        counts = pl_module.datamodule.sample_counts()
        mine = [name for name, _ in pl_module.datamodule.share()]
        done = sum(counts.get(name, 0) for name in pl_module.datamodule.wanted.finished)
        known = all(name in counts for name in mine)
        total = done + sum(counts[name] for name in mine) if known else None
        self._bar = tqdm(
            total=total, initial=done, unit="img", disable=not self._enabled, dynamic_ncols=True
        )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        if self._bar is not None:
            self._bar.update(batch.end - batch.start)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        if self._bar is not None:
            self._bar.close()
