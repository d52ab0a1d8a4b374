"""What a person sees of a run under way: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from datamodules._samples import Batch
from tasks._task import Task

_SECONDS = 30.0  # between two lines in a log


class ImageProgress(ProgressBar):
    """Images done, images/s, errors, and, where the shards' counts are known, the time left.

    On a terminal, and in a notebook, that is a bar. Anywhere else, as in a cluster's log, it is a line
    after the first batch, at intervals, and at the end. Counts those of rank 0's share.
    """

    def __init__(self) -> None:
        super().__init__()
        self._show: _Bar | _Lines | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show it."""
        self._enabled = True

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at what is done already."""
        if not isinstance(pl_module, Task) or not self._enabled:
            return
        counts = pl_module.datamodule.sample_counts()
        mine = [name for name, _ in pl_module.datamodule.share()]
        done = sum(counts.get(name, 0) for name in pl_module.datamodule.wanted.finished)
        known = all(name in counts for name in mine)
        total = done + sum(counts[name] for name in mine) if known else None
        if sys.stderr.isatty() or "ipykernel" in sys.modules:
            self._show = _Bar(done, total)
        else:
            world = trainer.world_size
            whose = f"process 0 of {world}: " if world > 1 else ""
            self._show = _Lines(done, total, whose)

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
        if self._show is not None:
            self._show.add(batch.end - batch.start, len(batch.errors))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar, or write the last line."""
        if self._show is not None:
            self._show.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        if self._show is not None:
            self._show.end()


class _Bar:
    def __init__(self, done: int, total: int | None) -> None:
        self.errors = 0
        self.bar = tqdm(total=total, initial=done, unit="img", dynamic_ncols=True)

    def add(self, images: int, errors: int) -> None:
        self.errors += errors
        self.bar.set_postfix_str(_errors(self.errors), refresh=False)
        self.bar.update(images)

    def end(self) -> None:
        self.bar.close()


class _Lines:
    def __init__(self, done: int, total: int | None, whose: str) -> None:
        self.first = self.done = done
        self.total = total
        self.whose = whose
        self.errors = 0
        self.began = time.monotonic()
        self.told: tuple[int, float] | None = None

    def add(self, images: int, errors: int) -> None:
        self.done += images
        self.errors += errors
        if self.told is None or time.monotonic() - self.told[1] >= _SECONDS:
            self._tell()

    def end(self) -> None:
        if self.told is not None and self.told[0] < self.done:
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        self.told = self.done, now
        rate = (self.done - self.first) / max(now - self.began, 1e-9)
        text = f"{self.whose}{self.done:,}"
        if self.total:
            text += f" of {self.total:,} images ({100 * self.done / self.total:.0f} %)"
        else:
            text += " images"
        text += f", {rate:.3g} images/s, {_errors(self.errors)}"
        if self.total and self.total > self.done and rate:
            text += f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        print(text, file=sys.stderr, flush=True)


def _errors(count: int) -> str:
    return f"{count:,} error{'' if count == 1 else 's'}"
