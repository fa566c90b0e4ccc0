"""Payloads as they travel by Ray: small ones inside the call, large ones through the object store.

::

    Payload ── pack ──► Parcel ── wire ──► (stream, buffers, place) ──► unpack ──► Received
                          └── ref ── an argument of the call, by itself ──► buffers ──┘

A reference that is an argument by itself is fetched to the worker's node before the call begins, while the call before
it runs; one inside another object would be fetched when it is asked for.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from tpool.ray.codec import HeapBlock
from tpool.tensors.payload import GroupId, HeldObject, Payload, Received

__all__ = ["INLINE_NBYTES", "Parcel", "buffers_of", "pack", "unpack"]

INLINE_NBYTES = 64 * 1024
"""More goes through the object store: below, an object costs more (half a millisecond, on two cores) than copying this
much through a few sockets. Ray itself draws the line at 100 KB."""

# (stream, or None if it is the first buffer; buffers inside the call; place of the others, -1 for none)
Wired = tuple[bytes | None, tuple[bytes, ...], int]


@dataclass(slots=True, eq=False)
class Parcel:
    """An object ready to be sent, any number of times; a snapshot.

    Attributes:
        stream: the pickle stream; None if it is the first of the buffers.
        buffers: storages and out-of-band buffers that travel inside the call.
        ref: Ray's reference to the buffers, if they lie in the object store.
        nbytes: of everything.
        groups, held: see ``Payload``.
    """

    stream: bytes | None
    buffers: tuple[bytes, ...]
    ref: Any
    nbytes: int
    groups: tuple[GroupId, ...] = ()
    held: list[HeldObject] = field(default_factory=list)

    def wire(self, refs: list[Any]) -> Wired:
        """What stands for it in a call; its reference is added to those of the call."""
        if self.ref is None:
            return self.stream, self.buffers, -1
        refs.append(self.ref)
        return self.stream, (), len(refs) - 1


def buffers_of(payload: Payload) -> tuple[bytes | None, list[memoryview]]:
    """Stream and buffers of a payload; a long stream is the first buffer."""
    views = [block.view for block in payload.blocks]
    if isinstance(payload.data, bytes):
        return payload.data, views
    return None, [payload.data.view, *views]


def pack(payload: Payload, put: Callable[[Any], Any]) -> Parcel:
    """Make a payload ready to be sent; its storages may change afterwards.

    Args:
        payload: in which storages are only named.
        put: ``ray.put``.
    """
    stream, views = buffers_of(payload)
    nbytes = sum([view.nbytes for view in views]) + len(stream or b"")
    if nbytes <= INLINE_NBYTES:
        return Parcel(stream, tuple(map(bytes, views)), None, nbytes, payload.groups, payload.held)
    if stream is not None and len(stream) > INLINE_NBYTES:
        views = [memoryview(stream), *views]
        stream = None
    ref = put([pickle.PickleBuffer(view) for view in views])
    return Parcel(stream, (), ref, nbytes, payload.groups, payload.held)


def unpack(stream: bytes | None, buffers: Sequence[Any], view: Callable[[Any], memoryview]) -> Received:
    """A payload as it came.

    Args:
        stream: see ``Parcel``.
        buffers: likewise, or those of the object store.
        view: gives private memory with the bytes of a buffer.
    """
    blocks: list[Any] = [HeapBlock(view(buffer)) for buffer in buffers]
    data = stream if stream is not None else blocks.pop(0)
    return Received(cast("Any", data), blocks)
