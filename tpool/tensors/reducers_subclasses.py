"""Subclasses of Tensor, and scripted modules: who takes them apart, or why they are refused.

Asked in this order: a reducer the user registered; a refusal; a lazy parameter; the class's own ``__reduce_ex__``; the
inner tensors of a wrapper (``__tensor_flatten__``); torch's default for other wrappers; and for a subclass with memory
of its own what a plain tensor gets, with its class around it.
"""

from __future__ import annotations

import copyreg
import io
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import Parameter

from tpool.errors import UnsupportedTensorError
from tpool.tensors import torch_private
from tpool.tensors.arrivals import DTYPES, NAMES
from tpool.tensors.reducers_content import Reduced, content, dress, refuse_non_leaf, set_state

if TYPE_CHECKING:
    from tpool.tensors.storages import Outgoing

__all__ = ["reduce_script", "reduce_subclass", "refuse_script_function"]

# By name, for importing torch.distributed costs a second and may be impossible.
_REFUSED = {
    "DTensor": "is a part of a tensor that is spread over a device mesh; send tensor.to_local() or .full_tensor()",
    "FakeTensor": "has no data; send a tensor on the meta device (tensor.to('meta') outside of the fake mode)",
    "FunctionalTensor": "exists only while torch traces a function; send it from outside",
}


def reduce_subclass(tensor: Any, sender: Outgoing) -> Reduced | Any:
    """An instance of a subclass of ``torch.Tensor`` other than ``Parameter``; NotImplemented: torch's or its own."""
    cls = type(tensor)
    if cls in copyreg.dispatch_table or cls in ForkingPickler._extra_reducers:  # type: ignore[attr-defined]
        return NotImplemented
    for base in cls.__mro__:
        if base.__name__ in _REFUSED and base.__module__.startswith("torch."):
            raise UnsupportedTensorError(f"cannot send a {cls.__name__}: it {_REFUSED[base.__name__]}")
    if torch_private.is_lazy(cls):
        return _uninitialized(tensor)
    refuse_non_leaf(tensor)
    if _reduces_itself(cls):
        return NotImplemented
    if hasattr(cls, "__tensor_flatten__") and hasattr(cls, "__tensor_unflatten__"):
        return _flattened(tensor)
    with torch_private.no_torch_function():
        if _is_wrapper(tensor):
            return NotImplemented
        return dress(tensor, content(tensor, sender), cls, torch_private.object_state(tensor))


def _reduces_itself(cls: Any) -> bool:
    return cls.__reduce_ex__ not in (torch.Tensor.__reduce_ex__, Parameter.__reduce_ex__) or (
        cls.__reduce__ is not torch.Tensor.__reduce__
    )


def _is_wrapper(tensor: Any) -> bool:
    """Whether it has no memory of its own; torch then pickles its class, shape and attributes."""
    cls = type(tensor)
    if cls.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        return False
    try:
        return bool(tensor.untyped_storage().data_ptr() == 0 and tensor.numel())
    except (RuntimeError, NotImplementedError):
        return True


def _flattened(tensor: Any) -> Reduced:
    """A wrapper subclass that names its inner tensors, which the pickler then meets by themselves."""
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names}
    attributes = {name: value for name, value in tensor.__dict__.items() if name not in inner}
    shape = tuple(tensor.shape), tensor.stride()
    return dress(tensor, (rebuild_flattened, (type(tensor), inner, context, *shape)), torch.Tensor, attributes)


def rebuild_flattened(
    cls: Any, inner: dict[str, torch.Tensor], context: Any, size: tuple[int, ...], stride: tuple[int, ...]
) -> Any:
    """The inverse of ``_flattened``."""
    return cls.__tensor_unflatten__(inner, context, size, stride)


def _uninitialized(tensor: Any) -> Reduced:
    """A parameter or buffer of a lazy module: it has a dtype and a device, and no shape yet."""
    made_by = rebuild_uninitialized, (type(tensor), tensor.requires_grad, str(tensor.device), NAMES[tensor.dtype])
    state = tensor.__dict__
    return (*made_by, (None, state), None, None, set_state) if state else made_by


def rebuild_uninitialized(cls: Any, requires_grad: bool, device: str, dtype: str) -> Any:
    """The inverse of ``_uninitialized``."""
    return cls(requires_grad=requires_grad, device=device, dtype=DTYPES[dtype])


# TorchScript -------------------------------------------------------------------------------------------------------


def reduce_script(module: Any, sender: Outgoing) -> Reduced:
    """A scripted or traced module, through its own serialisation: its tensors are copied, not shared."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return rebuild_script, (buffer.getvalue(),)


def rebuild_script(data: bytes) -> Any:
    """The inverse of ``reduce_script``."""
    load: Any = torch.jit.load
    return load(io.BytesIO(data))


def refuse_script_function(function: Any, sender: Outgoing) -> Reduced:
    """Raise: TorchScript gives a function no serialisation that gives a function back."""
    raise UnsupportedTensorError(
        f"cannot send the TorchScript function {function.name!r}; send the Python function, or a scripted module"
    )
