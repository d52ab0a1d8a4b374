"""Which shards a rank reads, where they are handed out as the ranks become free."""

from __future__ import annotations

from collections.abc import Callable


class Handout:
    """Hands out the shards of a list to its ranks; this is one rank's side of it.

    Each rank begins with the shard of its own number. Each further one goes to the rank that first asks
    for it: a rank with costly shards reads fewer, and none is idle at the end for longer than about one
    shard of another takes.

    Args:
        count: shards in the list, which all ranks have.
        rank: this one, from 0.
        ranks: how many there are.
        counter: adds to a number that all ranks share, 0 at first, and returns it.
    """

    def __init__(self, count: int, rank: int, ranks: int, counter: Callable[[int], int]) -> None:
        self.count = count
        self.rank = rank
        self.ranks = ranks
        self.counter = counter
        self._begun = False
        self._taken = 0  # by all ranks, when last looked at, not counting each one's first

    def take(self) -> int | None:
        """Number of another shard, which from now on is this rank's; None if none is left."""
        if not self._begun:
            self._begun, number = True, self.rank
        elif not self._left():
            return None
        else:
            self._taken = self.counter(1)
            number = self.ranks + self._taken - 1
        return number if number < self.count else None

    def allows(self, waiting: int) -> bool:
        """Whether a rank may take a shard before it is free, so that so many then wait for it.

        Half of what is left, in equal parts, may wait: what waits for a busy rank is missed by those
        that become free.
        """
        if waiting > self._part():  # never grows, so there is nothing to look at
            return False
        self._taken = self.counter(0)
        return waiting <= self._part()

    def _part(self) -> int:
        return -(-self._left() // (2 * self.ranks))

    def _left(self) -> int:
        return max(self.count - self.ranks - self._taken, 0)
