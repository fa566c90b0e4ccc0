"""Every call into torch that its documentation does not promise, each under a name of ours.

No other module of tpool touches an underscore of torch. Each function here has a test, so that a new torch which
changes one of them fails in ``tests/test_torch_private.py`` and nowhere deeper. What exists only in some versions is
detected once, at import, by looking for it.

Tested with torch 2.13.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch

__all__ = [
    "CAN_SWAP",
    "COUNTS_USES",
    "PLAIN_KEYS",
    "dispatch_keys",
    "file_of_mapping",
    "is_lazy",
    "known_to_python",
    "make_subclass",
    "no_torch_function",
    "object_state",
    "only_owner",
    "quantized_per_channel",
    "quantized_per_tensor",
    "set_conj",
    "set_neg",
    "set_object_state",
    "share_by_fd",
    "shared_by",
    "shared_fd",
    "shared_name",
    "sole_storage_uses",
    "storage_from_fd",
    "storage_from_name",
    "storage_id",
    "storage_uses",
    "strided_nested",
    "strided_nested_parts",
    "swap_data",
    "tensor_uses",
    "transformed_by",
    "typed_storage",
    "untyped_storage",
]

_C: Any = torch._C
_Untyped: Any = torch.UntypedStorage
_Typed: Any = torch.TypedStorage
_utils: Any = torch._utils

COUNTS_USES: bool = hasattr(torch.Tensor, "_use_count") and hasattr(_C, "_storage_Use_Count")
"""Whether torch tells how many references to a tensor or storage there are."""

CAN_SWAP: bool = COUNTS_USES and hasattr(torch.UntypedStorage, "_swap_data_ptr_")
"""Whether a storage can be moved in place under all its views (torch 2.12 and later)."""


# What kind of tensor -----------------------------------------------------------------------------------------------

dispatch_keys = _C._dispatch_keys
"""The set of kernels a tensor is sent to: one comparison tells dense CPU tensors from every other kind (0.9 us)."""

PLAIN_KEYS = dispatch_keys(torch.empty(0, device="cpu"))
"""The dispatch keys of a dense CPU tensor without any bit that changes how its memory is read."""

# Transformations that exist only inside a call of the function they transform; the tensor's own memory says nothing.
_TRANSFORMS = {
    "FuncTorchBatched": "torch.vmap",
    "FuncTorchGradWrapper": "torch.func.grad and its kin",
    "FuncTorchDynamicLayerFrontMode": "torch.func",
    "Batched": "the old vmap",
    "Functionalize": "functionalization",
    "ZeroTensor": "forward-mode autograd (a tensor of zeros without memory)",
}


def transformed_by(tensor: torch.Tensor) -> str | None:
    """What wraps the tensor so that it has no memory of its own, in words; None for a tensor that has."""
    keys = dispatch_keys(tensor)
    for name, words in _TRANSFORMS.items():
        key = getattr(_C.DispatchKey, name, None)
        if key is not None and keys.has(key):
            return words
    return None


def no_torch_function() -> Any:
    """A context in which a subclass's ``__torch_function__`` is not asked."""
    return _C.DisableTorchFunctionSubclass()


def set_conj(tensor: torch.Tensor) -> None:
    """Set the conjugate bit, in place and without a view (``Tensor.conj()`` would make one)."""
    _C._set_conj(tensor, True)


def set_neg(tensor: torch.Tensor) -> None:
    """Set the negative bit, in place and without a view."""
    _C._set_neg(tensor, True)


def make_subclass(cls: type, data: torch.Tensor, requires_grad: bool) -> Any:
    """``data`` as an instance of a Tensor subclass, on the same memory; the subclass's ``__init__`` is not called."""
    return torch.Tensor._make_subclass(cls, data, requires_grad)


def is_lazy(cls: type) -> bool:
    """Whether this is the class of a parameter or buffer that a lazy module has not given a shape yet."""
    return issubclass(cls, torch.nn.parameter.UninitializedTensorMixin)  # type: ignore[attr-defined]


