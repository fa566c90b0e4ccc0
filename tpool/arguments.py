"""What the user gives to a call, checked: each function gives the value to use or raises an error with the cure.

Checked in the caller's thread, so that a slip is told where it was made and not by a worker's traceback.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch

from tpool.tensors.held import Reference

__all__ = ["check_args", "check_callback", "check_func", "check_items", "check_kwds", "tell"]

_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def tell(value: object) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return reprlib.repr(value)


def check_func(func: Any) -> None:
    """What is called in the worker: a callable that gives a value, or a reference to one."""
    called = func.func if isinstance(func, functools.partial) else func
    if isinstance(called, (FunctionType, MethodType)):
        # A flag of the code, because inspect would take microseconds in each call.
        flags = getattr(getattr(called, "__code__", None), "co_flags", 0)
        if not flags & (_COROUTINE | _GENERATOR):
            return
        name = called.__name__
        if flags & _COROUTINE:
            raise TypeError(
                f"{name} is an async function, and workers have no event loop; "
                f"send a function that runs it, as in: def work(*args): return asyncio.run({name}(*args))"
            )
        raise TypeError(
            f"{name} is a generator function, and a generator cannot leave its process; "
            f"send a function that gives a list, as in: def work(*args): return list({name}(*args))"
        )
    if callable(called) or isinstance(called, Reference):
        return
    if isinstance(called, (list, tuple, range)):
        raise TypeError(f"the function comes first, then what it is called on; not {tell(called)}")
    raise TypeError(
        f"the function to call must be callable, not {tell(called)}; give the function itself and its arguments apart:"
        " apply(f, (x,)) and map(f, xs), not apply(f(x))"
    )


def check_args(args: Any, name: str = "args") -> tuple[Any, ...]:
    """Positional arguments. Text and tensors could be iterated over, and hardly ever are meant to be."""
    if isinstance(args, tuple):
        return args
    if isinstance(args, (str, bytes, torch.Tensor)) or not _is_iterable(args):
        shown = tell(args)
        cure = f"({shown},)" if len(shown) < 20 and not isinstance(args, torch.Tensor) else "(x,)"
        raise TypeError(f"{name} must be a tuple of arguments, not {shown}; a single one needs its comma: {cure}")
    if isinstance(args, Mapping):
        raise TypeError(f"{name} must be a tuple of arguments, not the dict {tell(args)}; keyword arguments: kwds=")
    return tuple(args)


def check_kwds(kwds: Any) -> Mapping[str, Any]:
    """Keyword arguments."""
    if kwds is None:
        return {}
    if not isinstance(kwds, Mapping):
        raise TypeError(f"kwds must be a dict of keyword arguments, not {tell(kwds)}; positional ones: args, a tuple")
    return kwds


def check_items(iterable: Iterable[Any]) -> None:
    """What a map goes through."""
    if not _is_iterable(iterable):
        raise TypeError(
            f"the items must be an iterable, such as a list, not {tell(iterable)}: it is not iterable;"
            " for a single call: apply(func, (item,))"
        )


def check_callback(name: str, callback: object) -> None:
    """What is called with a result."""
    if callback is not None and not callable(callback):
        raise TypeError(
            f"{name} must be a callable that takes one value, or None, not {tell(callback)}; the arguments of the call"
            " stand together in args, a tuple"
        )


def _is_iterable(value: object) -> bool:
    return hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")
