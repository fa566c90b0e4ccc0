"""Shared memory that was not used for long goes back to the system."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpool.tensors.lease_table import LeaseTable
    from tpool.tensors.memfd import Arena

__all__ = ["AGE_SECONDS", "Ageing"]

AGE_SECONDS = 300.0
"""What was not used for once to twice as long goes back. Shorter: whoever uses a pool every few minutes pays for new
pages each time, ten times what a copy costs; longer: what was needed once stays with a pool that needs it no more."""

WORTH_NBYTES = 1 << 20
"""For less nobody is woken."""


class Ageing:
    """Gives back what is old in one arena of ours. Used by one thread.

    To give back 768 MB takes 0.2 s, in which nobody gets new memory. An idle pool wakes up once in ``AGE_SECONDS``,
    while it has such memory, or while somebody holds a tensor in any: of a tensor's death nobody is told, and its
    memory may be another process's.

    Args:
        table: knows the arena.
        arena: which.
    """

    __slots__ = ("_arena", "_looked", "_table")

    def __init__(self, table: LeaseTable, arena: Arena) -> None:
        self._table = table
        self._arena = arena
        self._looked = monotonic()

    def limit(self, timeout: float | None) -> float | None:
        """For how long a thread may wait that would wait so long (None: for ever); to be asked before each wait."""
        now = monotonic()
        if now >= self._looked + AGE_SECONDS:
            self._looked = now
            self._table.trim(self._arena, aged_only=True)
        allocator = self._table.allocator(self._arena)
        if (allocator is None or allocator.committed_nbytes < WORTH_NBYTES) and not self._table.has_blocks:
            return timeout
        left = self._looked + AGE_SECONDS - now
        return left if timeout is None else min(timeout, left)
