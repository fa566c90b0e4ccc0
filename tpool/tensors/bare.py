"""A message that is one dense tensor with nothing around it, or a list of one: a few numbers in place of a pickle.

It is what streams mostly carry, and a chunk of one item. To set up a pickler and an unpickler, and to name what
rebuilds the tensor, takes longer than all the rest.

::

    size, 8 bytes each │ name of the dtype │ dimensions, 1 byte │ BARE or LISTED

The last byte tells it from a pickle: that of a plain one is ``payload.STOP``, that of a ``payload.TRAILER`` is 0. The
tensor's memory is the only block of the message.
"""

from __future__ import annotations

import struct
from typing import Any

import torch

from tpool.tensors.arrivals import NAMES, Incoming, whole_tensor
from tpool.tensors.cures import add_cure
from tpool.tensors.payload import Payload
from tpool.tensors.placed import Placed, reduce_placed
from tpool.tensors.reducers_content import dense, is_plain
from tpool.tensors.storages import Outgoing

__all__ = ["BARE", "LISTED", "dumps_bare", "loads_bare"]

BARE = 1
"""The last byte of a tensor."""

LISTED = 2
"""The last byte of a list of one tensor."""

_SIZES = [struct.Struct(f"<{dimensions}q") for dimensions in range(9)]
_ENDS = [[bytes((dimensions, kind)) for dimensions in range(9)] for kind in (BARE, LISTED)]
_ENCODED_NAMES = {name: name.encode() for name in NAMES.values()}


def dumps_bare(obj: Any, sender: Outgoing) -> Payload | None:
    """A tensor (or ``Placed``), or a list of one, that covers its storage, bare of all else; None for any other.

    Args:
        obj: which.
        sender: of the message, which holds nothing yet. It may be used for another try after None.

    Raises:
        Exception: see ``Codec.dumps``.
    """
    listed = type(obj) is list and len(obj) == 1
    tensor = obj[0] if listed else obj
    placed = type(tensor) is Placed
    if placed and len(tensor.size) >= len(_SIZES):
        return None  # before its block is among the message's
    if not placed and (type(tensor) is not torch.Tensor or not is_plain(tensor)):
        return None
    try:
        make, arguments = reduce_placed(tensor, sender) if placed else dense(tensor, sender)
    except BaseException as error:
        sender.blocks.clear()  # now; the error's traceback would keep them
        add_cure(error)
        raise
    if make is not whole_tensor or len(arguments) - 2 >= len(_SIZES) or len(sender.blocks) != 1:
        return None
    place, dtype, *size = arguments
    if type(place) is not int:
        return None  # it lies in a slab
    dimensions = len(size)
    return Payload(
        b"".join((_SIZES[dimensions].pack(*size), _ENCODED_NAMES[dtype], _ENDS[listed][dimensions])), sender.blocks
    )


def loads_bare(stream: bytes, incoming: Incoming) -> Any:
    """What ``dumps_bare`` was given.

    Args:
        stream: the message's.
        incoming: its memory.

    Raises:
        Exception: it is nothing of the kind.
    """
    sizes = _SIZES[stream[-2]]
    tensor = incoming.whole_tensor(0, stream[sizes.size : -2].decode(), *sizes.unpack_from(stream))
    return [tensor] if stream[-1] == LISTED else tensor
