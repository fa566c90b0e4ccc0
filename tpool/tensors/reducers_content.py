"""What a tensor is made of, and what Python and autograd know of it.

A tensor travels as its *content*, a function and arguments that make a plain tensor of the same dtype, layout,
device, shape, stride and bytes, and around it its *dress*: class, ``requires_grad``, ``.grad``, attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from tpool.errors import UnsupportedTensorError
from tpool.tensors import reducers_layouts, torch_private
from tpool.tensors.arrivals import DTYPES, NAMES, strided_tensor, whole_tensor

if TYPE_CHECKING:
    from tpool.tensors.slabs import Place
    from tpool.tensors.storages import Outgoing

__all__ = ["Content", "Reduced", "content", "dense", "dress", "is_plain", "refuse_non_leaf"]

Reduced = tuple[Any, ...]
"""What ``__reduce_ex__`` may return."""

Content = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function, and the arguments with which it makes a tensor."""


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor of exactly the class ``torch.Tensor`` is a dense one on the CPU with nothing around it."""
    return (
        torch_private.dispatch_keys(tensor) == torch_private.PLAIN_KEYS
        and not tensor.requires_grad
        and tensor.grad is None
        and not tensor.__dict__
    )


# Dress -------------------------------------------------------------------------------------------------------------


def dress(tensor: torch.Tensor, made_by: Content, cls: type, state: Any) -> Reduced:
    """Put around a content what Python and autograd know of the tensor."""
    requires_grad = tensor.requires_grad
    if requires_grad:
        torch.utils.hooks.warn_if_has_hooks(tensor)
    if cls is not torch.Tensor or requires_grad:
        made_by = rebuild_dressed, (*made_by, cls, requires_grad)
    grad = tensor.grad if tensor.is_leaf else None  # reading .grad of a non-leaf warns
    if grad is None and not state:
        return made_by
    # As state, and not as arguments: an attribute may lead back to the tensor itself.
    return (*made_by, (grad, state), None, None, set_state)


def rebuild_dressed(make: Callable[..., torch.Tensor], arguments: tuple[Any, ...], cls: type, grad: bool) -> Any:
    """Make the tensor, then an instance of its class on the same memory."""
    tensor = make(*arguments)
    if cls is torch.Tensor:
        return tensor.requires_grad_(grad)
    return torch_private.make_subclass(cls, tensor, grad)


def set_state(tensor: Any, state: tuple[torch.Tensor | None, Any]) -> None:
    """Give a tensor its gradient and its attributes back."""
    grad, attributes = state
    if grad is not None:
        tensor.grad = grad
    if attributes:
        torch_private.set_object_state(tensor, attributes)


def refuse_non_leaf(tensor: torch.Tensor) -> None:
    """Raise for a tensor whose history would have to travel with it."""
    if tensor.requires_grad and not tensor.is_leaf:
        raise UnsupportedTensorError(
            "cannot send a non-leaf tensor that requires grad, since autograd does not cross process boundaries; to"
            " transfer only the data, send tensor.detach()"
        )


# Content -----------------------------------------------------------------------------------------------------------


def content(tensor: torch.Tensor, sender: Outgoing) -> Content:
    """How to make a plain tensor with the same dtype, layout, device, shape, stride and bytes."""
    if torch_private.dispatch_keys(tensor) == torch_private.PLAIN_KEYS:
        return dense(tensor, sender)
    if (transform := torch_private.transformed_by(tensor)) is not None:
        raise UnsupportedTensorError(
            f"cannot send a tensor inside {transform}: it has no memory of its own; send it from outside, or a clone()"
        )
    device = tensor.device.type
    if device not in ("cpu", "cuda", "meta"):
        raise UnsupportedTensorError(f"cannot send a tensor on device {tensor.device}; send tensor.cpu()")
    if tensor.is_quantized:
        return reducers_layouts.quantized(tensor, sender)
    if tensor.layout is not torch.strided or tensor.is_nested:
        return reducers_layouts.other_layout(tensor)
    return _with_bits(tensor, reducers_layouts.cuda(tensor, sender) if device == "cuda" else dense(tensor, sender))


def dense(tensor: torch.Tensor, sender: Outgoing) -> Content:
    """A strided tensor on the CPU (the path that must be fast) or on the meta device."""
    storage = tensor.untyped_storage()
    dtype = NAMES[tensor.dtype]
    nbytes = storage.nbytes()
    if tensor.is_contiguous() and nbytes == tensor.nbytes and nbytes and tensor.is_cpu:
        size = tensor.shape
        if 1 not in size:  # a dimension of 1 may have any stride
            place = sender.place(storage, tensor)
            if place is not None:
                return whole_tensor, (place, dtype, *size)
    return _dense_view(tensor, storage, dtype, sender)


def _dense_view(tensor: torch.Tensor, storage: torch.UntypedStorage, dtype: str, sender: Outgoing) -> Content:
    """A tensor that does not cover its storage, or whose storage is empty or shared by torch."""
    offset, size, stride = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
    if storage.nbytes() and tensor.is_cpu:
        if sender.sharing == "copy":
            placed = _place_view(tensor, storage, offset, sender)
            if placed is not None:
                return strided_tensor, (placed[0], dtype, placed[1], size, stride)
        elif (place := sender.place(storage, tensor)) is not None:
            return strided_tensor, (place, dtype, offset, size, stride)
    return rebuild_dense, (storage, dtype, offset, size, stride)


def _place_view(
    tensor: torch.Tensor, storage: torch.UntypedStorage, offset: int, sender: Outgoing
) -> tuple[Place, int] | None:
    """Send a view's own bytes; gives their place and the view's offset there, in elements."""
    itemsize = tensor.element_size()
    length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        offset, length = 0, 1
    placed = sender.place_region(storage, offset * itemsize, min((offset + length) * itemsize, storage.nbytes()))
    if placed is None:
        return None
    place, start = placed
    return place, (offset * itemsize - start) // itemsize


def _with_bits(tensor: torch.Tensor, made_by: Content) -> Content:
    """Conjugation and negation are bits on the tensor; the bytes are those of the tensor it came from."""
    conj, neg = tensor.is_conj(), tensor.is_neg()
    return (rebuild_bits, (*made_by, conj, neg)) if conj or neg else made_by


def rebuild_dense(
    storage: torch.UntypedStorage, dtype: str, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    """A strided tensor on a storage, of any device."""
    return torch.empty(0, dtype=DTYPES[dtype], device=storage.device).set_(storage, offset, size, stride)


def rebuild_bits(make: Callable[..., torch.Tensor], arguments: tuple[Any, ...], conj: bool, neg: bool) -> torch.Tensor:
    """A tensor that is read as the conjugate or negative of its bytes."""
    tensor = make(*arguments)
    if conj:
        torch_private.set_conj(tensor)
    if neg:
        torch_private.set_neg(tensor)
    return tensor
