"""One budget of shared memory for a pool: who has committed how much, and who waits for more.

A memfd has no limit but the out-of-memory killer, so the processes of a pool keep to a budget by themselves. They
share a small memfd of 64-bit words, with room for more counters than are in use at first::

    word 0        1             2              3 + 3 i                  4 + 3 i             5 + 3 i
    magic number  counters (n)  budget, bytes  committed by owner of i  1 while that waits  the most it ever committed

Each three counters have ONE writer, the owner of that arena (one process at a time; under its lock). An aligned
64-bit store is atomic, so no lock is shared between processes and one killed at any instruction blocks nobody.
"""

from __future__ import annotations

import os

from tpool.errors import ProtocolError
from tpool.tensors.memfd import PAGE_NBYTES, create_memfd, map_memfd, memfd_nbytes

__all__ = ["ROOM", "Ledger"]

_MAGIC = 0x7470_6F6F_6C00_0001
_HEADER_WORDS = 3
_WORDS_EACH = 3
_WORD_NBYTES = 8

ROOM = 1024
"""For so many counters at least there is room, should a pool grow. More would cost address space, if next to none."""


class Ledger:
    """The counters of one pool's arenas, shared by its processes.

    Invariant: the committed bytes of all arenas stay within the budget, save for the moment in which a process has
    added what it wants and not yet looked at the sum, for memory that a dead worker left behind, and for the result
    that an ordered stream waits for while later ones hold the whole budget (one for each worker at most).

    Attributes:
        fd: the memfd, to be sent to workers; owned.
        counters: for how many arenas, as far as this process has looked.
        budget_nbytes: how many bytes all arenas together may commit.
    """

    __slots__ = ("_committed", "_peaks", "_waiting", "_words", "budget_nbytes", "counters", "fd")

    def __init__(self, fd: int, words: memoryview) -> None:
        self.fd = fd
        self.budget_nbytes: int = words[2]
        self._words = words
        self._look()

    def _look(self) -> None:
        words = self._words
        self.counters: int = words[1]
        end = _HEADER_WORDS + _WORDS_EACH * self.counters
        self._committed = words[_HEADER_WORDS:end:_WORDS_EACH]
        self._waiting = words[_HEADER_WORDS + 1 : end : _WORDS_EACH]
        self._peaks = words[_HEADER_WORDS + 2 : end : _WORDS_EACH]

    @classmethod
    def create(cls, counters: int, budget_nbytes: int) -> Ledger:
        """A ledger for ``counters`` arenas, all of whose words are zero."""
        used = (_HEADER_WORDS + _WORDS_EACH * max(counters, ROOM)) * _WORD_NBYTES
        fd = create_memfd("tpool-ledger", -(-used // PAGE_NBYTES) * PAGE_NBYTES)
        words = _map_words(fd)
        words[1], words[2] = counters, budget_nbytes
        words[0] = _MAGIC
        return cls(fd, words)

    @classmethod
    def attach(cls, fd: int) -> Ledger:
        """Map the ledger behind ``fd``, which is taken over (and closed if this fails).

        Raises:
            ProtocolError: it is no ledger.
        """
        try:
            words = _map_words(fd)
            if words[0] != _MAGIC or not 0 <= words[1] <= (len(words) - _HEADER_WORDS) // _WORDS_EACH:
                raise ProtocolError(f"descriptor {fd} is no ledger of a pool")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, words)

    def grow(self, counters: int) -> None:
        """Have more counters; by the pool's process, before anybody owns one of them.

        Raises:
            ValueError: there is no room for so many.
        """
        room = (len(self._words) - _HEADER_WORDS) // _WORDS_EACH
        if counters > room:
            raise ValueError(
                f"this pool can grow to {room - 1} workers, not to {counters - 1}; make a new one for more"
            )
        self._words[1] = counters
        self._look()

    def committed_nbytes(self, index: int | None = None) -> int:
        """What the owner of arena ``index`` has committed; all owners together without an index."""
        if index is not None:
            return self._committed[index]
        if self._words[1] != self.counters:
            self._look()
        return sum(self._committed)

    def set_committed(self, index: int, nbytes: int) -> None:
        """Write the counter of arena ``index``; by its owner alone."""
        self._committed[index] = nbytes
        if nbytes > self._peaks[index]:
            self._peaks[index] = nbytes

    def peak_nbytes(self, index: int) -> int:
        """The most that the owners of arena ``index`` have ever committed, or tried to."""
        return self._peaks[index]

    def set_waiting(self, index: int, waiting: bool) -> None:
        """Say that the owner of arena ``index`` waits for memory, or no longer does; by that owner alone."""
        self._waiting[index] = waiting

    def anyone_waiting(self, besides: int | None = None) -> bool:
        """Whether an owner waits for memory; the owner of arena ``besides`` does not count."""
        if self._words[1] != self.counters:
            self._look()
        waiting = sum(self._waiting)
        return waiting > (self._waiting[besides] if besides is not None else 0)

    def close(self) -> None:
        """Close the descriptor. The words stay readable, since an allocator may still use them."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _map_words(fd: int) -> memoryview:
    view, _ = map_memfd(fd, memfd_nbytes(fd))
    return view.cast("Q")
