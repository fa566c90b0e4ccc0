"""Keeping a table of blocks in order: dead views are noticed, free memory goes back, and what Ctrl-C took is found.

A signal handler may raise in the main thread after any call, also in the midst of the table's and the allocators'
work. What they change is changed in an order in which that loses something at worst and gives nothing out twice:

- a block that was handed out and has no entry, or bytes that are in no list of an allocator;
- an entry that nothing needs, because who saw its last view die, or its last lease end, came no further;
- a block of a peer's that has no entry any more, of which the peer was not told.

Nobody writes that down as it happens, which would cost every block something. ``reclaim`` looks through all of it,
before somebody is told that there is no memory, and whenever old memory goes back to the system.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable

from tpool.tensors.arena import Arena
from tpool.tensors.block_table import BlockTable
from tpool.tensors.entries import Mapped

__all__ = ["KeptTable"]


class KeptTable(BlockTable):
    """A table of blocks that is kept in order; any thread may call any method."""

    def collect(self) -> None:
        """Notice dead views and ended children; give memory back if another process of the pool waits for some.

        Call it before a thread that serves others blocks or goes idle.
        """
        with self._lock:
            self._drain()
            self._end_holds()
            self._trim_if_needed(list(self._mapped.values()))

    def collect_garbage(self) -> None:
        """As ``collect``, after a collection of garbage, as cycles may hold views, and ``reclaim``.

        For who would have to give up otherwise: it takes 0.09 s in a caller that has little but torch, more with more
        objects, and runs finalizers. Left to itself the collector counts objects, not bytes, and comes after hundreds.
        """
        gc.collect()
        self.reclaim()
        self.collect()

    def _trim_if_needed(self, arenas: Iterable[Mapped]) -> None:
        """Give the free memory of these arenas back if another process of their pool waits for some."""
        for mapped in arenas:
            allocator = mapped.allocator
            if allocator is not None and allocator.ledger.anyone_waiting(besides=allocator.index):
                allocator.trim()

    def trim(self, arena: Arena | None = None, *, aged_only: bool = False) -> int:
        """Give free memory back to the system and to the pool's budget, after ``reclaim``.

        Args:
            arena: one of ours; all of ours without it.
            aged_only: only what was not used since the last such call; call it at even intervals.

        Returns:
            How many bytes that were.
        """
        self.reclaim()
        with self._lock:
            self._drain()
            self._end_holds()
            allocators = [mapped.allocator for mapped in self._mapped.values() if arena in (None, mapped.arena)]
            return sum(allocator.trim(aged_only=aged_only) for allocator in allocators if allocator is not None)

    # What an interrupt left ----------------------------------------------------------------------------------------

    def reclaim(self) -> None:
        """Find again what a signal handler that raised has left behind.

        Nobody else gets memory meanwhile: a microsecond for each block, 0.2 s for 200,000 of which half are in use. No
        object of the collector's is made for a block, as a collection here would run finalizers.

        Nothing happens in a signal handler or finalizer that interrupts the table's own work: what seems lost may be
        in its hands.
        """
        if self.busy_here:
            return
        with self._lock:
            self._drain()
            self._settle_rest()
            for entry in list(self._entries.values()):
                watch = entry.watch
                if watch is not None and watch() is None and entry.watch is watch:
                    entry.watch = None  # its death was not even noticed
                self._settle(entry)
            for address in list(self._slabs):
                if address not in self._entries:
                    with contextlib.suppress(ValueError):  # user code in a collection was faster
                        self._slabs.remove(address)
            for mapped in list(self._mapped.values()):
                self._reclaim_bytes(mapped)
                if mapped.removed:
                    self._close_if_empty(mapped)

    def _settle_rest(self) -> None:
        """Do what is left of letting peers' blocks go that have no entry any more; not in the midst of that."""
        for entry in list(self._unsettled):
            mapped, address = entry.mapped, entry.address
            if mapped.allocator is None and self._entries.get(address) is not entry:
                # The peer may have sent the block anew since; user code in a collection may drop that.
                with contextlib.suppress(ValueError):
                    while mapped.offsets.count(entry.offset) > (address in self._entries):
                        mapped.offsets.remove(entry.offset)
                if entry.anchor is not None and not mapped.removed:
                    entry.anchor.owe(entry, last=True)
            self._unsettled.pop(entry, None)

    def _reclaim_bytes(self, mapped: Mapped) -> None:
        allocator, making, entries, start = mapped.allocator, self._making, self._entries, mapped.arena.address
        if allocator is not None:
            # While any thread makes an entry of its block, every block without an entry may be that one.
            allocator.reclaim(lambda offset: making.blocks > 0 or start + offset in entries)
