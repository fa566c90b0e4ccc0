"""Which large free block a busy arena has not needed for long.

Free blocks of a size are used again in the order last freed, first used. So the first of the list is used only when
all others are in use, and an arena keeps as many blocks as it ever needed at one time. What a worker needs of a stream
is left to chance, from one result up to a whole window of them. In a stream with eight workers and a slow consumer 57
blocks became 74 in 1,500 results, and more would have followed; with one given back after so many uses of others there
were 56 to 65 all the time.
"""

from __future__ import annotations

__all__ = ["TURNS", "USES", "Idle"]

USES = 64
"""Of blocks of its size. New pages cost ten times what a copy into old ones costs; so if the block is needed right
after it was given back, these uses cost a sixth more."""

TURNS = 4
"""Of all that the arena has, or a list of tensors that are let go one after the other would count as many uses."""


class Idle:
    """Counts, for each size of large blocks, what was freed while the first free one stayed where it was.

    Under the lock of the arena's table. A signal handler may come in between; then it may count wrongly.

    Args:
        uses: so many others of the size must be used without it.
        turns: and as many bytes as the arena has, so often.
    """

    __slots__ = ("_stays", "_turns", "_uses")

    def __init__(self, uses: int = USES, turns: int = TURNS) -> None:
        self._uses = uses
        self._turns = turns
        self._stays: dict[int, tuple[int, int]] = {}  # size: the first free block, the bytes freed while it is that

    def too_long(self, size: int, free: list[int], committed_nbytes: int) -> bool:
        """A block was just freed; whether the first free one was not needed for long. If so it is to go.

        Args:
            size: of the block.
            free: all free ones of this size, last freed last.
            committed_nbytes: how much memory the arena has.
        """
        two = free[:2]
        first, freed_nbytes = self._stays.get(size, (-1, 0))
        if len(two) < 2 or two[0] != first:
            self._stays[size] = two[0] if two else -1, 0
            return False
        freed_nbytes += size
        if freed_nbytes < max(self._uses * size, self._turns * committed_nbytes):
            self._stays[size] = first, freed_nbytes
            return False
        # The next one was perhaps needed meanwhile, perhaps not: it gets half of the time.
        self._stays[size] = two[1], freed_nbytes // 2
        return True
