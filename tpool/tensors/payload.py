"""A pickled object on its way: a stream, blocks, descriptors, and which definitions it needs."""

from __future__ import annotations

import itertools
import os
import struct
from dataclasses import dataclass, field
from typing import NewType

from tpool.tensors.leases import Block

__all__ = ["STOP", "TRAILER", "DefinitionId", "GroupId", "HeldObject", "Payload", "Received"]

STOP = b"."[0]
"""The last byte of a plain stream: one that needs nothing but pickle."""

TRAILER = struct.Struct("<IB")
"""What follows the last STOP of any other stream: how many of the blocks are storages, and a byte that is not STOP.

The other blocks are out-of-band buffers, in the order in which the stream asks for them.
"""

GroupId = NewType("GroupId", int)
"""A group of definitions of one pool; a group's id is greater than those of the groups it requires."""

DefinitionId = NewType("DefinitionId", int)
"""A function or class of one pool that travels by value once and by this number afterwards."""


@dataclass(slots=True, eq=False)
class Payload:
    """An object pickled, ready to be sent any number of times, to any number of receivers.

    Attributes:
        data: the pickle stream; a block if it is longer than ``pickler.INLINE_NBYTES``.
        blocks: storages and out-of-band buffers, by index.
        fds: descriptors that travel, borrowed from objects in ``keep``.
        groups: groups of definitions that the receiver must have loaded before, in this order; see
            ``Definitions.missing``. Empty from worker to parent.
        keep: what must live until the payload is dropped.
        held: objects that the receiver must have been sent before; see ``held.py``.
    """

    data: bytes | Block
    blocks: list[Block] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    groups: tuple[GroupId, ...] = ()
    keep: list[object] = field(default_factory=list)
    held: list[HeldObject] = field(default_factory=list)

    @property
    def goes_alone(self) -> bool:
        """Whether it is all in its stream, but for definitions."""
        return not (self.blocks or self.fds or self.held) and isinstance(self.data, bytes)


_held_numbers = itertools.count(1)


class HeldObject:
    """An object that each worker of a pool is sent once; see ``held.py``.

    Attributes:
        id: its number, of this process.
        payload: the object.
        memory: of the pool that it was put into.
    """

    __slots__ = ("__weakref__", "id", "memory", "payload")

    def __init__(self, payload: Payload, memory: object) -> None:
        self.id = next(_held_numbers)
        self.payload = payload
        self.memory = memory


@dataclass(slots=True, eq=False)
class Received:
    """A payload as it came from a channel: leases taken, not yet decoded. Decoded at most once.

    Attributes:
        data: the pickle stream, or the block it lies in.
        blocks: as sent.
        fds: as sent, owned: decoding closes what it does not hand on, ``discard`` closes all.
    """

    data: bytes | Block
    blocks: list[Block] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    def discard(self) -> None:
        """Drop the claims on blocks and close the descriptors; allowed at any time, also twice."""
        self.data = b""
        self.blocks.clear()  # and so for whoever else holds the list, as the traceback of an error does
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)
