"""Who may still read which block of shared memory: one table per process.

Blocks travel by (arena, offset, size); the rule of lifetime is one: *the sender keeps what it sent until the receiver
gives it back or dies*. Each hop follows it, so forwarding needs no other::

        owner                     peer                       peer's peer
    allocate ─► entry ── lend ─► receive ─► entry ── lend ─► receive ─► entry
                  ▲                           ▲                           │ last view died
    Allocator.free│◄─ given_back ◄────────────│◄─ given_back ◄────────────┘ take_give_backs

An entry goes when its views are dead, nothing is lent and no forked child may read it; then the owner frees the
block, and anybody else gives back one lease to the entry's *anchor*: the peer from whom the block first came while
there was no entry. A lease on a block that has an entry already is given back to its sender at once. So the anchors
form a tree towards the owner, and no cycle can wait for itself.

After a fork the child's views stay valid, but its table is empty: it owns nothing and owes nobody. In the parent the
fork holds every live block, since the child may read its tensors until it ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tpool.errors import SharedMemoryExhausted
from tpool.tensors.ageing import Ageing
from tpool.tensors.arena import Allocator, Arena
from tpool.tensors.entries import Block, Peer
from tpool.tensors.heap import Heap
from tpool.tensors.lease_table import SMALL_PART, LeaseTable
from tpool.tensors.prefault import PREFAULT_NBYTES, prefault

__all__ = ["Block", "LeaseTable", "Memory", "Peer", "table"]

# How long one wait for memory lasts. Memory that another process discards is found only by looking: shorter finds it
# sooner, longer costs less.
_WAIT_SECONDS = 0.05

# Blocks that are asked for together take no more than this, and than a small part of the budget: for a moment nobody
# else can have them.
_SOME_NBYTES = 2 << 20


class Memory:
    """Where one side of one pool allocates: an arena, and how to wait when memory is short.

    Any thread may call, but not one that must serve others meanwhile.

    Args:
        arena: one of ours.
        wait: blocks for at most the given seconds, until memory may have come back (reading give-backs meanwhile);
            returns False when none can.
        leases: the table that knows the arena; the process's own by default.
        threads: how many CPUs may be kept busy to get new memory.
    """

    __slots__ = ("_ageing", "_granted", "_heap", "_table", "_threads", "_wait", "_waiters", "arena")

    def __init__(
        self,
        arena: Arena,
        wait: Callable[[float], bool],
        leases: LeaseTable | None = None,
        *,
        threads: Callable[[], int] = lambda: 1,
    ) -> None:
        self.arena = arena
        self._wait = wait
        self._table = leases or table()
        self._threads = threads
        self._waiters: dict[object, None] = {}
        self._granted = False
        self._ageing = Ageing(self._table, arena)
        self._heap = Heap()

    def allocate(self, nbytes: int, *, lazily: bool = False, at_once: bool = False) -> Block:
        """A block of ``nbytes`` (at least 1), waiting for memory if need be.

        Args:
            nbytes: how much.
            lazily: whether new pages are to come as they are touched; else those of a large block are asked for now,
                as all of it is about to be written.
            at_once: whether not to wait.

        Raises:
            SharedMemoryExhausted: none can come back, or the whole budget is not enough; or there is none now.
            PoolEndedError: the pool was closed, or belongs to the process that forked us.
        """
        if lazily or nbytes < PREFAULT_NBYTES:
            return self._allocate(nbytes, at_once)
        before = self._committed_nbytes()
        block = self._allocate(nbytes, at_once)
        if self._committed_nbytes() > before:  # by another thread, perhaps: then this does nothing
            prefault(self.arena.address + block.offset, nbytes, self._threads())
        return block

    def exchange(self, nbytes: int, *, at_once: bool = False) -> Block:
        """As ``allocate``, for a storage that leaves the heap, which gives some back where much new is taken."""
        block = self.allocate(nbytes, at_once=at_once)
        self._heap.leave(nbytes)
        allocator = self._table.allocator(self.arena)
        if allocator is not None:
            self._heap.exchange(allocator.committed_nbytes, allocator.ledger.budget_nbytes // SMALL_PART)
        return block

    def exchange_some(self, nbytes: int, count: int) -> list[Block]:
        """As ``exchange``, blocks of one size: as many as are to be had cheaply, ``count`` at most; at least one.

        Raises:
            SharedMemoryExhausted, PoolEndedError: see ``allocate``.
        """
        allocator = self._table.allocator(self.arena)
        most_nbytes = 0 if allocator is None else min(_SOME_NBYTES, allocator.ledger.budget_nbytes // SMALL_PART)
        count = min(count, most_nbytes // nbytes)
        blocks = self._table.allocate_young(self.arena, nbytes, count) if count > 1 else []
        return blocks or [self.exchange(nbytes)]

    def limit_wait(self, timeout: float | None) -> float | None:
        """For how long the one thread that serves others may wait; see ``Ageing.limit``."""
        return self._ageing.limit(timeout)

    def _committed_nbytes(self) -> int:
        allocator = self._table.allocator(self.arena)
        return 0 if allocator is None else allocator.committed_nbytes

    def _allocate(self, nbytes: int, at_once: bool = False) -> Block:
        block = self._table.allocate(self.arena, nbytes)
        if block is not None:
            return block
        if at_once:
            raise SharedMemoryExhausted(f"there are no {nbytes} bytes of shared memory now")
        if self._table.busy_here:  # who waits is to be told by threads that want the table
            raise SharedMemoryExhausted(
                f"cannot have {nbytes} bytes of shared memory in a signal handler or finalizer that interrupts the"
                " bookkeeping of that memory; send smaller tensors there, or none"
            )
        allocator = self._table.allocator(self.arena)
        assert allocator is not None, "it did not raise PoolEndedError"
        waiter = object()
        try:
            self._waiters[waiter] = None
            return self._allocate_waiting(nbytes, allocator)
        finally:
            self._waiters.pop(waiter, None)
            if not self._waiters:
                allocator.ledger.set_waiting(allocator.index, False)

    def grant(self) -> None:
        """Let the one who waits have what it waits for beyond the budget; for ``wait`` to call."""
        self._granted = True

    def _allocate_waiting(self, nbytes: int, allocator: Allocator) -> Block:
        hope = nbytes <= min(allocator.ledger.budget_nbytes, self.arena.nbytes)
        while hope:
            allocator.ledger.set_waiting(
                allocator.index, True
            )  # each time: another thread may just have ended waiting
            hope = self._wait(_WAIT_SECONDS)
            if hope:
                self._table.collect()
            else:
                self._table.collect_garbage()
            granted, self._granted = self._granted, False
            block = self._table.allocate(self.arena, nbytes, beyond_budget=granted)
            if block is not None:
                return block
        raise SharedMemoryExhausted(
            f"cannot have {nbytes} bytes of shared memory: {allocator.ledger.committed_nbytes()} of this pool's"
            f" {allocator.ledger.budget_nbytes} are in use, {allocator.used_nbytes} of them here, and none can come"
            " back; make the pool with a larger budget, or drop tensors and results earlier"
        )


# The one table of this process. A dict, because setdefault is one step: two threads may come first.
_process_table: dict[str, LeaseTable] = {}


def table() -> LeaseTable:
    """The table of this process; made at the first call."""
    known = _process_table.get("table")
    if known is not None:
        return known
    # The hooks come first, so that no fork slips through. Of two threads the loser's table stays empty for ever, and
    # its hooks do nothing.
    made = LeaseTable()
    os.register_at_fork(
        before=made.before_fork, after_in_parent=made.after_fork_in_parent, after_in_child=made.after_fork_in_child
    )
    return _process_table.setdefault("table", made)
