"""A lease on memory that lies in no arena: CUDA memory, which dies with the process that made it.

Each message that carries such memory also lends one small block of the sender's arena, its *token*. What arrives keeps
the token's view, so the rule of lifetime holds for it as for any block: while the token is leased, somebody uses the
memory, and the sender must live.

::

    sender: Outgoing.token() ── index of the token's block ──► Incoming.leased(): memory, and the token's view on it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpool.tensors.leases import Block, Memory

__all__ = ["Token"]

# A block has an alignment of its own; its bytes are never read.
_NBYTES = 1


class Token:
    """The block that stands for all the CUDA memory which one codec has sent; allocated when first needed.

    A worker asks for its block only in the thread that encodes; elsewhere, two threads may at worst make two blocks.

    Args:
        memory: where the block comes from.

    Attributes:
        block: None as long as nothing was sent.
    """

    __slots__ = ("_memory", "block")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.block: Block | None = None

    def lend(self) -> Block:
        """The block, for a message that carries CUDA memory."""
        if self.block is None:
            self.block = self._memory.allocate(_NBYTES)
        return self.block
