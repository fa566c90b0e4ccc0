"""Each kind of tensor, storage and what belongs to them, as a pickle reduce value; bytes travel by handle.

``reduce(obj, sender)`` is asked for every object that a pickler meets::

    exact type ─► _HANDLERS ──────────────┐
    other subclass of Tensor ─► subclasses ┼─► (function, arguments[, state …]) or NotImplemented
    anything else ─► NotImplemented        ┘

A tensor is its content and its dress (``reducers_content``). The commonest kind, a dense CPU tensor with nothing
around it, takes a path of its own.

What a pickler has to do::

    outgoing = Outgoing(memory, sharing)         one per message; blocks and fds are filled as objects are met
    reducer_override(obj): reduce(obj, outgoing)
    except Overlap: outgoing = outgoing.again(), and pickle once more
    find_class(…, name in arrivals.MARKERS):     that method of Incoming(blocks, fds), one per message

The rule for all kinds: equal in value, dtype, device, layout, shape, stride, ``requires_grad``, type and attributes;
or ``UnsupportedTensorError`` at once, which names the kind and what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import Parameter

from tpool.errors import UnsupportedTensorError
from tpool.tensors import reducers_layouts, reducers_subclasses, torch_private
from tpool.tensors.arrivals import DTYPES, NAMES, block_storage
from tpool.tensors.placed import Placed, PlacedAlike, reduce_placed, reduce_placed_alike
from tpool.tensors.reducers_alike import Alike, reduce_alike
from tpool.tensors.reducers_content import Reduced, content, dense, dress, is_plain, refuse_non_leaf

if TYPE_CHECKING:
    from tpool.tensors.storages import Outgoing

__all__ = ["reduce"]


def reduce(obj: Any, sender: Outgoing) -> Reduced | Any:
    """The reduce value of a tensor or storage; NotImplemented for what pickles by itself.

    Raises:
        UnsupportedTensorError: a kind that cannot be sent.
        SharedMemoryExhausted: no block for its bytes.
        Overlap: see ``Outgoing``; pickle once more.
    """
    cls = type(obj)
    handler = _HANDLERS.get(cls)
    if handler is not None:
        return handler(obj, sender)
    if issubclass(cls, torch.Tensor):
        return reducers_subclasses.reduce_subclass(obj, sender)
    if issubclass(cls, torch.jit.ScriptModule):
        return reducers_subclasses.reduce_script(obj, sender)
    return NotImplemented


# Tensors -----------------------------------------------------------------------------------------------------------


def reduce_tensor(tensor: torch.Tensor, sender: Outgoing) -> Reduced:
    """A tensor of exactly the class ``torch.Tensor``."""
    if is_plain(tensor):
        return dense(tensor, sender)
    refuse_non_leaf(tensor)
    return dress(tensor, content(tensor, sender), torch.Tensor, tensor.__dict__)


def reduce_parameter(parameter: Parameter, sender: Outgoing) -> Reduced:
    """A tensor of exactly the class ``torch.nn.Parameter``."""
    refuse_non_leaf(parameter)
    return dress(parameter, content(parameter, sender), Parameter, parameter.__dict__)


# Storages ----------------------------------------------------------------------------------------------------------


def reduce_storage(storage: torch.UntypedStorage, sender: Outgoing) -> Reduced:
    """An ``UntypedStorage``; tensors whose storage goes by a handle of torch's come here with it too."""
    device, nbytes = storage.device.type, storage.nbytes()
    if device == "cuda":
        return reducers_layouts.cuda_storage(storage, sender)
    if device not in ("cpu", "meta"):
        raise UnsupportedTensorError(f"cannot send a storage on device {storage.device}; send storage.cpu()")
    if device == "meta" or not nbytes:
        return rebuild_storage, (nbytes, device)
    place = sender.place(storage)
    return sender.hand_over(storage) if place is None else (block_storage, (place,))


def rebuild_storage(nbytes: int, device: str) -> torch.UntypedStorage:
    """A storage without memory: an empty one, or one on the meta device."""
    empty: Any = torch.UntypedStorage
    return empty(nbytes, device=device)  # type: ignore[no-any-return]


def reduce_typed_storage(storage: Any, sender: Outgoing) -> Reduced:
    """A ``TypedStorage``. The old ``FloatStorage`` and its kin are no types of their own: they make one of these."""
    return rebuild_typed_storage, (torch_private.untyped_storage(storage), NAMES[storage.dtype])


def rebuild_typed_storage(storage: torch.UntypedStorage, dtype: str) -> Any:
    """A ``TypedStorage`` on an untyped one."""
    return torch_private.typed_storage(storage, DTYPES[dtype])


_HANDLERS: dict[type, Callable[[Any, Outgoing], Reduced]] = {
    torch.Tensor: reduce_tensor,
    Parameter: reduce_parameter,
    torch.UntypedStorage: reduce_storage,
    torch.TypedStorage: reduce_typed_storage,
    torch.cuda.Event: reducers_layouts.cuda_event,
    torch.jit.ScriptFunction: reducers_subclasses.refuse_script_function,
    Alike: reduce_alike,
    Placed: reduce_placed,
    PlacedAlike: reduce_placed_alike,
}
"""By exact type: this is asked for every object of a message, and one look-up must tell that most are not ours."""