def object_state(tensor: torch.Tensor) -> Any:
    """Python state of a subclass: ``__getstate__``, or attributes and slots, as torch itself pickles it."""
    return _utils._get_obj_state(tensor)


def set_object_state(tensor: torch.Tensor, state: Any) -> None:
    """The inverse of ``object_state``; a subclass's own ``__setstate__`` is called, ``Tensor``'s is not."""
    setstate = getattr(type(tensor), "__setstate__", torch.Tensor.__setstate__)
    if setstate is not torch.Tensor.__setstate__:
        setstate(tensor, state)
    else:
        _utils._set_obj_state(tensor, state)


# Storages ----------------------------------------------------------------------------------------------------------


def storage_id(tensor: torch.Tensor) -> int:
    """Names the tensor's storage: equal to ``storage._cdata`` of the one it views; valid while that lives."""
    return int(_storage_id(tensor))


_storage_id = _C._storage_id


def storage_uses(storage: torch.UntypedStorage) -> int:
    """How many references to the storage there are in all: tensors, autograd, exports, and its Python object."""
    return _C._storage_Use_Count(storage._cdata)  # type: ignore[no-any-return]


def tensor_uses(tensor: torch.Tensor) -> int:
    """How many references to the tensor there are below Python: its Python object, autograd, DLPack exports."""
    return tensor._use_count()  # type: ignore[no-any-return, attr-defined]


def _sole_uses() -> tuple[int, int, int]:
    """Counted, not assumed: what the counters say of a storage and a tensor that only one Python tensor knows."""
    if not COUNTS_USES:
        return 0, 0, 0
    tensor = torch.empty(1, device="cpu")
    storage = tensor.untyped_storage()
    with_tensor, of_tensor = storage_uses(storage), tensor_uses(tensor)
    del tensor
    return with_tensor, storage_uses(storage), of_tensor


_SOLE_WITH_TENSOR, _SOLE_BARE, _SOLE_TENSOR = _sole_uses()


def sole_storage_uses(tensors: int) -> int:
    """``storage_uses`` of a storage that is known to this many Python tensors and to nobody else."""
    return _SOLE_BARE + tensors * (_SOLE_WITH_TENSOR - _SOLE_BARE)


