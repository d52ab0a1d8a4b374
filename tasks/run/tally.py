"""How much bad data a run bears before it stops, or ends as a failure."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from common import signals
from datamodules._samples import SampleError
from tasks.run.shard import ShardRecord

FEWEST = 1000
"""Of fewer samples or shards than this, a share means nothing: one bad photo of five is no disaster."""

_SHOWN = 5
_LOOK = 0.1  # seconds between two looks at what is waited for


class Tally:
    """Samples and shards so far, and what ``--data.max_error_rate`` says of them.

    A run stops as soon as more samples, or more shards, are bad than that share of all, of 1,000 if there
    are fewer. A run that has come to its end is a failure also where more than that share of its
    shards is missing, however few they are, or none of its samples could be used; and where another job
    took away a finished one.

    Args:
        limit: ``--data.max_error_rate``, a share in [0, 1].
        shards: how many there are to do.
        shared: adds to a number of all processes of the job, by name, and returns it, so that they count
            as one; by default this process counts alone.
    """

    def __init__(
        self, limit: float, shards: int, shared: Callable[[str, int], int] | None = None
    ) -> None:
        self.limit = limit
        self.shards = shards
        self._total = shared or _count_alone()
        self.done = 0
        self.images = 0
        self.bad = 0
        self.lost: list[SampleError] = []  # by this process
        self._lost = 0  # by all
        self._gone: list[str] = []

    def resume(self, records: Sequence[ShardRecord]) -> None:
        """Count shards that were finished before this job, so that it stops where one job would."""
        if records:
            self.done += len(records)
            self._add(sum(r.images for r in records), sum(len(r.errors) for r in records))

    def add(self, images: int, bad: int) -> None:
        """Count a finished shard: its usable and its bad samples."""
        self.done += 1
        self._add(images, bad)

    def _add(self, images: int, bad: int) -> None:
        # Other processes count at the same time. All count their samples before the bad ones of them, and
        # look at these first: so nobody sees bad samples without those that they are a share of.
        self._total("samples", images + bad)
        self.bad = self._total("bad", bad)
        self.images = self._total("samples", 0) - self.bad

    def lose(self, error: SampleError) -> None:
        """Count a shard that can't be read."""
        self.lost.append(error)
        self._lost = self._total("lost", 1)

    def take_away(self, shard: str) -> None:
        """Note a shard that was finished, and is no more there at the run's end."""
        self._gone.append(shard)

    def stop(self, summarise: Callable[[], object]) -> None:
        """Have what there is summarised by the first process that stops; the others wait for it.

        Raises:
            Stopped: this process was asked to stop while it waited.
        """
        if self._total("stopping", 1) == 1:
            try:
                summarise()
            finally:
                self._total("stopped", 1)
        while not self._total("stopped", 0):
            signals.check()
            time.sleep(_LOOK)

    def too_much(self) -> str:
        """Why the run should stop now; empty if it need not."""
        seen = self.images + self.bad
        if self.bad > self._allowed(seen):
            return f"{self.bad} of {seen} samples are bad, {self._more(seen, 'samples')}"
        if self._lost > self._allowed(self.shards):
            return (
                f"{self._lost} of {self.shards} shards can't be read, "
                f"{self._more(self.shards, 'shards')} (the last is {_named(self.lost[-1:])})"
            )
        return ""

    def verdict(self) -> str:
        """Why the run, now at its end, is a failure; empty if it is none."""
        if self._gone:
            more = ", ..." if len(self._gone) > _SHOWN else ""
            return (
                f"{len(self._gone)} of {self.shards} shards were finished, and then taken away by "
                f"another job, or deleted: {', '.join(self._gone[:_SHOWN])}{more}. Run the same command "
                "again to have them done"
            )
        if len(self.lost) > self.limit * self.shards:
            return (
                f"{len(self.lost)} of {self.shards} shards are missing, more than --data.max_error_rate "
                f"{self.limit:g} allows, which counts shards too: {_named(self.lost)}. Run the same "
                "command again to have them tried again"
            )
        if self.done == self.shards and self.done and not self.images:
            found = f"none of the {self.bad} samples could be used" if self.bad else "no samples"
            return f"there is nothing in the results: {found}"
        return self.too_much()

    def tolerated(self) -> str:
        """What is allowed, where something was bad and not too much; else empty."""
        seen = self.images + self.bad
        if not (self.bad or self.lost) or self.verdict():
            return ""
        return (
            f"allowed by --data.max_error_rate {self.limit:g}: {int(self._allowed(seen))} bad samples"
            f"{_of_fewest(seen)}, {int(self.limit * self.shards)} missing shards"
        )

    def _allowed(self, count: int) -> float:
        return self.limit * max(count, FEWEST)

    def _more(self, count: int, what: str) -> str:
        return (
            f"more than --data.max_error_rate {self.limit:g} allows: {int(self._allowed(count))} {what}"
            f"{_of_fewest(count)}"
        )


def _count_alone() -> Callable[[str, int], int]:
    numbers: Counter[str] = Counter()

    def add(name: str, amount: int) -> int:
        numbers[name] += amount
        return numbers[name]

    return add


def _of_fewest(count: int) -> str:
    return f" (the share of {FEWEST:,}, as there are fewer)" if count < FEWEST else ""


def _named(lost: list[SampleError]) -> str:
    shown = "; ".join(f"{error.shard}: {error.reason}" for error in lost[:_SHOWN])
    return f"{shown}; and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else shown
