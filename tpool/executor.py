"""A pool as the standard library's ``Executor``, for ``loop.run_in_executor`` and for libraries that take one."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

from tpool.futures import AsyncResult

P = ParamSpec("P")
T = TypeVar("T")

Submit = Callable[..., AsyncResult[Any]]


class PoolExecutor(concurrent.futures.Executor):
    """A view of a pool, made by ``Pool.executor()``.

    The pool belongs to whoever made it: ``shutdown``, and so leaving the ``with`` block, ends this view and not the
    pool. It waits for the calls that were made through this view, as the standard library's executors for theirs.

    Args:
        submit: as ``Pool.submit``.
    """

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        # Weakly: the pool keeps what is not done, and nobody should keep what is.
        self._submitted: weakref.WeakSet[AsyncResult[Any]] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._ended = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[T]:
        """Call ``fn(*args, **kwargs)`` in a worker.

        Args:
            fn: what to call.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            Its result, a ``concurrent.futures.Future`` that is also awaitable.

        Raises:
            RuntimeError: this view was shut down.
            PoolEndedError: the pool takes no more work.
        """
        with self._lock:
            if self._ended:
                raise RuntimeError("cannot schedule new futures after shutdown; the pool may have other executors")
            result: AsyncResult[T] = self._submit(fn, *args, **kwargs)
            self._submitted.add(result)
        return result

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        **kwargs: Any,
    ) -> Iterator[T]:
        """Call ``fn(*items)`` for the items of several iterables, as many as the shortest has.

        Args:
            fn: what to call.
            iterables: the arguments, one iterable for each; read to the end at once.
            timeout: seconds from now within which each value must be there when it is asked for; None for any.
            chunksize: how many calls travel together and answer as one.
            kwargs: what else the standard library's ``Executor.map`` takes, in newer versions of Python.

        Returns:
            An iterator over the values in order. When it is closed or dropped half way, what is queued is cancelled.

        Raises:
            ValueError: ``chunksize`` is less than 1.
            concurrent.futures.TimeoutError: from the iterator: a value was not there in time.
        """
        if chunksize < 1:
            raise ValueError(f"chunksize must be 1 or more, not {chunksize}")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **kwargs)
        chunks = _chunks(zip(*iterables), chunksize)
        values = super().map(functools.partial(_call_each, fn), chunks, timeout=timeout, **kwargs)
        return itertools.chain.from_iterable(values)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End this view; the pool goes on.

        Args:
            wait: return only when every call that was made through this view is done.
            cancel_futures: cancel those that do not run yet.

        Raises:
            RuntimeError: there is one to wait for, in the thread that brings its result (a finalizer may run there).
        """
        with self._lock:
            self._ended = True
        pending = [result for result in self._submitted if not result.done()]
        if cancel_futures:
            for result in pending:
                result.cancel()
        if wait:
            for result in pending:
                result.check_may_wait()
            concurrent.futures.wait(pending)


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _call_each(fn: Callable[..., T], chunk: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*items) for items in chunk]
