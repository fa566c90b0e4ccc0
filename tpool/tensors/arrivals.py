"""The storages of one message, on the side that received it: blocks and descriptors become memory of torch's again.

The functions that a pickle stream names here (``MARKERS``) stand for methods of the same name of the one ``Incoming``
of a message; the unpickler resolves them so. Called by themselves they raise, for a stream that names them cannot be
read without the blocks it came with.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tpool.errors import DecodeError
from tpool.tensors import leases, torch_private

if TYPE_CHECKING:
    from tpool.tensors.leases import Block
    from tpool.tensors.slabs import Place

__all__ = [
    "DTYPES",
    "MARKERS",
    "NAMES",
    "Incoming",
    "block_storage",
    "fd_storage",
    "leased",
    "named_storage",
    "strided_tensor",
    "tensors_alike",
    "whole_tensor",
]

DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
"""All dtypes of the installed torch by name. In a stream of ours they travel so: by themselves they pickle slowly."""

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""The inverse of ``DTYPES``."""

# Ahead of the data, torch's strategy file_system keeps a reference count of this size in the file.
NAMED_HEADER_NBYTES = 64


class Incoming:
    """The storages of one message. Used by one thread.

    Args:
        blocks: what arrived by block, by index; an index that holds something else is never asked for.
        fds: descriptors that arrived; the caller closes them when the message is decoded.
    """

    __slots__ = ("_blocks", "_empty", "_fds", "_first", "_slabs")

    def __init__(self, blocks: Sequence[Block], fds: Sequence[int]) -> None:
        self._blocks = blocks
        self._fds = fds
        # The first tensor at each place: its memory is that of all later ones.
        self._first: dict[Place, torch.Tensor] = {}
        self._slabs: set[int] = set()  # those of the blocks that were found to be slabs
        # One empty tensor per dtype: `new()` of it is five times faster than torch.empty.
        self._empty: dict[str, torch.Tensor] = {}

    def block_storage(self, place: Place) -> torch.UntypedStorage:
        """The storage at a place; the same one each time."""
        first = self._first.get(place)
        if first is None:
            first = self._on_memory(place, torch.uint8)
        return first.untyped_storage()

    def _on_memory(self, place: Place, dtype: torch.dtype) -> torch.Tensor:
        """The first tensor at a place: all of its memory, one-dimensional."""
        if type(place) is int:
            tensor = torch.frombuffer(self._blocks[place].view, dtype=dtype)
        else:
            index, start, nbytes = place  # type: ignore[misc]
            block = self._blocks[index]
            if index not in self._slabs:
                leases.table().note_slab(block)
                self._slabs.add(index)
            tensor = torch.frombuffer(block.view, dtype=dtype, count=nbytes // dtype.itemsize, offset=start)
        self._first[place] = tensor
        return tensor

    def whole_tensor(self, place: Place, dtype: str, *size: int) -> torch.Tensor:
        """A contiguous tensor that covers its whole storage."""
        if place in self._first:
            aliased: torch.Tensor = self._new(dtype).set_(self.block_storage(place), 0, size)
            return aliased
        # Straight from the buffer: 1.6 us, where an untyped storage and `set_` take 3.2 us. resize_ gives a shape
        # without making a view of a tensor that the receiver has never seen, as view() would.
        tensor = self._on_memory(place, DTYPES[dtype])
        return tensor if len(size) == 1 else tensor.resize_(size)

    def tensors_alike(
        self, dtype: str, size: tuple[int, ...], nbytes: int, indices: list[int], starts: list[int]
    ) -> list[torch.Tensor]:
        """Many contiguous tensors of one size, each of which covers its storage; a start of -1 is all of a block."""
        return [
            self.whole_tensor(index if start < 0 else (index, start, nbytes), dtype, *size)
            for index, start in zip(indices, starts, strict=True)
        ]

    def strided_tensor(
        self, place: Place, dtype: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> torch.Tensor:
        """Any dense tensor; offset and stride count elements."""
        tensor: torch.Tensor = self._new(dtype).set_(self.block_storage(place), offset, size, stride)
        return tensor

    def _new(self, dtype: str) -> Any:
        empty = self._empty.get(dtype)
        if empty is None:
            empty = self._empty[dtype] = torch.empty(0, dtype=DTYPES[dtype], device="cpu")
        return empty.new()

    def fd_storage(self, index: int, nbytes: int) -> torch.UntypedStorage:
        """A storage on shared memory of torch's, or on a file, behind a descriptor."""
        return torch_private.storage_from_fd(self._fds[index], nbytes)

    def named_storage(self, index: int, manager: bytes, name: bytes, nbytes: int) -> torch.UntypedStorage:
        """A storage on named shared memory of torch's, by name while the name lives, else by descriptor."""
        try:
            return torch_private.storage_from_name(manager, name, nbytes)
        except RuntimeError:
            # The sender has dropped it since. The memory is still there, only torch's name for it is not.
            mapping = memoryview(mmap.mmap(self._fds[index], NAMED_HEADER_NBYTES + nbytes))
            return torch.frombuffer(mapping[NAMED_HEADER_NBYTES:], dtype=torch.uint8).untyped_storage()

    def leased(self, index: int, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """A CUDA tensor or event; as long as its memory lives, so does the view of the token at ``index``."""
        made = make(*arguments)
        # Attributes of a storage live as long as the storage, whoever holds it. torch gives the same storage again
        # for memory that came before, and then it has the same token.
        owner: Any = made.untyped_storage() if isinstance(made, torch.Tensor) else made
        owner._tpool_token = self._blocks[index].view
        return made


# The markers ---------------------------------------------------------------------------------------------------------


def block_storage(place: Place) -> Any:
    """Stands for ``Incoming.block_storage``."""
    raise _unbound()


def whole_tensor(place: Place, dtype: str, *size: int) -> Any:
    """Stands for ``Incoming.whole_tensor``."""
    raise _unbound()


def tensors_alike(dtype: str, size: tuple[int, ...], nbytes: int, indices: list[int], starts: list[int]) -> Any:
    """Stands for ``Incoming.tensors_alike``."""
    raise _unbound()


def strided_tensor(place: Place, dtype: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Any:
    """Stands for ``Incoming.strided_tensor``."""
    raise _unbound()


def fd_storage(index: int, nbytes: int) -> Any:
    """Stands for ``Incoming.fd_storage``."""
    raise _unbound()


def named_storage(index: int, manager: bytes, name: bytes, nbytes: int) -> Any:
    """Stands for ``Incoming.named_storage``."""
    raise _unbound()


def leased(index: int, make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Stands for ``Incoming.leased``."""
    raise _unbound()


def _unbound() -> DecodeError:
    return DecodeError(
        "this pickle is part of a message of tpool and can only be read together with its shared memory"
    )


MARKERS: dict[str, Callable[..., Any]] = {
    marker.__name__: marker
    for marker in (block_storage, whole_tensor, tensors_alike, strided_tensor, fd_storage, named_storage, leased)
}
"""The functions of this module that a stream may name, by name."""
