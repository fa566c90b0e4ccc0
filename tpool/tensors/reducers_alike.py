"""Lists of tensors of one dtype and shape, as the chunks of a ``map`` mostly are: one object for the pickler.

Asked for one tensor after the other, a pickler takes as long to call its reducer and to write down what that says as
the reducer takes; so does an unpickler to read it. Written as two lists of numbers, many tensors take little more
than their memory does.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch

from tpool.tensors import torch_private
from tpool.tensors.arrivals import NAMES, tensors_alike
from tpool.tensors.placed import Placed, PlacedAlike, placed_alike
from tpool.tensors.reducers_content import Reduced

if TYPE_CHECKING:
    from tpool.tensors.storages import Outgoing

__all__ = ["Alike", "as_alike", "reduce_alike"]

MIN_TENSORS = 8
"""In a shorter list there is nothing to gain."""


class Alike:
    """Stands for a list of tensors in the hands of a pickler; arrives as a list.

    Args:
        tensors: of exactly the class ``torch.Tensor``, without attributes, none of them twice.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors


def as_alike(items: list[Any]) -> Alike | PlacedAlike | None:
    """What stands for a list, if it may hold tensors that are alike; None if it does not."""
    if len(items) < MIN_TENSORS:
        return None
    if type(items[0]) is not torch.Tensor:
        # Of most lists nothing more is asked, however long they are.
        return placed_alike(items) if type(items[0]) is Placed else None
    if set(map(type, items)) != {torch.Tensor} or len(set(map(id, items))) < len(items):
        return None
    if _may_have_attributes(items) and any(map(vars, items)):  # an attribute may lead back to the list
        return None
    return Alike(items)


def _may_have_attributes(tensors: list[torch.Tensor]) -> bool:
    """False if the collector knows of no tensor more than its class. To ask for its ``__dict__`` would make it one."""
    known = gc.get_referents(*tensors)
    return not len(known) == len(tensors) == known.count(torch.Tensor)


def reduce_alike(alike: Alike, sender: Outgoing) -> Reduced:
    """The tensors by handle, if they are dense, with nothing around them, and like the first; else one by one."""
    tensors = alike.tensors
    places = _places(tensors, sender)
    if places is None:
        return list, (tuple(tensors),)  # a tuple, as the list would be taken for what it is
    first = tensors[0]
    return tensors_alike, (NAMES[first.dtype], tuple(first.shape), first.nbytes, *places)


def _places(tensors: list[torch.Tensor], sender: Outgoing) -> tuple[list[int], list[int]] | None:
    """Of each tensor the index of its block, and its first byte there, -1 where it is all of the block."""
    dispatch_keys, plain_keys = torch_private.dispatch_keys, torch_private.PLAIN_KEYS
    if dispatch_keys(tensors[0]) != plain_keys:
        return None  # before it is asked for its shape, which not every kind has
    size, dtype, nbytes = tensors[0].shape, tensors[0].dtype, tensors[0].nbytes
    if not nbytes or 1 in size:  # a dimension of 1 may have any stride
        return None
    storages: list[torch.UntypedStorage] = []
    for tensor in tensors:
        if (
            dispatch_keys(tensor) != plain_keys
            or tensor.shape != size
            or tensor.dtype != dtype
            or tensor.requires_grad
            or tensor.grad is not None
            or not tensor.is_contiguous()
        ):
            return None
        storage = tensor.untyped_storage()
        if storage.nbytes() != nbytes:
            return None
        storages.append(storage)
    return sender.place_alike(storages, tensors, nbytes)
