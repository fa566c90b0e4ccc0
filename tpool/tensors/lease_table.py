"""Who holds leases on the blocks that live in this process: what was lent, received, and is to be given back."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable

from tpool.errors import PoolEndedError, ProtocolError
from tpool.tensors.arena import Arena
from tpool.tensors.entries import Block, Entry, Mapped, Peer, check_entries
from tpool.tensors.extents import ALIGNMENT
from tpool.tensors.housekeeping import KeptTable
from tpool.tensors.memfd import Guard, view_of

__all__ = ["MANY_BLOCKS", "MUCH_NBYTES", "SMALL_PART", "LeaseTable"]

# What a worker may keep from being given back while it has tasks: so much costs next to nothing to have idle, and each
# message less spares both sides a system call. A stream of 4 KB and 150 KB arguments to no-ops took 0.85 and 0.89 of
# the time, and the caller 0.75 and 0.86 of the processor time, that it took with each lease given back at once. But if
# a long task comes next, somebody may wait for just this memory until that ends: so all workers together keep no more
# than a small part of the pool's.
MANY_BLOCKS = 32
MUCH_NBYTES = 1 << 20
SMALL_PART = 64

# So many leases end under one lock, in half a millisecond to one; who wants a block waits no longer.
_GIVE_BACKS_AT_ONCE = 1000


class LeaseTable(KeptTable):
    """The arenas that this process has mapped, the blocks in them that live here, and who holds leases on them.

    Any thread may call any method. Each process has one, ``leases.table()``; tests make more, to play several
    processes.

    Invariants (see ``check``): live blocks do not overlap; an entry's ``lent`` is the sum over the peers; every entry
    has a view, a lease or a hold; the blocks in use of an arena of ours are exactly its entries.
    """

    # Leases --------------------------------------------------------------------------------------------------------

    def lend(self, blocks: Iterable[Block], peer: Peer) -> None:
        """The peer gets one more lease on each block; just before the frame that names them is sent.

        Raises:
            PoolEndedError: a block belongs to the process that forked us; nothing was lent.
        """
        with self._lock:
            if self._dead:
                self._drain()
            entries = [self._entry(block) for block in blocks]
            for entry in entries:
                peer.hold(entry)
            self._peers.add(peer)

    def _entry(self, block: Block) -> Entry:
        entry = self._entries.get(block.arena.address + block.offset)
        if entry is None or entry.mapped.arena is not block.arena:
            raise PoolEndedError(f"{block!r} belongs to the process that forked this one")
        return entry

    def receive(self, arena_id: int, offset: int, nbytes: int, peer: Peer) -> Block:
        """Take the lease on a block that a frame names; as the frame is read, before its sender can be forgotten.

        Raises:
            ProtocolError: there can be no such block.
        """
        mapped = self._mapped.get(arena_id)
        if mapped is None:
            raise ProtocolError(f"{peer.name} sent a block in an arena that is not known here: {arena_id:016x}")
        arena = mapped.arena
        if nbytes < 1 or offset < 0 or offset % ALIGNMENT or offset + nbytes > arena.nbytes:
            raise ProtocolError(f"{peer.name} sent a block of {nbytes} bytes at {offset} in {arena.nbytes}")
        guard, watch = self._watch(mapped, offset)
        entry = Entry(mapped, offset, nbytes, watch, peer)
        with self._lock:
            if self._dead:
                self._drain()
            known = self._entries.get(watch.address)
            if known is None:
                self._admit(entry, peer)
            else:
                living = self._receive_known(known, entry, peer)
                if living is not None:
                    del watch, entry.watch  # before the guard, so that its death is no news
                    guard = living
        return Block(arena, offset, nbytes, view_of(guard, nbytes))

    def _admit(self, entry: Entry, peer: Peer) -> None:
        """Enter a block that is new here, unless it overlaps another one or could only be ours."""
        mapped, offset = entry.mapped, entry.offset
        offsets, address = mapped.offsets, mapped.arena.address
        index = bisect_left(offsets, offset)
        # A neighbour may have gone since (user code in a collection); then its entry is gone as well.
        before = self._entries.get(address + offsets[index - 1]) if 0 < index <= len(offsets) else None
        after = self._entries.get(address + offsets[index]) if index < len(offsets) else None
        if mapped.allocator is not None:
            raise ProtocolError(f"{peer.name} sent back a block at {offset} that is not in use")
        if before is not None and before.offset + before.nbytes > offset:
            raise ProtocolError(f"{peer.name} sent a block at {offset} that overlaps the one at {before.offset}")
        if after is not None and after.offset < offset + entry.nbytes:
            raise ProtocolError(f"{peer.name} sent a block at {offset} that overlaps the one at {after.offset}")
        insort(offsets, offset)
        self._entries[entry.address] = entry

    def _receive_known(self, known: Entry, entry: Entry, peer: Peer) -> Guard | None:
        """A lease too many goes back at once. Gives the living guard, or None if the new one has become the guard."""
        if known.nbytes != entry.nbytes or (known.mapped.allocator is not None and not known.lent):
            raise ProtocolError(
                f"{peer.name} sent a block of {entry.nbytes} bytes at {entry.offset}; there is one of {known.nbytes}"
                f" bytes, lent {known.lent} times"
            )
        peer.owe(known)
        watch = known.watch
        living = None if watch is None else watch()
        if living is None:
            known.watch = entry.watch
        return living

    def owes_much(self, peer: Peer, most_nbytes: int) -> bool:
        """Whether there is so much to tell this peer that it cannot wait until this process is about to block.

        Args:
            peer: whom.
            most_nbytes: less memory may wait to be given back.
        """
        if not self._dead and not peer.pending:
            return False
        with self._lock:
            self._drain()
        return len(peer.pending) >= MANY_BLOCKS or peer.pending_nbytes >= most_nbytes

    def take_give_backs(self, peer: Peer) -> list[tuple[int, int, int]]:
        """What this peer is to be told now: (arena id, offset, count) for leases that ended. Cleared here."""
        if not self._dead and not peer.pending:
            return []
        with self._lock:
            self._drain()
            return [(arena_id, offset, count) for (arena_id, offset), count in peer.take_pending().items() if count]

    def pending_nbytes(self, peer: Peer) -> int:
        """The bytes that the peer may be able to use again once it is told what is pending for it."""
        if self._dead:
            with self._lock:
                self._drain()
        return peer.pending_nbytes

    def given_back(self, peer: Peer, give_backs: Iterable[tuple[int, int, int]]) -> None:
        """The peer told us of leases that have ended: (arena id, offset, count).

        Raises:
            ProtocolError: it does not hold so many; what was told before that counts.
        """
        told = iter(give_backs)
        while some := list(itertools.islice(told, _GIVE_BACKS_AT_ONCE)):
            with self._lock:
                if self._dead:
                    self._drain()
                touched = {self._end_leases(peer, *give_back) for give_back in some}
                self._trim_if_needed(touched)

    def _end_leases(self, peer: Peer, arena_id: int, offset: int, count: int) -> Mapped:
        mapped = self._mapped.get(arena_id)
        entry = None if mapped is None else self._entries.get(mapped.arena.address + offset)
        held = peer.held
        if mapped is None or entry is None or not 0 < count <= held.get(entry, 0):
            raise ProtocolError(f"{peer.name} gave back {count} leases on {arena_id:016x}:{offset} it does not hold")
        held[entry] -= count
        if not held[entry]:
            del held[entry]
        entry.lent -= count
        self._settle(entry)
        return mapped

    # A slot's worker is replaced -----------------------------------------------------------------------------------

    def forget(self, peer: Peer) -> None:
        """The process at the other end died, and all its frames were read.

        Its leases end, and nothing that was pending for it is told any more. What it had lent us stays valid: the
        memory lives on in those who mapped it.
        """
        with self._lock:
            self._drain()
            held = peer.held
            while held:
                entry, count = held.popitem()
                entry.lent -= count
                self._settle(entry)
            peer.take_pending()
            self._peers.discard(peer)
            self._trim_if_needed(list(self._mapped.values()))

    def live_blocks(self, peer: Peer, arena: Arena) -> list[tuple[int, int]]:
        """(offset, nbytes) of what lives in a slot's arena, for the slot's next worker, which must not hand it out.

        Call it as that worker's first frame is composed, after ``forget`` and before anything is lent to it: from here
        on the peer stands for the new process, which holds the other end of exactly one lease on each.
        """
        with self._lock:
            self._drain()
            self._settle_rest()  # or it would be told later, to a process that knows nothing of it
            peer.take_pending()
            blocks = []
            for entry in list(self._entries.values()):
                if entry.anchor is not peer:
                    continue
                if entry.mapped.arena is arena:
                    blocks.append((entry.offset, entry.nbytes))
                else:
                    entry.anchor = None  # it lay in a nested pool's arena, of which the new process knows nothing
            return sorted(blocks)

    def reinstate(self, arena: Arena, blocks: Iterable[tuple[int, int]], peer: Peer) -> None:
        """In a slot's worker: the blocks of the slot's earlier worker live on.

        Call it once, after ``add`` and before anything is allocated; with no blocks as well, since it finds the warm
        memory that was left and sets the ledger right.

        Args:
            arena: the slot's.
            blocks: what ``live_blocks`` gave in the parent.
            peer: the parent, which holds one lease on each.

        Raises:
            ProtocolError: they cannot be blocks of this arena.
        """
        with self._lock:
            mapped = self._mapped[arena.id]
            allocator = mapped.allocator
            assert allocator is not None, "only the arena's new owner reinstates"
            for offset, nbytes in sorted(blocks):
                allocator.reserve(offset, nbytes)
                entry = Entry(mapped, offset, nbytes, None, None)
                self._entries[entry.address] = entry
                peer.hold(entry)
            self._peers.add(peer)
            allocator.adopt()

    # Tests ---------------------------------------------------------------------------------------------------------

    def check(self, peers: Iterable[Peer] = ()) -> None:
        """Assert the invariants; for tests.

        Args:
            peers: whose leases count besides those of all peers that were lent something and not forgotten.
        """
        with self._lock:
            self._drain()
            held = [entry for entries in self._held_by_fork.values() for entry in entries]
            assert self._slabs == sorted(entry.address for entry in self._entries.values() if entry.slab)
            check_entries(self._entries, self._mapped.values(), self._peers.union(peers), held)
