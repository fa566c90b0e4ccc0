"""Heap memory that storages have left goes back to the system where they took new shared memory.

What was freed in a heap glibc keeps, unless it lies at the heap's end or was a mapping of its own. From 128 KB on each
allocation is one at first, but each such mapping that is freed raises that bound to its size, up to 32 MB. So where a
few large tensors had been freed before, the ``map`` of a list of 200 of 16 MB held 6.9 GB at its end, half of it free
memory of the heap; it holds 3.8 GB with this.

Only with new shared memory is anything given back, for it is then that a process grows. In a loop that makes tensors,
sends them into warm memory and makes new ones, the heap's memory is better kept warm. But not many times over. For an
aligned block, as torch asks for, glibc (2.36) takes one that is 96 bytes larger, and frees what is left before and
behind it. Those pieces are of the sizes that each thread keeps a few of, by themselves, for the next who asks; and
while it does, what lies between them, freed, is too small for the next block of the same size. So a stream of batches
of 19 MB had 15 to 24 places for them in the caller's heap, and up to 9 in each worker's, of which one or two were in
use. Therefore a thread now and then gets as many such pieces as it keeps, from elsewhere if need be, and frees them:
then it has no room for others, and these join their neighbours. It had 3 to 9 places and 4 to 6 then, in 0.96 of the
time.
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

# After so much has left the heap in large tensors the pieces are seen to, in 22 us: at most a fortieth of the time
# in which it is copied.
_FILL_NBYTES = 16 << 20
_LARGE_NBYTES = 1 << 20

# What is left beside a block that is aligned to 64 bytes is 32 to 112 bytes long, of which 8 are glibc's own; and of
# each size a thread keeps seven. (Twice as many, to get at those that it keeps already and let them go instead, took
# 1.16 to 1.57 of the time of such a stream: they were cut out of places for large blocks.)
_PIECES = [nbytes for nbytes in range(24, 112, 16) for _ in range(7)]


def _trim() -> None:
    if _malloc_trim is not None:
        _malloc_trim(0)


def _fill() -> None:
    pieces: list[int | None] = []
    try:
        pieces.extend(map(_malloc, _PIECES))
    finally:  # interrupted
        while pieces:
            _free(pieces.pop())


class Heap:
    """Notices how much new shared memory one arena of this process takes for storages that leave its heap.

    Any thread may call; of two that come at once both may give memory back.

    Args:
        give_back: gives free heap memory to the system.
        clock: tells the seconds that this thread has computed.
        fill: has this thread keep as many small pieces as it can.
    """

    __slots__ = ("_clock", "_fill", "_give_back", "_left_nbytes", "_level_nbytes", "_pause_nbytes")

    def __init__(
        self,
        give_back: Callable[[], None] = _trim,
        clock: Callable[[], float] = thread_time,
        fill: Callable[[], None] = _fill,
    ) -> None:
        self._give_back = give_back
        self._fill = fill
        self._clock = clock
        self._left_nbytes = 0  # in large tensors, since the pieces were seen to
        self._level_nbytes = 0  # what the arena had at the last time, or less since
        self._pause_nbytes = 0  # so much more it must have, if the last time took long

    def leave(self, nbytes: int) -> None:
        """A storage of so many bytes is about to leave, in this thread; after many of them see to the pieces."""
        if nbytes >= _LARGE_NBYTES:
            self._left_nbytes += nbytes
            if self._left_nbytes >= _FILL_NBYTES:
                self._left_nbytes = 0
                self._fill()

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

# These keep the GIL: they take a tenth of a microsecond.
_malloc, _free = ctypes.PyDLL(None).malloc, ctypes.PyDLL(None).free
_malloc.argtypes, _malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
_free.argtypes, _free.restype = [ctypes.c_void_p], None
