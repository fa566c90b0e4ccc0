"""Storages and buffers of one message on their way into Ray's object store: by snapshot, and copied once.

What is met while an object is pickled is only named; Ray copies it into its store before the call that sends it
returns (``parcels``). So nothing moves, the caller's tensors stay where they are, and whatever has no meaning on
another machine (descriptors, CUDA IPC) is refused.
"""

from __future__ import annotations

import ctypes
import pickle
from typing import Any, NoReturn, cast

import torch

from tpool.errors import TransportError, UnsupportedTensorError
from tpool.tensors.definitions import Definitions
from tpool.tensors.leases import Block, Memory
from tpool.tensors.pickler import Codec, WholeStorages
from tpool.tensors.slabs import Place
from tpool.tensors.storages import Outgoing, Sharing

__all__ = ["HeapBlock", "RayCodec"]


class HeapBlock:
    """Stands where a block of shared memory would: bytes of this process.

    Attributes:
        view: all of them; keeps whatever they belong to.
        nbytes: how many.
    """

    __slots__ = ("nbytes", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.nbytes = view.nbytes


class _Heap:
    """Stands where a pool's shared memory would; also what references of one pool are told by."""

    def allocate(self, nbytes: int) -> HeapBlock:
        """As ``Memory.allocate``."""
        return HeapBlock(memoryview(bytearray(nbytes)))


class _Snapshots(Outgoing):
    """Names the memory of storages; it must not change until the message was stored."""

    __slots__ = ()

    def place(self, storage: torch.UntypedStorage, tensor: torch.Tensor | None = None) -> Place:
        """See Outgoing; also for what torch shares by itself, as another machine could not map that."""
        place = self._places.get(storage._cdata)
        return self._place_copy(storage) if place is None else place

    def _copy(self, storage: torch.UntypedStorage, first: int, nbytes: int) -> Place:
        self._met.append(storage)
        self.blocks.append(self._snapshot(storage, first, nbytes))
        return len(self.blocks) - 1

    def _snapshot(self, storage: torch.UntypedStorage, first: int, nbytes: int) -> Block:
        return cast("Block", HeapBlock(_bytes_of(storage, first, nbytes)))

    def place_buffer(self, raw: memoryview) -> Block:
        """See Outgoing."""
        return cast("Block", HeapBlock(memoryview(raw)))

    def add_fd(self, fd: int, keep: object) -> NoReturn:
        """Refuse a descriptor."""
        raise TransportError(
            "cannot send a socket, pipe, lock or queue to a worker on Ray: its descriptor means something on this"
            " machine only; use a ray.util.queue.Queue or an actor"
        )

    def token(self) -> NoReturn:
        """Refuse CUDA memory."""
        raise UnsupportedTensorError(
            "cannot send a CUDA tensor to a worker on Ray: its memory can be shared on one machine only; send"
            " tensor.cpu()"
        )


class _Kept(_Snapshots, WholeStorages):
    """For what is sent later, perhaps more than once: copies, never a part of a storage."""

    __slots__ = ()

    def _snapshot(self, storage: torch.UntypedStorage, first: int, nbytes: int) -> Block:
        return cast("Block", HeapBlock(memoryview(bytearray(_bytes_of(storage, first, nbytes)))))

    def place_buffer(self, raw: memoryview) -> Block:
        """See Outgoing."""
        return cast("Block", HeapBlock(memoryview(bytearray(raw))))


def _bytes_of(storage: torch.UntypedStorage, start: int, nbytes: int) -> memoryview:
    """The storage's own bytes, kept alive by the view.

    By a tensor, not by the storage alone: a local pool that moves the storage meanwhile sees that somebody else knows
    the memory, and does not free it.
    """
    owner = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    array: Any = (ctypes.c_ubyte * nbytes).from_address(owner.data_ptr() + start)
    array.owner = owner
    return pickle.PickleBuffer(array).raw()


class RayCodec(Codec):
    """A codec for one side of a pool on Ray; see there.

    Args:
        definitions: in the pool's own process; None in a worker.
    """

    def __init__(self, definitions: Definitions | None = None) -> None:
        super().__init__(cast("Memory", _Heap()), definitions, sharing="copy")

    def new_outgoing(self, sharing: Sharing, *, whole: bool = False) -> Outgoing:
        """See Codec."""
        return (_Kept if whole else _Snapshots)(self.memory, "copy", can_swap=self.can_swap, token=self.token)
