"""Handing out the bytes of one arena, and giving them back; see ``arena.py``."""

from __future__ import annotations

from tpool.errors import PlatformError
from tpool.tensors.extents import LARGE_NBYTES, Extents, align, class_nbytes, popped, whole_pages_nbytes
from tpool.tensors.ledger import Ledger
from tpool.tensors.memfd import PAGE_NBYTES, Arena

__all__ = ["FreeMemory"]

# A request for a large block may be served by a warm one that is up to one part in this many larger: wasted bytes
# against new pages.
_SLACK = 8

# (start, end, where it goes back to if its pages stay; None for a free block)
_Part = tuple[int, int, Extents | None]


class FreeMemory:
    """Which bytes of one arena are free. Used by the arena's owner alone, under the lock of its lease table.

    Every byte of the arena is in exactly one place: a block in use, a free block (young, aged), the bump extent, or
    another extent (cold, or warm: committed, but of no size class yet).

    Pages wholly inside one cold extent (or the bump extent) are not committed; all others count as committed, in
    ``committed_nbytes`` and in the ledger.

    Args:
        arena: an arena that nobody allocates from yet.
        ledger: its pool's ledger.
        index: the arena's counter there.
    """

    __slots__ = (
        "_aged",
        "_bump",
        "_bump_end",
        "_cold",
        "_sizes",
        "_turn",
        "_warm",
        "_young",
        "arena",
        "committed_nbytes",
        "index",
        "ledger",
        "used_nbytes",
    )

    def __init__(self, arena: Arena, ledger: Ledger, index: int) -> None:
        self.arena = arena
        self.ledger = ledger
        self.index = index
        self.used_nbytes = 0
        self.committed_nbytes = 0
        self._turn = 0  # counts the calls that change anything; who looks at all of it sees whether one came between
        self._sizes: dict[int, int] = {}  # offset of each block in use: its size
        # Offsets of free blocks by size, most recently freed last. Young: freed since the last trim of aged ones.
        self._young: dict[int, list[int]] = {}
        self._aged: dict[int, list[int]] = {}
        self._warm = Extents()
        self._cold = Extents()
        # The cold extent that new blocks are cut from, so that a burst of small ones lies together.
        self._bump = 0
        self._bump_end = arena.nbytes

    @property
    def blocks_in_use(self) -> int:
        """How many blocks are neither free nor discarded."""
        return len(self._sizes)

    def allocate(self, nbytes: int, *, beyond_budget: bool = False) -> int | None:
        """The offset of a block of at least ``nbytes`` (at least 1), on a 64-byte boundary, from 4 KiB on a page's.

        Args:
            nbytes: how much.
            beyond_budget: have it even if the pool's budget is spent.

        Returns:
            None when the arena is full or the budget spent, even after discarding all that is free here.
        """
        self._turn += 1
        size = class_nbytes(nbytes)
        young = self._young.get(size)
        if young:
            offset = young.pop()
            self._sizes[offset] = size
            self.used_nbytes += size
            return offset
        return self._allocate_slowly(size, beyond_budget)

    def allocate_young(self, nbytes: int, count: int) -> list[int]:
        """The offsets of as many blocks of ``nbytes`` each as were freed lately, ``count`` at most."""
        self._turn += 1
        size = class_nbytes(nbytes)
        young = self._young.get(size, [])
        taken: list[int] = []
        while len(taken) < count:
            try:
                offset = young.pop()
            except IndexError:  # not looked for before: at the end of a loop a signal handler may come between
                break
            self._sizes[offset] = size
            self.used_nbytes += size
            taken.append(offset)
        return taken

    def _allocate_slowly(self, size: int, beyond_budget: bool) -> int | None:
        block = self._reuse(size) or self._carve_warm(size) or self._carve_cold(size)
        if block is None:
            self.trim()
            block = self._carve_cold(size, beyond_budget)
        if block is None:
            return None
        offset, size = block
        self._sizes[offset] = size
        self.used_nbytes += size
        return offset

    def _reuse(self, size: int) -> tuple[int, int] | None:
        """A free block of this class or, for large ones, of one slightly above."""
        most = size + size // _SLACK if size > LARGE_NBYTES else size
        while size <= most:
            for free in (self._young.get(size), self._aged.get(size)):
                if free:
                    return free.pop(), size
            size = class_nbytes(size + 1)
        return None

    def _carve_warm(self, size: int) -> tuple[int, int] | None:
        extent = self._warm.take(size)
        if extent is None:
            return None
        start = align(extent[0], size)
        self._warm.put(extent[0], start)
        self._warm.put(start + size, extent[1])
        return start, size

    def _carve_cold(self, size: int, beyond_budget: bool = False) -> tuple[int, int] | None:
        """Cut a block from the bump extent, or from another cold extent, which becomes the bump extent."""
        while True:
            first, limit = self._bump, self._bump_end
            start = align(first, size)
            if start + size > limit:
                extent = self._cold.take(size)
                if extent is None:
                    return None
                self._cut_from(extent)
                continue
            fresh = whole_pages_nbytes(first, limit) - whole_pages_nbytes(start + size, limit)
            if fresh and not self._commit(fresh, beyond_budget):
                return None
            end = start + size
            if self._bump == first and self._bump_end == limit:
                self._bump = end  # no call since the comparison: nobody came between
                self._cold.put(first, start)
                return start, size
            self._commit(-fresh)  # user code inside a collection was faster: again

    def _cut_from(self, extent: tuple[int, int]) -> None:
        start, end = extent
        first, limit = self._bump, self._bump_end
        self._bump = start
        self._bump_end = end
        self._cold.put(first, limit)

    def _commit(self, nbytes: int, beyond_budget: bool = False) -> bool:
        """Count bytes as committed, unless the pool's budget forbids it.

        Added first, looked at then: of two processes that want the last bytes at once perhaps none gets them, but
        never both.
        """
        self.committed_nbytes += nbytes
        self._tell_ledger()
        if nbytes <= 0 or beyond_budget or self.ledger.committed_nbytes() <= self.ledger.budget_nbytes:
            return True
        self.committed_nbytes -= nbytes
        self._tell_ledger()
        return False

    def _tell_ledger(self) -> None:
        told = -1
        while told != self.committed_nbytes:  # again, if somebody came in between and told it a newer number
            told = self.committed_nbytes
            self.ledger.set_committed(self.index, told)

    def free(self, offset: int) -> None:
        """The block in use at ``offset`` is free again; it is the first to be reused."""
        self._turn += 1
        size = self._sizes.pop(offset)
        self.used_nbytes -= size
        young = self._young.get(size)
        if young is None:
            young = self._young.setdefault(size, [])
        young.append(offset)

    # Giving memory back to the system -----------------------------------------------------------------------------

    def trim(self, *, aged_only: bool = False) -> int:
        """Discard free memory and join it with its neighbours.

        Args:
            aged_only: only blocks that were not used since the last call with this (called at even intervals), and
                what an earlier owner left behind.

        Returns:
            The bytes given back to the ledger.
        """
        self._turn += 1
        before = self.committed_nbytes
        parts: list[_Part] = []
        done: list[_Part] = []
        try:
            _take_blocks(self._aged, parts)
            if aged_only:
                self._aged, self._young = self._young, self._aged
            else:
                _take_blocks(self._young, parts)
            if parts or self._warm.peek():
                parts.extend((start, end, self._cold) for start, end in self._cold.take_all())
                parts.extend((start, end, self._warm) for start, end in self._warm.take_all())
                first, limit = self._bump, self._bump_end
                self._bump = self._bump_end = 0
                parts.append((first, limit, self._cold))
                self._join(parts, done)
        finally:  # interrupted
            self._keep(done)
            self._keep(parts)
        return before - self.committed_nbytes

    def _join(self, parts: list[_Part], done: list[_Part]) -> None:
        """Make cold extents of all runs of neighbouring free parts that contain a whole page.

        Every part is in one of the two lists, or was put back, whenever this is interrupted.
        """
        parts.sort(key=lambda part: part[:2], reverse=True)
        while parts:
            run = [parts.pop()]
            try:
                while parts and parts[-1][0] == run[-1][1]:
                    run.append(parts.pop())
                if whole_pages_nbytes(run[0][0], run[-1][1]) and (nbytes := self._discard(run)) is not None:
                    run = [(run[0][0], run[-1][1], self._cold)]  # first: better too many count than too few
                    self._commit(-nbytes)
            finally:
                done.extend(run)
            self._keep(done)

    def _discard(self, run: list[_Part]) -> int | None:
        """Discard the committed pages of a run: those not wholly inside one of its cold parts; how many bytes."""
        position, end = run[0][0], run[-1][1]
        gaps = []
        for part in run:
            if part[2] is self._cold and whole_pages_nbytes(part[0], part[1]):
                gaps.append((position, -(-part[0] // PAGE_NBYTES) * PAGE_NBYTES))
                position = part[1] // PAGE_NBYTES * PAGE_NBYTES
        gaps.append((position, end))
        try:
            for start, stop in gaps:
                self.arena.discard(start, stop - start)
        except PlatformError:  # some sandboxes cannot: then the memory stays warm, and ours
            return None
        return sum(whole_pages_nbytes(start, stop) for start, stop in gaps)

    def _keep(self, parts: list[_Part]) -> None:
        """Put parts back to where they came from; takes them out."""
        while parts:
            start, end, extents = parts.pop()
            if extents is None:
                self._aged.setdefault(end - start, []).append(start)
            else:
                extents.put(start, end)


def _take_blocks(lists: dict[int, list[int]], parts: list[_Part]) -> None:
    for size in list(lists):  # not items(): making tuples may start a collection, in which user code adds a size
        parts.extend((offset, offset + size, None) for offset in popped(lists[size]))
