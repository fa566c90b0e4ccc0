"""What a lease table writes down: blocks, peers, mapped arenas, and one entry per live block."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tpool.tensors.arena import Allocator
from tpool.tensors.memfd import Arena, Guard

__all__ = ["Block", "Entry", "Mapped", "Peer", "Watch", "check_entries", "drop"]


class Block:
    """A strong local claim on a live block of shared memory.

    The block lives here as long as ``view`` does, or anything that was made from it: a tensor by ``torch.frombuffer``,
    a numpy array, a slice, a read-only or cast view.

    A bare memoryview that lies in a garbage reference cycle counts as dead before the finalisers of that cycle run, so
    these must not read it. Tensors and arrays are safe: the collector does not see through them.

    Attributes:
        arena: where it lies.
        offset: where in the arena.
        nbytes: its size as asked for.
        view: all of its bytes, writable, of format 'B'.
    """

    __slots__ = ("arena", "nbytes", "offset", "view")

    def __init__(self, arena: Arena, offset: int, nbytes: int, view: memoryview) -> None:
        self.arena = arena
        self.offset = offset
        self.nbytes = nbytes
        self.view = view

    def __repr__(self) -> str:
        return f"<Block of {self.nbytes} bytes at {self.offset} in arena {self.arena.id:016x}>"


class Peer:
    """The other end of one channel, as a party to leases.

    In the parent there is one for each slot, which outlives the slot's workers; in a worker one for the parent.

    Attributes:
        name: for messages.
        held: leases that the peer holds on our blocks, by entry; the table's.
        pending: leases of ours that the peer will be told have ended, by (arena id, offset); the table's.
        pending_nbytes: the bytes of the blocks in ``pending``.

    Args:
        name: see above.
        owing: shared by the peers of one pool: those of them for whom something is pending are put in.
    """

    __slots__ = ("__weakref__", "_owing", "held", "name", "pending", "pending_nbytes")

    def __init__(self, name: str = "peer", owing: dict[Peer, None] | None = None) -> None:
        self.name = name
        self._owing = {} if owing is None else owing
        # Counted up by += on a key that is there: one step for other threads, and for user code inside a collection or
        # a signal handler. A defaultdict may start a collection where a key is missing, and CPython 3.10 looks for
        # signals where it jumps.
        self.held: dict[Entry, int] = {}
        self.pending: dict[tuple[int, int], int] = {}
        self.pending_nbytes = 0

    def owe(self, entry: Entry, *, last: bool = False) -> None:
        """One lease that we got from this peer has ended; it is to be told.

        Args:
            entry: of the block.
            last: it is that of the entry itself, whose anchor this peer was.
        """
        key = (entry.mapped.arena.id, entry.offset)
        while True:
            if key not in self.pending:
                self.pending.setdefault(key, 0)
                self.pending_nbytes += entry.nbytes
            try:
                self.pending[key] += 1
            except KeyError:  # it was taken in between
                continue
            if last:
                entry.anchor = None  # no call since: whoever is interrupted, and comes again, does not tell it twice
            break
        self._owing[self] = None

    def hold(self, entry: Entry) -> None:
        """The peer gets one more lease on a block."""
        if entry not in self.held:
            self.held.setdefault(entry, 0)
        self.held[entry] += 1
        entry.lent += 1

    def take_pending(self) -> dict[tuple[int, int], int]:
        """What the peer is to be told; nothing is pending afterwards."""
        empty: dict[tuple[int, int], int] = {}
        self._owing.pop(self, None)  # first: what is added meanwhile puts us in again
        taken = self.pending
        self.pending = empty
        self.pending_nbytes = 0
        return taken

    def __repr__(self) -> str:
        return f"<Peer {self.name}>"


class Watch(weakref.ref[Guard]):
    """A weak reference to what all views of a block keep alive; knows the block when that is gone."""

    __slots__ = ("address",)

    address: int


@dataclass(slots=True, eq=False)
class Mapped:
    """An arena that the table knows.

    Attributes:
        arena: the mapping.
        allocator: which of its bytes are free, if it is ours.
        offsets: of the live blocks in an arena that is not ours, sorted; to see overlaps.
        removed: its pool has ended; closed when the last entry goes, and nobody is told of anything.
    """

    arena: Arena
    allocator: Allocator | None
    offsets: list[int] = field(default_factory=list)
    removed: bool = False

    @property
    def entries(self) -> int:
        """How many live blocks there are."""
        return len(self.offsets) if self.allocator is None else self.allocator.blocks_in_use


def drop(numbers: list[int], number: int) -> None:
    """Take a number out of a sorted list that has it."""
    while True:
        index = bisect_left(numbers, number)
        # Looked at again and deleted in one step, since the call above may have run a collection.
        try:
            if numbers[index] == number:
                del numbers[index]
                return
        except IndexError:  # which made the list shorter
            continue


class Entry:
    """A live block, in one process.

    Attributes:
        mapped: its arena.
        offset, nbytes: where it lies there.
        watch: tells when the last local view died; None when that has been noticed, or there was none.
        lent: how many leases the peers hold, all together.
        holds: how many forked children may still read it.
        anchor: whom to tell when all that has ended; None for our own blocks and where nobody is left to be told.
        slab: whether several storages share it; see ``slabs.py``.
    """

    __slots__ = ("anchor", "holds", "lent", "mapped", "nbytes", "offset", "slab", "watch")

    def __init__(self, mapped: Mapped, offset: int, nbytes: int, watch: Watch | None, anchor: Peer | None) -> None:
        self.mapped = mapped
        self.offset = offset
        self.nbytes = nbytes
        self.watch = watch
        self.anchor = anchor
        self.lent = 0
        self.holds = 0
        self.slab = False

    @property
    def address(self) -> int:
        """Where it lies in this process."""
        return self.mapped.arena.address + self.offset


def check_entries(
    entries: dict[int, Entry], mapped: Iterable[Mapped], peers: Iterable[Peer], held: list[Entry]
) -> None:
    """Assert what must be true of a lease table; for tests.

    Args:
        entries: its entries by address.
        mapped: its arenas.
        peers: all who may hold leases.
        held: the entries that forked children hold, once for each child.
    """
    leases = Counter(dict.fromkeys(entries.values(), 0))
    for peer in peers:
        for entry, count in peer.held.items():
            assert count > 0
            assert entries[entry.address] is entry, "a lease on what is gone"
            leases[entry] += count
    holds = Counter(held)
    for address, entry in entries.items():
        assert address == entry.address
        assert entry.lent == leases[entry]
        assert entry.holds == holds[entry]
        assert entry.watch is not None or entry.lent or entry.holds, "an entry that nothing needs"
    for arena in mapped:
        _check_mapped(arena, sorted((e.offset, e.nbytes) for e in entries.values() if e.mapped is arena))


def _check_mapped(mapped: Mapped, blocks: list[tuple[int, int]]) -> None:
    end = 0
    for offset, nbytes in blocks:
        assert end <= offset, "blocks overlap"
        end = offset + nbytes
    assert end <= mapped.arena.nbytes
    assert len(blocks) == mapped.entries
    if mapped.allocator is None:
        assert mapped.offsets == [offset for offset, _ in blocks]
    else:
        mapped.allocator.check()
