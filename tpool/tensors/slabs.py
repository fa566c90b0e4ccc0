"""Small storages of one message share blocks: *slabs*.

A block has a price whatever its size: an entry, a weak reference, a lease, a line in a frame, a give-back; for 4 KB
that is half of all. A slab costs it once for many storages. It is an ordinary block that lives until the last storage
in it is gone, wherever that is; so slabs are small, and no larger than twice what the message has needed so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tpool.tensors import leases
from tpool.tensors.extents import ALIGNMENT
from tpool.tensors.leases import Block

__all__ = ["Place", "Room", "Slabs"]

# Larger storages have a block of their own, as the price is less than a tenth of what they cost.
SMALL_NBYTES = 8 << 10

# So many small storages of a message have blocks of their own: most messages have no more, and they waste nothing.
ALONE = 3

# One storage that is kept holds at most so much memory. Twice as much would save a twentieth of the time.
SLAB_NBYTES = 64 << 10


class Room(NamedTuple):
    """A part of a slab for storages of one size, one beside the other.

    Attributes:
        block: the slab.
        memory: all of it.
        start: the first byte of the first storage.
        step: from one storage to the next, in bytes.
        places: for how many storages.
    """

    block: Block
    memory: torch.UntypedStorage
    start: int
    step: int
    places: int


Place = int | tuple[int, int, int]
"""Where a storage of a message lies: the index of its block; or in a slab: (index, first byte, nbytes)."""


class Slabs:
    """The slabs of one message, on the side that sends it. Used by one thread.

    Args:
        allocate: makes a block of so many bytes.
        blocks: those of the message.
    """

    __slots__ = ("_allocate", "_block", "_blocks", "_index", "_indices", "_memory", "_met", "_met_nbytes", "_used")

    def __init__(self, allocate: Callable[[int], Block], blocks: list[Block]) -> None:
        self._allocate = allocate
        self._blocks = blocks
        self._met = self._met_nbytes = 0  # small storages so far
        self._block: Block | None = None  # the latest slab
        self._index = -1  # among the message's blocks, once it is one of them
        self._memory: torch.UntypedStorage | None = None  # all of it
        self._used = 0
        self._indices: dict[int, int] = {}  # by the slab's address

    def claim(self, nbytes: int) -> tuple[Block, int]:
        """A block for a storage, and the storage's first byte in it; ``place`` tells where in the message that is."""
        if nbytes > SMALL_NBYTES:
            return self._allocate(nbytes), 0
        need = nbytes + ALIGNMENT - 1 & -ALIGNMENT
        self._met += 1
        self._met_nbytes += need
        if self._met <= ALONE:
            return self._allocate(nbytes), 0
        block = self._block
        if block is None or self._used + need > block.nbytes:
            block = self._begin(max(4 * need, 2 * self._met_nbytes))
        start = self._used
        self._used = start + need
        return block, start

    def _begin(self, nbytes: int) -> Block:
        block = self._block = self._allocate(min(SLAB_NBYTES, nbytes))
        leases.table().note_slab(block)
        self._memory, self._index = None, -1
        self._used = 0
        return block

    def room(self, nbytes: int, count: int) -> Room:
        """Room for one of ``count`` small storages of one size at least, and for all of them if a slab has so much.

        It is nobody's before it is taken, which is before anything else is asked for.
        """
        need = nbytes + ALIGNMENT - 1 & -ALIGNMENT
        block = self._block
        if block is None or self._used + need > block.nbytes:
            block = self._begin(max(4 * need, count * need))
        return Room(block, self._whole(block), self._used, need, min(count, (block.nbytes - self._used) // need))

    def take(self, room: Room, count: int) -> int:
        """Take a part of the room, for so many storages and one at least; gives the index of the slab's block."""
        self._used += count * room.step
        self._met += count
        self._met_nbytes += count * room.step
        if self._index < 0:
            self._index = self._add(room.block)
        return self._index

    def storage(self, block: Block, start: int, nbytes: int) -> torch.UntypedStorage:
        """A storage on what was claimed."""
        if block is not self._block:
            return torch.frombuffer(block.view, dtype=torch.uint8).untyped_storage()
        part: torch.UntypedStorage = self._whole(block)[start : start + nbytes]  # 1.5 us; frombuffer takes 2.4
        return part

    def _whole(self, block: Block) -> torch.UntypedStorage:
        memory = self._memory
        if memory is None:
            memory = self._memory = torch.frombuffer(block.view, dtype=torch.uint8).untyped_storage()
        return memory

    def place(self, block: Block, start: int, nbytes: int) -> Place:
        """The place of ``nbytes`` from a block's byte ``start``; the block travels with the message from now on."""
        if block is self._block and self._index >= 0:
            return self._index, start, nbytes
        blocks = self._blocks
        if not start and nbytes == block.nbytes:
            blocks.append(block)
            return len(blocks) - 1
        index = self._add(block)
        if block is self._block:
            self._index = index
        return index, start, nbytes

    def _add(self, block: Block) -> int:
        address = block.arena.address + block.offset
        index = self._indices.get(address)
        if index is None:
            self._blocks.append(block)
            index = self._indices[address] = len(self._blocks) - 1
        return index
