"""Heap memory that storages have left goes back to the system where they took new shared memory.

What was freed in a heap glibc keeps, unless it lies at the heap's end or was a mapping of its own. From 128 KB on each
allocation is one at first, but each such mapping that is freed raises that bound to its size, up to 32 MB. So where a
few large tensors had been freed before, the ``map`` of a list of 200 of 16 MB held 6.9 GB at its end, half of it free
memory of the heap; it holds 3.8 GB with this.

Only with new shared memory is anything given back, for it is then that a process grows. In a loop that makes tensors,
sends them into warm memory and makes new ones, the heap's memory is better kept warm.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from time import thread_time

__all__ = ["EXCHANGE_NBYTES", "Heap"]

EXCHANGE_NBYTES = 64 << 20
"""For less new memory nobody looks at the heap. To give its memory back takes an eighth of the time in which tensors
move into as much new memory."""

# To give back takes 5 us where nothing is free, but 60 ms where 100,000 small pieces are, though they were given back
# before. What it takes beyond its due (12 to 15 GB/s were seen) is made up for by waiting for so much new memory, as
# takes several times as long; but for a few steps at most, or a heap that gave back much, once, would then grow.
_DUE_NBYTES_PER_SECOND = 5 << 30
_NBYTES_PER_SECOND = 10 << 30
_MOST_STEPS = 8


def _trim() -> None:
    if _malloc_trim is not None:
        _malloc_trim(0)


class Heap:
    """Notices how much new shared memory one arena of this process takes for storages that leave its heap.

    Any thread may call; of two that come at once both may give memory back.

    Args:
        give_back: gives free heap memory to the system.
        clock: tells the seconds that this thread has computed.
    """

    __slots__ = ("_clock", "_give_back", "_level_nbytes", "_pause_nbytes")

    def __init__(self, give_back: Callable[[], None] = _trim, clock: Callable[[], float] = thread_time) -> None:
        self._give_back = give_back
        self._clock = clock
        self._level_nbytes = 0  # what the arena had at the last time, or less since
        self._pause_nbytes = 0  # so much more it must have, if the last time took long

    def exchange(self, committed_nbytes: int, small_nbytes: int) -> None:
        """Give free memory back if the arena has grown by much.

        Args:
            committed_nbytes: how much memory the arena has.
            small_nbytes: so much more is not much.
        """
        level_nbytes = self._level_nbytes
        step_nbytes = max(EXCHANGE_NBYTES, small_nbytes)
        if level_nbytes <= committed_nbytes < level_nbytes + max(step_nbytes, self._pause_nbytes):
            return
        self._level_nbytes = committed_nbytes
        if committed_nbytes > level_nbytes:
            began = self._clock()
            self._give_back()
            undue = self._clock() - began - (committed_nbytes - level_nbytes) / _DUE_NBYTES_PER_SECOND
            self._pause_nbytes = min(int(undue * _NBYTES_PER_SECOND), _MOST_STEPS * step_nbytes)


# (bytes to keep at the heap's end) -> whether any were given back. Releases the GIL. Another C library may have none;
# an allocator that has taken malloc's place leaves glibc's there, which then finds nothing.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
