"""The content of tensors that are more than strided CPU memory: quantized, sparse, nested, mkldnn, on a GPU.

Most are made of strided tensors, which the pickler then meets as tensors of their own. So their bytes go by handle
and aliases stay aliases, with no more to do here than to take apart and put together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing.reductions

from tpool.errors import UnsupportedTensorError
from tpool.tensors import torch_private
from tpool.tensors.arrivals import DTYPES, NAMES, leased

if TYPE_CHECKING:
    from tpool.tensors.storages import Outgoing

__all__ = ["cuda", "cuda_event", "cuda_storage", "other_layout", "quantized"]

# torch's own reducers, without annotations.
_torch_reductions: Any = torch.multiprocessing.reductions

Content = tuple[Callable[..., Any], tuple[Any, ...]]

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
"""The two tensors of indices of a compressed sparse layout: methods that give them."""


# Quantized ---------------------------------------------------------------------------------------------------------


def quantized(tensor: torch.Tensor, sender: Outgoing) -> Content:
    """A tensor with a quantizer per tensor or per channel."""
    if not tensor.is_cpu:
        raise UnsupportedTensorError(f"cannot send a quantized tensor on device {tensor.device}; send tensor.cpu()")
    quantizer: tuple[Any, ...]
    if tensor.qscheme() is torch.per_tensor_affine:
        quantizer = tensor.q_scale(), tensor.q_zero_point()
    elif tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        quantizer = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()
    else:
        raise UnsupportedTensorError(f"cannot send a tensor quantized by {tensor.qscheme()}; send dequantize()")
    storage = tensor.untyped_storage()
    if storage.nbytes():
        sender.place(storage, tensor)  # while the only tensor that knows it is at hand
    where = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return rebuild_quantized, (storage, NAMES[tensor.dtype], *where, quantizer)


def rebuild_quantized(
    storage: torch.UntypedStorage,
    dtype: str,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    quantizer: tuple[Any, ...],
) -> torch.Tensor:
    """The inverse of ``quantized``."""
    if len(quantizer) == 2:
        empty: Any = torch_private.quantized_per_tensor(DTYPES[dtype], *quantizer)
    else:
        empty = torch_private.quantized_per_channel(DTYPES[dtype], size, *quantizer)
    return empty.set_(storage, offset, size, stride)  # type: ignore[no-any-return]


# Sparse, nested, mkldnn --------------------------------------------------------------------------------------------


def other_layout(tensor: torch.Tensor) -> Content:
    """A tensor that is made of other tensors."""
    tensor = tensor.detach()  # of one that requires grad, some parts would come with a history
    if tensor.layout is torch.sparse_coo:
        return rebuild_coo, (tensor._indices(), tensor._values(), tuple(tensor.shape), tensor.is_coalesced())
    if tensor.layout in _COMPRESSED:
        compressed, plain = (getattr(tensor, name)() for name in _COMPRESSED[tensor.layout])
        return rebuild_compressed, (compressed, plain, tensor.values(), tuple(tensor.shape), tensor.layout)
    if tensor.is_nested and tensor.layout is torch.strided:
        return torch_private.strided_nested, torch_private.strided_nested_parts(tensor)
    if tensor.is_mkldnn:
        return rebuild_mkldnn, (tensor.to_dense(),)
    raise UnsupportedTensorError(f"cannot send a tensor of layout {tensor.layout}; send a strided tensor")


def rebuild_coo(indices: torch.Tensor, values: torch.Tensor, size: tuple[int, ...], coalesced: bool) -> torch.Tensor:
    """A sparse tensor of the layout COO, on these tensors."""
    # The device is named because a default device would move the tensors there.
    return torch.sparse_coo_tensor(
        indices, values, size, device=values.device, is_coalesced=coalesced, check_invariants=False
    )


def rebuild_compressed(
    compressed: torch.Tensor, plain: torch.Tensor, values: torch.Tensor, size: tuple[int, ...], layout: torch.layout
) -> torch.Tensor:
    """A sparse tensor of the layout CSR, CSC, BSR or BSC, on these tensors."""
    return torch.sparse_compressed_tensor(
        compressed, plain, values, size, layout=layout, device=values.device, check_invariants=False
    )


def rebuild_mkldnn(dense: torch.Tensor) -> torch.Tensor:
    """A tensor in mkldnn's own layout, whose bytes only mkldnn can read: it travels as a dense copy."""
    return dense.to_mkldnn()


# CUDA --------------------------------------------------------------------------------------------------------------


def cuda(tensor: torch.Tensor, sender: Outgoing) -> Content:
    """A strided CUDA tensor, by CUDA IPC through torch's own reducer.

    torch's counter keeps the memory until the receiver lets it go, in the process that made it; the token tells how
    long this process is needed.
    """
    token = sender.token()  # first: where there is none, nothing may have been handed out
    plain: Any = tensor.detach()
    untyped: Any = tensor.untyped_storage()
    if (clone := sender.cuda_clones.get(torch_private.storage_id(tensor))) is not None:
        plain = _on(clone, plain)
    try:
        make, arguments = _torch_reductions.reduce_tensor(plain)
    except RuntimeError as error:
        if "received from another process" not in str(error):
            raise UnsupportedTensorError(f"cannot send a CUDA tensor: {error}") from error
        # CUDA allows only the process that made the memory to hand it on.
        clone = sender.cuda_clones[torch_private.storage_id(tensor)] = untyped.clone()
        plain = _on(clone, plain)
        make, arguments = _torch_reductions.reduce_tensor(plain)
    sender.keep.append((tensor, plain))
    return leased, (token, make, arguments)


def _on(storage: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    tensor = torch.empty(0, dtype=like.dtype, device=storage.device)
    return tensor.set_(storage, like.storage_offset(), tuple(like.shape), like.stride())


def cuda_storage(storage: torch.UntypedStorage, sender: Outgoing) -> Content:
    """A CUDA storage, as a tensor of bytes on it."""
    return torch.Tensor.untyped_storage, (torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage),)


def cuda_event(event: torch.cuda.Event, sender: Outgoing) -> Content:
    """A CUDA event made with ``interprocess=True``; torch raises for others."""
    sender.keep.append(event)
    return leased, (sender.token(), *_torch_reductions.reduce_event(event))
