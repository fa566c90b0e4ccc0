"""Move a storage into a block, in place, and free its old memory only if nobody can know its address.

Who knows a storage's memory: the tensors on it, which follow when the data pointer is swapped, and those who hold the
bare address and do not: an array of ``t.numpy()``, a DLPack import, a view of either. Freed under them, their next
read crashes the interpreter. What can be seen of them:

- ``numpy()`` makes the storage non-resizable for ever (so are storages on numpy's own or other foreign memory);
- a DLPack export holds the tensor that was exported, which its counter shows;
- an export of another tensor on the same storage shows only as one more user of the storage, like any view.

In doubt the old memory is *parked*: it hangs on the storage as an attribute and dies with it.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tpool.tensors import leases, torch_private
from tpool.tensors.slabs import SMALL_NBYTES, Room

if TYPE_CHECKING:
    from tpool.tensors.leases import Block

__all__ = ["ParkingLot", "copy_bytes", "known_to_tensors_alone", "move_small", "move_storage"]

# Old memory that stays parked until somebody looks closer who knows it. A look costs 30-60 ms (it asks the garbage
# collector for all tensors), as much as moving this many bytes into memory that is not warm; smaller, and messages
# with aliased storages are slow; larger, and a state_dict (each of its storages has two tensors) costs more memory.
PARKED_LIMIT_NBYTES = 64 << 20

# Where parked memory hangs. Attributes of a storage live as long as the storage, whoever holds it.
_PARKED = "_tpool_parked"


def move_storage(
    storage: torch.UntypedStorage,
    address: int,
    nbytes: int,
    target: torch.UntypedStorage,
    tensor: torch.Tensor | None,
) -> bool:
    """Move a CPU storage to the memory of another one; every tensor on it follows.

    Any thread may call, also two at once for one storage: the second finds it moved.

    Args:
        storage: not empty.
        address: where its memory was when it was seen to lie in no block.
        nbytes: how large it is.
        target: a storage of that size on fresh memory, of which nobody else knows; has the old memory afterwards.
        tensor: the tensor on it that is being sent, the only one that is known to the caller; None if not at hand.

    Returns:
        False if another thread was faster: then it lies in another block; or other code gave it other memory.
    """
    lock = _moving(storage, nbytes)
    # In a signal handler, or a finalizer, this may be the very storage that our thread is about to copy: it must not
    # lose its memory in between, and not be moved away again by who comes back.
    nested = lock._is_owned()
    with lock:
        if storage.data_ptr() != address or storage.nbytes() != nbytes:
            return False
        _memmove(target.data_ptr(), address, nbytes)
        unknown = not nested and storage.resizable() and torch_private.only_owner(storage, tensor)
        torch_private.swap_data(storage, target)
        if target.data_ptr() != address:
            torch_private.swap_data(storage, target)
            return False
        if not unknown:
            setattr(storage, _PARKED, (target, getattr(storage, _PARKED, None)))
        return True


def move_small(
    storages: Sequence[torch.UntypedStorage], tensors: Sequence[torch.Tensor], nbytes: int, room: Room
) -> tuple[int, list[torch.UntypedStorage]]:
    """Move small storages of one size into a slab, one after the other, as ``move_storage`` does.

    For many the calls between its steps would cost as much as the steps: 5.1 us for each of 250 of 4 KB, so 3.6.

    Args:
        storages: as many as there is room for.
        tensors: on each the one that is being sent.
        nbytes: how large each is.
        room: where they go.

    Returns:
        How many were moved, up to the first that may lie in a block already or is shared by torch; and those of them
        whose old memory is parked though they are resizable.
    """
    table = leases.table()
    lock = table.moving_small
    nested = lock._is_owned()  # type: ignore[attr-defined]
    memory, start = room.memory, room.start
    base = memory.data_ptr()
    only_owner, swap_data = torch_private.only_owner, torch_private.swap_data
    moved = 0
    parked: list[torch.UntypedStorage] = []
    with lock:
        for storage, tensor in zip(storages, tensors, strict=True):
            address = storage.data_ptr()
            low, high = table.span  # now: user code may have made a pool meanwhile, in a signal handler
            # User code may also have changed its size since it was looked at, as it waited for memory perhaps.
            if low <= address < high or storage.is_shared() or storage.nbytes() != nbytes:
                break
            target = memory[start : start + nbytes]
            _memmove(base + start, address, nbytes)
            resizable = storage.resizable()
            unknown = not nested and resizable and only_owner(storage, tensor)
            swap_data(storage, target)
            if target.data_ptr() != address:
                swap_data(storage, target)
                break
            if not unknown:
                setattr(storage, _PARKED, (target, getattr(storage, _PARKED, None)))
                if resizable:
                    parked.append(storage)
            start += room.step
            moved += 1
    return moved, parked


def copy_bytes(storage: torch.UntypedStorage, first: int, nbytes: int, block: Block, start: int) -> None:
    """Copy so many of the storage's bytes, from its byte ``first`` to the block's byte ``start``."""
    with _moving(storage, storage.nbytes()):  # or its memory could be freed under the copy
        _memmove(block.arena.address + block.offset + start, storage.data_ptr() + first, nbytes)


# (to, from, nbytes). memmove releases the GIL and starts no OpenMP threads, which would make a later fork unsafe:
# 0.5 us for 4 KB, 0.7 ms for 16 MB into warm memory. Storage.copy_ holds the GIL and needs 2 us and 0.5 ms with two
# threads; ctypes.memmove is the same function, but looks at each argument and needs 0.9 us.
_memmove = ctypes.CDLL(None).memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = None


def _moving(storage: torch.UntypedStorage, nbytes: int) -> Any:
    """The lock under which the memory of this storage of so many bytes changes hands.

    Small ones have one for all. Large ones share a few, found by address, for all other senders would wait for their
    copies; one made for each, hung on the storage, took 1.2 of 25 us. All are reentrant, as a signal handler or a
    finalizer may send the storage, too, and belong to the table, which is new in a forked child. (A handler and a
    finalizer that do so in two threads, each in the middle of a move, may wait for each other.)
    """
    table = leases.table()
    if nbytes <= SMALL_NBYTES:
        return table.moving_small
    return table.moving[(storage._cdata >> 6) % len(table.moving)]


class ParkingLot:
    """The storages of one message whose old memory is parked only because they have more than one tensor.

    Views of a storage (rows of a batch, a ``state_dict``) look like exports of it to the counters. When they have
    become many bytes, a closer look is worth its time: count the Python tensors on each.
    """

    __slots__ = ("_nbytes", "_storages")

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []
        self._nbytes = 0

    def note(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        """A resizable storage was just moved; see whether its old memory is parked."""
        if not hasattr(storage, _PARKED) or _moving(storage, nbytes)._is_owned():  # then it must not go
            return
        self._storages.append(storage)
        self._nbytes += nbytes
        if self._nbytes >= PARKED_LIMIT_NBYTES:
            storages, self._storages, self._nbytes = self._storages, [], 0
            alone = known_to_tensors_alone(storages)
            for parked in storages:
                if parked._cdata in alone:
                    delattr(parked, _PARKED)


def known_to_tensors_alone(storages: Iterable[torch.UntypedStorage]) -> set[int]:
    """Those of the storages (by ``_cdata``) that only tensors hold which only Python holds.

    Asks the garbage collector for all tensors. Each holds its storage once, and a view holds the tensor it was made
    from; whatever the counters show beyond that may be an export. A tensor made or gone while we count makes them
    differ as well, so an error is on the safe side.
    """
    wanted = {storage._cdata: storage for storage in storages}
    tensors: dict[int, list[torch.Tensor]] = {key: [] for key in wanted}
    with torch_private.no_torch_function():
        for candidate in gc.get_objects():
            # type() and not isinstance(), which would ask the object, and so run whatever code it likes.
            if not issubclass(type(candidate), torch.Tensor):
                continue
            try:
                key = torch_private.storage_id(candidate)
            except (RuntimeError, NotImplementedError):  # a kind without a storage
                continue
            if key in wanted:
                tensors[key].append(candidate)
        return {
            key
            for key, found in tensors.items()
            if torch_private.storage_uses(wanted[key]) == torch_private.sole_storage_uses(len(found))
            and torch_private.known_to_python(found)
        }
