"""Objects that pickle alone can do, quickly: numbers, short texts, tuples of them, functions that are found by name.

To set up a pickler of ours costs 3 us, and it asks for each object how that travels. What is seen here in less than
one microsecond needs none.
"""

from __future__ import annotations

import functools
import pickle
import types
from typing import Any

from tpool.tensors.names import found_by_name

__all__ = ["INLINE_NBYTES", "dumps_plain", "light_nbytes", "opcodes"]

INLINE_NBYTES = 32 * 1024
"""A longer stream lies in a block: below, a block costs more than bytes in a pipe; above, writes to it would block."""

# Types whose instances hold nothing else: pickle needs no help with them. Those that may be long are looked at.
_SHORT = frozenset({int, float, bool, complex, type(None)})
_LONG = frozenset({str, bytes})
_CONTAINERS = frozenset({list, dict})
_FUNCTIONS = frozenset({types.FunctionType, types.BuiltinFunctionType})
_FEW = 8


class _Reference:
    """Is pickled as it was told to be."""

    def __init__(self, reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Any:
        return self._reduced


def opcodes(reduced: Any) -> bytes:
    """What pickle writes for something that is reduced so; refers to nothing before it in the stream."""
    stream = pickle.dumps(_Reference(reduced), pickle.HIGHEST_PROTOCOL)
    start = 2  # PROTO and its argument
    if stream[start : start + 1] == pickle.FRAME:
        start += 9
    return stream[start:-1]


def dumps_plain(obj: object) -> bytes | None:
    """The stream of an object that pickle alone can do, quickly and in few bytes; None for any other."""
    if _is_simple(obj):
        data = pickle.dumps(obj, pickle.HIGHEST_PROTOCOL)
        if len(data) <= INLINE_NBYTES:
            return data
    return None


def _is_simple(obj: Any, in_list: bool = False) -> bool:
    """Whether pickle alone will do, and quickly; a guess that costs less than setting up our own pickler (3 us).

    In a list no other is: it may be itself.
    """
    kind = type(obj)
    if kind in _SHORT:
        return True
    if kind in _LONG:
        return len(obj) <= INLINE_NBYTES // 4
    if kind is tuple:
        return len(obj) <= _FEW and all(map(_is_simple_in_list if in_list else _is_simple, obj))
    if kind is list and not in_list:
        return len(obj) <= _FEW and all(map(_is_simple_in_list, obj))
    if kind in _FUNCTIONS:
        return found_by_name(obj)
    return kind in _CONTAINERS and not obj


def light_nbytes(obj: Any, depth: int = 3) -> int:
    """About how many bytes an object takes that may travel in a span; 0 for one that may not.

    Light is what pickle alone can do, in few bytes, and what cannot change: a span is pickled later than it is drawn,
    and what its items have in common arrives as one object.

    Args:
        obj: which.
        depth: how deep tuples may lie in each other.
    """
    kind = type(obj)
    if kind is int:
        return 8 if -_INT64 <= obj < _INT64 else 0
    if kind in _SHORT:
        return 8
    if kind in _LONG:
        return len(obj) + 8 if len(obj) <= _LIGHT_NBYTES else 0
    if kind is tuple and len(obj) <= _FEW and depth:
        nbytes = 8
        for part in obj:
            part_nbytes = light_nbytes(part, depth - 1)
            nbytes += part_nbytes
            if not part_nbytes or nbytes > _LIGHT_NBYTES:
                return 0
        return nbytes
    return 0


_INT64 = 1 << 63
_LIGHT_NBYTES = 256

_is_simple_in_list = functools.partial(_is_simple, in_list=True)
