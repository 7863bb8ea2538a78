"""Rows that wait for their batch: longest first, in batches of like length within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class Waiting:
    """Rows that were not computed yet, longest first, so that what does not fit in memory shows right away.

    Args:
        sizes: tokens of each row.
        scored: scored tokens of each row.
        positions: scored tokens that a forward pass may have, unless a single row has more.
        multiple: of rows that a batch has, where it can.
    """

    def __init__(self, sizes: Sequence[int], scored: Sequence[int], positions: int, multiple: int) -> None:
        self._sizes, self._scored, self._positions, self._multiple = sizes, scored, positions, multiple
        self._rows = list(range(len(sizes)))
        self.put_back([])

    def __bool__(self) -> bool:
        return bool(self._rows)

    def take(self, tokens: int, share: int = 1) -> list[int]:
        """Return the next batch, of so many padded tokens at most; it may use so large a part of memory: 1 / share."""
        count = min(len(self._rows), max(1, tokens // max(1, self._sizes[self._rows[-1]])))
        if self._multiple < count < len(self._rows):
            count -= count % self._multiple
        while count > 1 and sum(self._scored[i] for i in self._rows[-count:]) > self._positions // share:
            count //= 2
        chosen = self._rows[-count:][::-1]
        del self._rows[-count:]
        return chosen

    def batches(self, count: int, share: int) -> Iterator[list[int]]:
        """Yield about so many batches of about as many tokens until nothing is left; see `take`."""
        tokens = -(-sum(self._sizes[i] for i in self._rows) // count)
        while self:
            yield self.take(tokens + self._multiple // 2 * self._sizes[self._rows[-1]], share)

    def dealt(self, count: int) -> list[list[int]]:
        """Return all rows in at least so many batches, each with as many of every length as any other."""
        count = max(count, -(-sum(self._scored) // self._positions))
        longest_first = self._rows[::-1]
        self._rows = []
        return [longest_first[i::count] for i in range(min(count, len(longest_first)))]

    def put_back(self, rows: Sequence[int]) -> None:
        """Let rows wait again."""
        self._rows = sorted([*self._rows, *rows], key=lambda i: (self._sizes[i], -i))
