"""What a worker does with one batch of a big tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Batches", "cut", "length_of", "put_into"]

Tensors = torch.Tensor | dict[Any, torch.Tensor]


class Batches:
    """Called with (start, stop): calls the user's function on that part of the data; travels in its place.

    Args:
        function: the user's.
        data: a reference to what it is called on, a tensor or a dict of them; arrives as that.
        dim: along which the data are cut.
        out: likewise, where results go; arrives as None where the function must return nothing.
        returns: results are returned instead.
    """

    def __init__(self, function: Callable[[Any], Any], data: Any, dim: int, out: Any, returns: bool) -> None:
        self._function = function
        self._data = data
        self._dim = dim
        self._out = out
        self._returns = returns

    def __call__(self, span: tuple[int, int]) -> Any:
        """Run the user's function on one batch."""
        start, stop = span
        value = self._function(cut(self._data, self._dim, start, stop))
        if self._returns:
            return _detached(value)
        put_into(self._out, value, self._dim, start, stop)
        return None


def cut(data: Tensors, dim: int, start: int, stop: int) -> Tensors:
    """The part of the data from ``start`` to ``stop``, as views."""
    if isinstance(data, dict):
        return {key: tensor.narrow(dim, start, stop - start) for key, tensor in data.items()}
    return data.narrow(dim, start, stop - start)


def length_of(data: object, dim: int, what: str) -> int:
    """How long the data are along ``dim``.

    Raises:
        TypeError: they are neither a tensor nor a dict of tensors.
        ValueError: there is no such dimension, or the tensors are of different lengths.
    """
    tensors: dict[Any, Any] = data if isinstance(data, dict) else {None: data}
    if not tensors or not all(isinstance(t, torch.Tensor) and t.layout is torch.strided for t in tensors.values()):
        raise TypeError(f"{what} must be a dense tensor or a dict of such, not {_describe(data)}")
    lengths = set()
    for key, tensor in tensors.items():
        if not -tensor.dim() <= dim < tensor.dim():
            name = what if key is None else f"{what}[{key!r}]"
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} has no dimension {dim}")
        lengths.add(tensor.shape[dim])
    if len(lengths) > 1:
        raise ValueError(f"the tensors of {what} are of different lengths along dimension {dim}: {sorted(lengths)}")
    return int(lengths.pop())


def put_into(out: Tensors | None, value: Any, dim: int, start: int, stop: int) -> None:
    """Write the result of one batch into its place.

    Raises:
        TypeError: it is not what the output is: a tensor, a dict of the same keys, or nothing.
        ValueError: its shape is not that of its place; it is never broadcast.
    """
    if isinstance(out, dict):
        if not isinstance(value, dict) or value.keys() != out.keys():
            raise TypeError(f"the function returned {_describe(value)}; the output is {_describe(out)}")
        for key, tensor in out.items():
            put_into(tensor, value[key], dim, start, stop)
        return
    if out is None or not isinstance(value, torch.Tensor):
        if out is not value:
            raise TypeError(f"the function returned {_describe(value)}; the output is {_describe(out)}")
        return
    place = out.narrow(dim, start, stop - start)
    if place.shape != value.shape:
        raise ValueError(
            f"the function returned a tensor of shape {tuple(value.shape)} for items {start} to {stop}; its place in"
            f" the output is of shape {tuple(place.shape)}"
        )
    # Not under torch.no_grad, which may stay in force where Ctrl-C comes as it begins or ends.
    place.detach().copy_(value.detach())


def _detached(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _detached(part) for key, part in value.items()}
    return value.detach() if isinstance(value, torch.Tensor) else value


def _describe(value: object) -> str:
    if isinstance(value, dict):
        return "a dict with " + (", ".join(f"{key!r}: {_describe(part)}" for key, part in value.items()) or "nothing")
    return "a tensor" if isinstance(value, torch.Tensor) else f"{type(value).__name__}"
