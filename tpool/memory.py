"""The public calls that give the caller a place in a pool's shared memory: a part of ``Pool``.

The factories are methods of the pool and not functions of the module: shared memory belongs to one pool, has that
pool's budget, and a tensor in it travels free of cost only to that pool's workers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

from tpool.engine import Engine
from tpool.maps import Calls
from tpool.tensors.held import Reference

__all__ = ["MemoryCalls"]

Size = tuple[int, ...]


class MemoryCalls(Calls):
    """``put``, ``empty`` and its kin. Pools have these methods; nothing else does."""

    _engine: Engine

    def put(self, obj: object) -> Reference:
        """Have each worker keep an object, such as a model or a table, and refer to it in any number of calls.

        It is pickled now, and sent to each worker (one that replaces another, too) with the first call that needs it.
        Passed anywhere in the arguments of a call, or as its function, the reference arrives as the object. Tensors
        are in shared memory: what the caller or a worker writes into them is seen by all (Hogwild); so are the arrays
        of numpy among the workers, but not by the caller. ``Reference.update`` puts another object in its place;
        dropping the reference frees the memory in the workers.

        With ``sharing="copy"`` the workers share one copy among them, and the caller's tensors stay apart.

        >>> with tpool.Pool(2) as pool:
        ...     model = pool.put(torch.nn.Linear(2, 1).requires_grad_(False))
        ...     rows = [torch.ones(2), torch.zeros(2)]
        ...     scores = pool.starmap(torch.nn.Module.__call__, [(model, row) for row in rows])
        >>> [score.shape for score in scores]
        [torch.Size([1]), torch.Size([1])]

        Args:
            obj: what to keep.

        Returns:
            What stands for it in the arguments of calls to this pool.

        Raises:
            Exception: it cannot be pickled.
            PoolEndedError: the pool takes no more work.
        """
        self._gate.check_running()
        return self._engine.put(obj)

    def empty(self, *size: int | Iterable[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """As ``torch.empty``, in the shared memory of this pool: sending it to a worker copies nothing.

        The tensor may be used after the pool's end. In a pool with ``sharing="copy"`` a send copies all the same.

        >>> with tpool.Pool(2) as pool:
        ...     table = pool.empty(1000, 8)
        ...     same = pool.apply(torch.Tensor.fill_, (table, 7.0))
        >>> table[999, 7].item()
        7.0

        Args:
            size: its shape, as numbers or as one sequence.
            dtype: torch's default if not given.

        Returns:
            The tensor, of any content.

        Raises:
            TypeError: the shape is not made of whole numbers, or ``dtype`` is none of torch's.
            ValueError: a length is negative.
            SharedMemoryExhausted: the pool's ``memory`` does not suffice.
            PoolEndedError: the pool takes no more work.
        """
        self._gate.check_running()
        return self._engine.empty(_check_size(size), _check_dtype(dtype))

    def zeros(self, *size: int | Iterable[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """As ``empty``, filled with zeros.

        >>> with tpool.Pool(1) as pool:
        ...     pool.zeros(2, 3, dtype=torch.int64).tolist()
        [[0, 0, 0], [0, 0, 0]]
        """
        return self.empty(*size, dtype=dtype).zero_()

    def ones(self, *size: int | Iterable[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """As ``empty``, filled with ones."""
        return self.empty(*size, dtype=dtype).fill_(1)

    def full(self, size: Iterable[int], fill_value: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As ``torch.full``, in the shared memory of this pool; see ``empty``.

        >>> with tpool.Pool(1) as pool:
        ...     pool.full((2, 2), 5).tolist()
        [[5, 5], [5, 5]]

        Args:
            size: its shape.
            fill_value: the value of all elements; tells the dtype if that is not given.
            dtype: of the tensor.

        Returns:
            The tensor.
        """
        if dtype is None:
            dtype = torch.full((), fill_value, device="cpu").dtype
        return self.empty(size, dtype=dtype).fill_(fill_value)

    def empty_like(self, tensor: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor as ``empty`` gives it, of the shape of another; always contiguous.

        Args:
            tensor: whose shape it has.
            dtype: of the new tensor; None for that of the other.

        Raises:
            TypeError: an argument is of the wrong kind.
        """
        return self.empty(_shape_of(tensor), dtype=dtype or tensor.dtype)

    def zeros_like(self, tensor: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As ``empty_like``, filled with zeros."""
        return self.empty_like(tensor, dtype=dtype).zero_()

    def ones_like(self, tensor: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As ``empty_like``, filled with ones."""
        return self.empty_like(tensor, dtype=dtype).fill_(1)

    def full_like(self, tensor: torch.Tensor, fill_value: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As ``empty_like``, filled with ``fill_value``.

        >>> with tpool.Pool(1) as pool:
        ...     pool.full_like(torch.zeros(3), 2.5).tolist()
        [2.5, 2.5, 2.5]
        """
        return self.empty_like(tensor, dtype=dtype).fill_(fill_value)


def _check_size(size: tuple[Any, ...]) -> Size:
    given = size[0] if len(size) == 1 and not hasattr(type(size[0]), "__index__") else size
    try:
        lengths = tuple(operator.index(length) for length in given)
    except TypeError as error:
        raise TypeError(
            f"a size is made of whole numbers, as in empty(2, 3) or empty((2, 3)); not {size!r}"
        ) from error
    if any(length < 0 for length in lengths):
        raise ValueError(f"a size has no negative lengths: {lengths}")
    return lengths


def _check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.get_default_dtype()
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a dtype of torch, such as torch.float32, not {dtype!r}")
    return dtype


def _shape_of(tensor: torch.Tensor) -> Size:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"the first argument must be a tensor whose shape is to be taken, not {type(tensor).__name__}")
    return tuple(tensor.shape)
