"""What is too narrow to be drawn by itself, added up by column of one pixel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

__all__ = ["Columns"]

# Shares are rounded to so many parts of a lane's height: neighbouring columns that look alike become one bar.
STEPS = 14


class Columns:
    """The columns of one lane.

    Args:
        x: where a moment is, in pixels.
        left: where the first column begins.
    """

    def __init__(self, x: Callable[[float], float], left: float) -> None:
        self._x = x
        self._left = left
        self._shares: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, began: float, ended: float, colour: str) -> None:
        """Count a stretch of time; it may reach over a border of columns."""
        at, end = self._x(began) - self._left, self._x(ended) - self._left
        while at < end:
            column = int(at)
            stop = min(end, column + 1.0)
            self._shares[column][colour] += stop - at
            at = stop

    def bars(self) -> Iterator[tuple[float, float, float, float, str]]:
        """Bars as (x, width, share of the lane's height, share below it, colour), from the bottom upwards."""
        run: tuple[tuple[str, int], ...] = ()
        first = last = 0
        for column in [*sorted(self._shares), -2]:
            levels = () if column < 0 else self._levels(self._shares[column])
            if run and (column != last + 1 or levels != run):
                yield from self._stack(first, last, run)
                run = ()
            if not run:
                run, first = levels, column
            last = column

    @staticmethod
    def _levels(shares: dict[str, float]) -> tuple[tuple[str, int], ...]:
        """Each colour with its height in steps; what is there at all is seen, if it is the most there is."""
        levels: list[tuple[str, int]] = []
        total, drawn = 0.0, 0
        for colour, share in shares.items():
            total += share
            height = min(STEPS, round(total * STEPS)) - drawn
            if height > 0:
                levels.append((colour, height))
                drawn += height
        return tuple(levels) or ((max(shares, key=lambda colour: shares[colour]), 1),)

    def _stack(
        self, first: int, last: int, levels: tuple[tuple[str, int], ...]
    ) -> Iterator[tuple[float, float, float, float, str]]:
        below = 0
        for colour, height in levels:
            yield self._left + first, last + 1.0 - first, height / STEPS, below / STEPS, colour
            below += height
