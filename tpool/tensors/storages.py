"""The storages of one message: which move, which are copied, which go by a handle of torch's own.

::

    Outgoing (the sender's, one per message)                Incoming (the receiver's, one per message)
      place(storage, tensor)   ── place in a block ──►        block_storage, whole_tensor, strided_tensor
      place_region(storage, …) ── place in a block ──►        the same
      hand_over(storage)       ── descriptor or name ──►      fd_storage, named_storage

Sharing ``"share"``: a storage moves into a block of shared memory, in place and under all its views, unless it lies
in one already or the user shared it through torch. Sharing ``"copy"``: its bytes are copied and it stays where it is.

Invariants: one storage has one place in a message, so aliases stay aliases; ``"copy"`` never changes the caller's
storage; the user's own sharing is never undone.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from tpool.errors import TransportError, UnsupportedTensorError
from tpool.tensors import leases, torch_private
from tpool.tensors.arrivals import fd_storage, named_storage
from tpool.tensors.moving import ParkingLot, copy_bytes, known_to_tensors_alone, move_small, move_storage
from tpool.tensors.slabs import SMALL_NBYTES, Place, Slabs
from tpool.tensors.token import Token

if TYPE_CHECKING:
    from tpool.tensors.leases import Block, Memory

__all__ = ["Outgoing", "Overlap", "Sharing"]

Sharing = Literal["share", "copy"]

# Regions start on such a boundary of their storage, so that a view of another dtype on the same bytes is aligned too.
REGION_ALIGNMENT = 64


_ADDRESS_OF = operator.attrgetter("_cdata")


class Overlap(Exception):
    """Two tensors of a message share bytes, and the first was copied alone: pickle the message once more.

    Only in mode ``"copy"``. The ``Outgoing`` that raised it has taken note; its ``again()`` gives the one to use.
    """


class Outgoing:
    """The storages of one message, on the side that sends it. Used by one thread.

    Args:
        memory: where blocks come from; may wait for memory.
        sharing: what sending a storage means.
        can_swap: whether torch can move a storage in place; without, it is moved into a file of torch's own.
        token: stands for CUDA memory that travels.

    Attributes:
        blocks: what travels by block; other parts of the message append theirs.
        fds: descriptors that travel, borrowed.
        keep: owners of those descriptors, and of CUDA memory that travels.
        cuda_clones: what stands for CUDA storages that another process made, by address of the storage.
    """

    __slots__ = (
        "_met",
        "_parking",
        "_places",
        "_regions",
        "_slabs",
        "_token",
        "_token_index",
        "_whole",
        "blocks",
        "can_swap",
        "cuda_clones",
        "fds",
        "keep",
        "memory",
        "sharing",
    )

    def __init__(
        self,
        memory: Memory,
        sharing: Sharing = "share",
        *,
        can_swap: bool = torch_private.CAN_SWAP,
        token: Token | None = None,
    ) -> None:
        self.memory = memory
        self.sharing = sharing
        self.can_swap = can_swap
        self.blocks: list[Block] = []
        self.fds: list[int] = []
        self.keep: list[object] = []
        self.cuda_clones: dict[int, torch.UntypedStorage] = {}
        # By the storage's address, which another may get once this one is gone: so all that were met are held.
        self._met: list[torch.UntypedStorage] = []
        self._places: dict[int, Place] = {}
        self._slabs = Slabs(memory.exchange if sharing == "share" else memory.allocate, self.blocks)
        self._regions: dict[int, list[tuple[int, int, Place]]] = {}  # storage -> (start, stop, place), disjoint
        self._whole: set[int] = set()  # storages whose views overlapped in an earlier try
        self._parking = ParkingLot()
        self._token = token or Token(memory)
        self._token_index: int | None = None

    def again(self) -> Outgoing:
        """The one to use for the next try after ``Overlap``."""
        fresh = type(self)(self.memory, self.sharing, can_swap=self.can_swap, token=self._token)
        fresh._whole = self._whole
        return fresh

    def add_fd(self, fd: int, keep: object) -> int:
        """Index of a descriptor that travels; ``keep`` owns it."""
        self.fds.append(fd)
        self.keep.append(keep)
        return len(self.fds) - 1

    def token(self) -> int:
        """Index of the block that stands for CUDA memory: this process must live until the receiver has let it go."""
        if self._token_index is None:
            self.blocks.append(self._token.lend())
            self._token_index = len(self.blocks) - 1
        return self._token_index

    def place(self, storage: torch.UntypedStorage, tensor: torch.Tensor | None = None) -> Place | None:
        """Where the whole storage lies; None if it goes by torch's own handle.

        Args:
            storage: on the CPU, not empty.
            tensor: the tensor on it that is being sent; tells whether others may know the memory.
        """
        key = storage._cdata
        place = self._places.get(key)
        if place is not None:
            return place
        if storage.is_shared() and torch_private.shared_by(storage) != "private file":
            return None
        if self.sharing == "copy":
            return self._place_copy(storage)
        address, nbytes = storage.data_ptr(), storage.nbytes()
        found = leases.table().locate(address, nbytes)
        if found is None:
            if not self.can_swap:
                return self._place_without_swap(storage, tensor)
            found = self._move(storage, address, nbytes, tensor)
        self._met.append(storage)
        place = self._places[key] = self._slabs.place(*found, nbytes)
        return place

    def place_alike(
        self, storages: list[torch.UntypedStorage], tensors: list[torch.Tensor], nbytes: int
    ) -> tuple[list[int], list[int]] | None:
        """Where each of many storages of one size lies.

        Args:
            storages: on the CPU.
            tensors: on each the one that is being sent; nobody else has been placed in this message.
            nbytes: how large each is; not 0.

        Returns:
            The indices of their blocks, and their first bytes there, -1 where a storage is all of the block; None if
            one goes by torch's own handle, or has another size by now.
        """
        indices: list[int] = []
        starts: list[int] = []
        if self.sharing == "share" and self.can_swap:
            if nbytes <= SMALL_NBYTES:
                self._move_small(storages, tensors, nbytes, indices, starts)
            else:
                self._move_large(storages, tensors, nbytes, indices)
                starts += [-1] * len(indices)
        moved = len(indices)
        for storage, tensor in zip(storages[moved:], tensors[moved:], strict=True):
            place = self.place(storage, tensor) if storage.nbytes() == nbytes else None
            if place is None:
                return None
            if type(place) is int:
                indices.append(place)
                starts.append(-1)
            else:
                indices.append(place[0])  # type: ignore[index]
                starts.append(place[1])  # type: ignore[index]
        return indices, starts

    def _move_small(
        self,
        storages: list[torch.UntypedStorage],
        tensors: list[torch.Tensor],
        nbytes: int,
        indices: list[int],
        starts: list[int],
    ) -> None:
        """Move small storages into slabs, up to the first that must be looked at more closely."""
        low, high = leases.table().span
        if low <= storages[0].data_ptr() < high or storages[0].is_shared():
            return  # before a slab is asked for
        first, count = 0, len(storages)
        while first < count:
            room = self._slabs.room(nbytes, count - first)
            run = slice(first, first + room.places)
            moved, parked = move_small(storages[run], tensors[run], nbytes, room)
            if moved:
                indices += [self._slabs.take(room, moved)] * moved
                starts += range(room.start, room.start + moved * room.step, room.step)
            for storage in parked:
                self._parking.note(storage, nbytes)
            first += moved
            if moved < room.places:
                return

    def _move_large(
        self, storages: list[torch.UntypedStorage], tensors: list[torch.Tensor], nbytes: int, indices: list[int]
    ) -> None:
        """Move large storages into a block each, up to the first that must be looked at more closely.

        As ``place`` does for each, but for what only other kinds need: 1 of 16 us for 20 KB, and 1 of 26 for 150 KB,
        with the leases that end together.
        """
        table, slabs, memory = leases.table(), self._slabs, self.memory
        blocks: list[Block] = []
        ahead: list[Block] = []
        try:
            for storage, tensor in zip(storages, tensors, strict=True):
                address = storage.data_ptr()
                low, high = table.span  # now, as in move_small
                if low <= address < high or storage.is_shared():
                    break
                resizable = storage.resizable()
                # User code may change the storage while memory is waited for; then it does not move.
                ahead = ahead or memory.exchange_some(nbytes, len(storages) - len(blocks))
                block = ahead.pop()
                if not move_storage(storage, address, nbytes, slabs.storage(block, 0, nbytes), tensor):
                    break
                if resizable:
                    self._parking.note(storage, nbytes)
                blocks.append(block)
        finally:
            ahead.clear()  # the traceback of an interrupt would keep them
        first, moved = len(self.blocks), storages[: len(blocks)]
        indices += range(first, first + len(blocks))
        self.blocks += blocks
        self._met += moved
        self._places.update(zip(map(_ADDRESS_OF, moved), indices, strict=True))

    def place_region(self, storage: torch.UntypedStorage, start: int, stop: int) -> tuple[Place, int] | None:
        """In mode ``"copy"``: send only the bytes from ``start`` to ``stop``.

        Returns:
            Where they lie, and the byte of the storage that stands there first; None if the storage goes by torch's
            own handle.

        Raises:
            Overlap: an earlier view shares some of these bytes, and was sent without the others.
        """
        key = storage._cdata
        if key in self._whole or key in self._places or storage.is_shared():
            whole = self.place(storage)
            return None if whole is None else (whole, 0)
        start -= start % REGION_ALIGNMENT
        regions = self._regions.setdefault(key, [])
        for first, last, place in regions:
            if first <= start and stop <= last:
                return place, first
            if start < last and first < stop:
                self._whole.add(key)
                raise Overlap
        place = self._copy(storage, start, stop - start)
        regions.append((start, stop, place))
        return place, start

    def hand_over(self, storage: torch.UntypedStorage) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The handle of a storage for which ``place`` gave None: a marker and its arguments."""
        nbytes = storage.nbytes()
        how = torch_private.shared_by(storage) if storage.is_shared() else "not yet"
        if how == "name":
            manager, name = torch_private.shared_name(storage)
            return named_storage, (self._add_file(f"/dev/shm{name.decode()}", nbytes), manager, name, nbytes)
        if how == "file":
            return fd_storage, (self._add_file(_file_behind(storage), nbytes), nbytes)
        fd = torch_private.shared_fd(storage) if how == "fd" else torch_private.share_by_fd(storage)
        return fd_storage, (self.add_fd(fd, storage), nbytes)

    def _add_file(self, path: str, nbytes: int) -> int:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            # A storage on it owns a duplicate and closes it when the message is dropped.
            owner = torch_private.storage_from_fd(fd, nbytes)
        finally:
            os.close(fd)
        return self.add_fd(torch_private.shared_fd(owner), owner)

    def _move(
        self, storage: torch.UntypedStorage, address: int, nbytes: int, tensor: torch.Tensor | None
    ) -> tuple[Block, int]:
        resizable, slabs = storage.resizable(), self._slabs
        block, start = slabs.claim(nbytes)
        if not move_storage(storage, address, nbytes, slabs.storage(block, start, nbytes), tensor):
            found = leases.table().locate(storage.data_ptr(), nbytes)
            if found is None:
                raise TransportError(
                    "the storage of a tensor was resized, or shared through torch, while the tensor was being sent, by"
                    " another thread, a signal handler or a finalizer; send tensor.clone()"
                )
            return found
        if resizable:
            self._parking.note(storage, nbytes)
        return block, start

    def _copy(self, storage: torch.UntypedStorage, first: int, nbytes: int) -> Place:
        block, start = self._slabs.claim(nbytes)
        copy_bytes(storage, first, nbytes, block, start)
        self._met.append(storage)
        return self._slabs.place(block, start, nbytes)

    def _place_copy(self, storage: torch.UntypedStorage) -> Place:
        if storage._cdata in self._regions:  # a view of it was sent alone
            self._whole.add(storage._cdata)
            raise Overlap
        place = self._places[storage._cdata] = self._copy(storage, 0, storage.nbytes())
        return place

    def place_buffer(self, raw: memoryview) -> Block:
        """A block with the bytes of a buffer that is no storage, such as that of a numpy array."""
        block = self.memory.allocate(raw.nbytes)
        block.view[:] = raw
        return block

    def _place_without_swap(self, storage: torch.UntypedStorage, tensor: torch.Tensor | None) -> Place | None:
        """Older torch frees the memory that it moves: a storage that numpy or DLPack may know stays, and is copied.

        What holds this tensor may be its views or an export, which only a slow look can tell. Exports of other
        tensors on the storage are not looked for, as torch does not: each sparse tensor or row would pay for it.
        """
        held = tensor is not None and torch_private.COUNTS_USES and not torch_private.known_to_python([tensor])
        if not storage.resizable() or (held and not known_to_tensors_alone([storage])):
            return self._place_copy(storage)
        return None


def _file_behind(storage: torch.UntypedStorage) -> str:
    path = torch_private.file_of_mapping(storage)
    if path is None:
        raise UnsupportedTensorError(
            "cannot send a tensor of torch.from_file(shared=True) whose file has been deleted: no other process can"
            " map it; send tensor.clone()"
        )
    return path
