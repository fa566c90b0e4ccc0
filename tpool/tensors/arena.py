"""Which bytes of an arena are free.

An arena is a sparse memfd that each process of a pool maps whole, once (:class:`Arena`). Its owner hands out blocks::

                      allocate                          free
    cold extents ──────────────────►  block in use ──────────────►  free lists, one per size class ("warm")
      ▲   (new pages: asks the budget)     ▲                             │        │
      │                                    └── allocate (most recent first) ──────┘        │
      └───────────────── trim: discard the pages, join neighbours ────────────────┘

Reuse of warm memory is what makes sending cheap: new shared pages cost ten times as much as a copy into old ones.

Nothing here locks: the lease table does. But user code may run inside a collection (or a signal handler) in the middle
of anything here, and come back here from the same thread. So memory is first taken away by one atomic step, then
handed on, and no variable is written back after a call that was read before it. An interruption (Ctrl-C) may at worst
lose bytes, never give them out twice; ``Allocator.reclaim`` finds them again.
"""

from __future__ import annotations

from collections.abc import Callable

from tpool.errors import ProtocolError
from tpool.tensors.budget import default_budget_nbytes
from tpool.tensors.extents import align, class_nbytes, whole_pages_nbytes
from tpool.tensors.free_memory import FreeMemory
from tpool.tensors.ledger import Ledger
from tpool.tensors.memfd import PAGE_NBYTES, Arena

__all__ = ["Allocator", "Arena", "Ledger", "default_budget_nbytes"]

# Of a range as one number: its start stands above, its end below, both less than 2**64.
_SHIFT = 64
_MASK = (1 << _SHIFT) - 1


class Allocator(FreeMemory):
    """Hands out an arena's memory, also where an earlier owner did, and finds what was lost; see ``FreeMemory``."""

    __slots__ = ()

    # A new owner of an old arena ----------------------------------------------------------------------------------

    def reserve(self, offset: int, nbytes: int) -> None:
        """Mark as in use a block that an earlier owner allocated. Before the first allocation; cheapest in order.

        Raises:
            ProtocolError: there cannot be such a block.
        """
        size = class_nbytes(nbytes) if nbytes > 0 else 0
        end = offset + size
        if not size or offset < 0 or end > self.arena.nbytes or align(offset, size) != offset:
            raise ProtocolError(f"no block of {nbytes} bytes at {offset} can live in an arena of {self.arena.nbytes}")
        if not self._bump <= offset <= end <= self._bump_end:
            extent = self._cold.take_containing(offset, end)
            if extent is None:
                raise ProtocolError(f"the block of {nbytes} bytes at {offset} overlaps another one")
            self._cut_from(extent)
        first, limit = self._bump, self._bump_end
        self._bump = end
        self._cold.put(first, offset)
        # The dead owner's pages are committed, whatever the budget says.
        pages = whole_pages_nbytes(first, limit) - whole_pages_nbytes(first, offset) - whole_pages_nbytes(end, limit)
        self.committed_nbytes += pages
        self._sizes[offset] = size
        self.used_nbytes += size

    def adopt(self) -> None:
        """After all reserves: find the pages that the earlier owner left warm, and correct the ledger."""
        extents = list(self._cold.take_all())
        extents.append((self._bump, self._bump_end))
        self._bump = self._bump_end = 0
        found = [(start, end, self.arena.find_pages(start, end)) for start, end in sorted(extents, reverse=True)]
        self.committed_nbytes += sum(last - first for _, _, ranges in found for first, last in ranges)
        for start, end, ranges in found:
            self._adopt_extent(start, end, ranges)
        self._tell_ledger()
        self.ledger.set_waiting(self.index, False)

    def _adopt_extent(self, start: int, end: int, ranges: list[tuple[int, int]]) -> None:
        """Split a free extent into the warm ranges, each for a block of the size class it came from, and the rest."""
        before = self.ledger.committed_nbytes(self.index)
        limit = end // PAGE_NBYTES * PAGE_NBYTES
        for first, last in reversed(ranges):
            # The end of a block was never touched if its size had been rounded up to that of a class; without it the
            # next block of that class would not fit. The earlier owner had paid for it.
            rest = min(class_nbytes(last - first) - (last - first), limit - last, before - self.committed_nbytes)
            if rest > 0:
                self.committed_nbytes += rest
                last += rest
            self._cold.put(last, end)
            self._warm.put(first, last)
            limit = end = first
        self._cold.put(start, end)

    # What an interrupt left ---------------------------------------------------------------------------------------

    def reclaim(self, lives: Callable[[int], bool]) -> None:
        """Find what an interrupt left in no place, or in use though nobody has it; not in the midst of another call.

        Args:
            lives: whether somebody has the block in use that begins at this offset.
        """
        turn = self._turn
        orphans = [offset for offset in dict(self._sizes) if not lives(offset)]
        gaps, end, used = [], 0, sum(dict(self._sizes).values())
        for place in [*self._places(), self.arena.nbytes << _SHIFT]:
            if end < place >> _SHIFT:
                gaps.append((end, place >> _SHIFT))
            end = place & _MASK
        if turn == self._turn:  # no call since: else user code came between, in a collection or a signal handler
            self.used_nbytes = used
        else:
            return
        # What was found is nobody's, so nobody can come between; what an interrupt leaves of it is found again.
        for offset in orphans:
            self.free(offset)
        for start, stop in gaps:
            self._adopt_extent(start, stop, self.arena.find_pages(start, stop))
        turn, uncommitted = self._turn, self._uncommitted_nbytes()
        if turn == self._turn:
            self.committed_nbytes = self.arena.nbytes - uncommitted
        self._tell_ledger()

    def _uncommitted_nbytes(self) -> int:
        return sum(whole_pages_nbytes(start, end) for start, end in [*self._cold.peek(), (self._bump, self._bump_end)])

    def _places(self) -> list[int]:
        """Every range that is somewhere, in order, each as one number.

        Tuples would start collections, and those run finalizers, while other threads wait for the table's lock.
        """
        places: list[int] = []
        for start, end in [*self._cold.peek(), (self._bump, self._bump_end), *self._warm.peek()]:
            places.append(start << _SHIFT | end)
        for lists in (self._young, self._aged):
            for size in list(lists):
                places += [offset << _SHIFT | offset + size for offset in lists[size]]
        sizes = dict(self._sizes)
        places += [offset << _SHIFT | offset + sizes[offset] for offset in sizes]
        return sorted(place for place in places if place >> _SHIFT != place & _MASK)

    def check(self) -> None:
        """Assert the invariants; for tests."""
        end = 0
        for place in self._places():
            assert place >> _SHIFT == end, f"bytes {end} to {place >> _SHIFT} are lost or given twice"
            end = place & _MASK
        assert end == self.arena.nbytes
        assert self.committed_nbytes == self.arena.nbytes - self._uncommitted_nbytes()
        assert self.used_nbytes == sum(self._sizes.values())
        assert self.ledger.committed_nbytes(self.index) == self.committed_nbytes
