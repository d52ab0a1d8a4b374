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
    after the first batch, at intervals, and at the end. Of several processes, it counts the images of the
    first one, and the shards that all have begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self._show: _Bar | _Lines | None = None
        self._begun: _Begun | None = None
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
        data, world = pl_module.datamodule, trainer.world_size
        names, finished = [name for name, _ in data.todo()], data.wanted.finished
        terminal = sys.stderr.isatty() or "ipykernel" in sys.modules
        if world > 1:
            self._begun = _Begun(names, len(finished), world)
            self._show = _Bar(0, None) if terminal else _Lines(0, None, f"process 0 of {world}: ")
            return
        counts = data.sample_counts()
        done = sum(counts.get(name, 0) for name in finished)
        known = all(name in counts for name in names)
        total = done + sum(counts[name] for name in names) if known else None
        self._show = _Bar(done, total) if terminal else _Lines(done, total)

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
            begun = self._begun.told(batch.shard) if self._begun else ""
            self._show.add(batch.end - batch.start, len(batch.errors), begun)

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


class _Begun:
    """How far all processes are, as far as one of them knows: shards are handed out in order.

    Args:
        shards: names of those that are handed out.
        finished: how many others there are, done by earlier jobs.
        world: how many processes there are.
    """

    def __init__(self, shards: list[str], finished: int, world: int) -> None:
        self.numbers = {name: number for number, name in enumerate(shards, 1)}
        self.finished = finished
        self.world = world
        self.began = time.monotonic()
        self.shard = ""
        self.end: float | None = None

    def told(self, shard: str) -> str:
        """Shards begun, and the time left, once the given one has been begun."""
        count, now = len(self.numbers), time.monotonic()
        number = max(self.numbers[shard], min(self.world, count))  # each begins with one
        done = number - (self.world + 1) / 2  # the others are halfway through theirs
        if shard != self.shard and number > self.world:
            self.end = self.began + (now - self.began) * count / done
        self.shard = shard
        text = f", {self.finished + number:,} of {self.finished + count:,} shards begun"
        if self.end is not None and self.end > now:
            text += f", about {tqdm.format_interval(self.end - now)} left"
        return text


class _Bar:
    def __init__(self, done: int, total: int | None) -> None:
        self.errors = 0
        self.bar = tqdm(total=total, initial=done, unit="img", dynamic_ncols=True)

    def add(self, images: int, errors: int, begun: str) -> None:
        self.errors += errors
        self.bar.set_postfix_str(_errors(self.errors) + begun, refresh=False)
        self.bar.update(images)

    def end(self) -> None:
        self.bar.close()


class _Lines:
    def __init__(self, done: int, total: int | None, whose: str = "") -> None:
        self.first = self.done = done
        self.total = total
        self.whose = whose
        self.begun = ""
        self.errors = 0
        self.began = time.monotonic()
        self.told: tuple[int, float] | None = None

    def add(self, images: int, errors: int, begun: str) -> None:
        self.done += images
        self.errors += errors
        self.begun = begun
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
        text += self.begun
        print(text, file=sys.stderr, flush=True)


def _errors(count: int) -> str:
    return f"{count:,} error{'' if count == 1 else 's'}"