def known_to_python(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether only Python, and views among these tensors, hold each of them: no DLPack export, no autograd graph."""
    views = Counter(id(tensor._base) for tensor in tensors)
    return all(tensor_uses(tensor) == _SOLE_TENSOR + views[id(tensor)] for tensor in tensors)


def only_owner(storage: torch.UntypedStorage, tensor: torch.Tensor | None) -> bool:
    """Whether nobody holds the storage but this one Python tensor; or, with None, nobody but its Python object.

    The tensor need not be on the storage any more: ``tensor.data = other`` takes it off.
    """
    uses = storage_uses(storage)
    if tensor is None:
        return uses == _SOLE_BARE
    return uses == _SOLE_WITH_TENSOR and tensor_uses(tensor) == _SOLE_TENSOR and _storage_id(tensor) == storage._cdata


def swap_data(storage: torch.UntypedStorage, other: torch.UntypedStorage) -> None:
    """Exchange the memory of two CPU storages of equal size; every view of either follows. Needs ``CAN_SWAP``."""
    storage._swap_data_ptr_(other)  # type: ignore[attr-defined]


def typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    """A ``TypedStorage`` on this storage, without the deprecation warning."""
    return _Typed(wrap_storage=storage, dtype=dtype, _internal=True)


def untyped_storage(storage: Any) -> torch.UntypedStorage:
    """The ``UntypedStorage`` inside a ``TypedStorage``, without the deprecation warning."""
    untyped: torch.UntypedStorage = storage._untyped_storage
    return untyped


# Storages that torch shares by itself ------------------------------------------------------------------------------


def shared_by(storage: torch.UntypedStorage) -> Literal["fd", "name", "file", "private file"]:
    """How a storage of which torch says ``is_shared()`` came to be so.

    ``"fd"`` and ``"name"`` are torch's two strategies, ``"file"`` is ``torch.from_file(shared=True)``. The last is
    no sharing at all: torch counts a private mapping of a file as shared too.
    """
    if storage._get_filename() is not None:
        return "file"
    try:
        return "fd" if shared_fd(storage) >= 0 else "private file"  # torch closes the descriptor of a mapped file
    except RuntimeError:
        return "name"


def shared_fd(storage: torch.UntypedStorage) -> int:
    """The descriptor behind a storage shared by ``"fd"``, owned by the storage."""
    return int(storage._get_shared_fd())  # type: ignore[attr-defined]


def shared_name(storage: torch.UntypedStorage) -> tuple[bytes, bytes]:
    """(manager, name) of a storage that lies in shared memory of torch's strategy ``file_system`` already."""
    manager, name, _ = storage._share_filename_cpu_()
    return bytes(manager), bytes(name)


def share_by_fd(storage: torch.UntypedStorage) -> int:
    """Move the storage into shared memory of torch's and give its descriptor, owned by the storage.

    The old memory is freed at once, under the eyes of whoever knows its address.
    """
    return int(storage._share_fd_cpu_()[0])


def storage_from_fd(fd: int, nbytes: int) -> torch.UntypedStorage:
    """A storage on the shared memory behind ``fd``; the descriptor is duplicated, not taken over."""
    return _Untyped._new_shared_fd_cpu(fd, nbytes)  # type: ignore[no-any-return]


def storage_from_name(manager: bytes, name: bytes, nbytes: int) -> torch.UntypedStorage:
    """A storage on named shared memory of torch's; RuntimeError if the name or its manager is gone."""
    return _Untyped._new_shared_filename_cpu(manager, name, nbytes)  # type: ignore[no-any-return]


def file_of_mapping(storage: torch.UntypedStorage) -> str | None:
    """The path, today, of the file whose shared mapping starts where the storage does; None if it has none.

    Read from the kernel's list of mappings, for torch remembers only the name the file had when it was opened.
    """
    start = f"{storage.data_ptr():x}-"
    with open("/proc/self/maps", "rb") as maps:
        for raw in maps:
            line = os.fsdecode(raw)
            if not line.startswith(start):
                continue
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) < 6 or fields[1][3] != "s" or int(fields[2], 16) != 0 or fields[5].endswith(" (deleted)"):
                return None
            return fields[5].replace("\\012", "\n")  # the one character the kernel escapes
    return None


# Layouts -----------------------------------------------------------------------------------------------------------


def quantized_per_tensor(dtype: torch.dtype, scale: float, zero_point: int) -> torch.Tensor:
    """An empty CPU tensor with this quantizer, ready for ``set_``."""
    empty: Any = torch._empty_affine_quantized
    return empty([0], scale=scale, zero_point=zero_point, dtype=dtype, device="cpu")  # type: ignore[no-any-return]


def quantized_per_channel(
    dtype: torch.dtype, size: tuple[int, ...], scales: torch.Tensor, zero_points: torch.Tensor, axis: int
) -> torch.Tensor:
    """A CPU tensor of this size with a quantizer per channel, ready for ``set_``."""
    empty: Any = torch._empty_per_channel_affine_quantized
    return empty(  # type: ignore[no-any-return]
        size, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype, device="cpu"
    )


def strided_nested_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Buffer, sizes, strides and offsets of a nested tensor of the strided layout; the buffer shares its memory."""
    nested: Any = tensor
    return (
        nested.values(),
        nested._nested_tensor_size(),
        nested._nested_tensor_strides(),
        nested._nested_tensor_storage_offsets(),
    )


def strided_nested(
    buffer: torch.Tensor, sizes: torch.Tensor, strides: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """The inverse of ``strided_nested_parts``, on the same memory."""
    nested_view: Any = torch._nested_view_from_buffer
    return nested_view(buffer, sizes, strides, offsets).detach()  # type: ignore[no-any-return]
