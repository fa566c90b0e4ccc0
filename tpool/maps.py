"""The public calls that run a function over many items: a part of ``Pool``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tpool import options
from tpool.gate import Gate
from tpool.limits import POOL, Limits, PoolDefault, RetryOn
from tpool.local.wire import Mode
from tpool.map_result import MapResult
from tpool.opening import Opener
from tpool.results import Callbacks
from tpool.streams import IMapIterator, Stream

T = TypeVar("T")


class MapCalls:
    """``map`` and its kin. Pools have these methods; nothing else does."""

    _gate: Gate
    _opener: Opener
    _callbacks: Callbacks
    _limits: Limits

    def _cancel_job(self, job: Any, kill: bool, answer: Callable[[bool], None] | None) -> bool:
        raise NotImplementedError

    def _has_started(self, job: Any) -> bool:
        raise NotImplementedError

    # All at once ----------------------------------------------------------------------------------------------------

    def map(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> list[T]:
        """Call ``func(item)`` for each item, in the workers; returns the values in order.

        Args:
            func: what to call.
            iterable: the items; read to its end at once.
            chunksize: how many items travel together and answer as one; None chooses (1 with a ``timeout`` or
                ``retries``, which count for the chunk as a whole).
            timeout: how many seconds a task may run, until its worker is killed; see ``Pool``.
            retries: how often a task is tried again; see ``Pool``.
            retry_on: after which exceptions.

        Raises:
            Exception: what the first call to fail raised; the other calls still run.
            WorkerLostError: a worker died while it ran one of the chunks.
            TaskTimeoutError: one of the chunks ran for too long.
        """
        limits = self._limits.override(timeout, retries, retry_on)
        return self._wait_for_map(Mode.MAP, func, iterable, chunksize, limits)

    def map_async(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> MapResult[T]:
        """As ``map``, but returns as soon as the items are pickled; see ``apply_async`` for the callbacks."""
        limits = self._limits.override(timeout, retries, retry_on)
        return self._map_async(Mode.MAP, func, iterable, chunksize, limits, callback, error_callback)

    def starmap(
        self,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> list[T]:
        """As ``map``, with ``func(*item)``."""
        limits = self._limits.override(timeout, retries, retry_on)
        return self._wait_for_map(Mode.STARMAP, func, iterable, chunksize, limits)

    def starmap_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> MapResult[T]:
        """As ``map_async``, with ``func(*item)``."""
        limits = self._limits.override(timeout, retries, retry_on)
        return self._map_async(Mode.STARMAP, func, iterable, chunksize, limits, callback, error_callback)

    def _wait_for_map(
        self, mode: Mode, func: Callable[..., T], iterable: Iterable[Any], chunksize: int | None, limits: Limits
    ) -> list[T]:
        result = self._map_async(mode, func, iterable, chunksize, limits, None, None)
        try:
            return result.get()
        except BaseException:
            # Interrupted, perhaps: nobody can ask for the rest any more.
            if not result.ready() and result._job is not None:
                self._opener.cancel(result._job)
            raise

    def _map_async(
        self,
        mode: Mode,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None,
        limits: Limits,
        callback: Callable[[list[T]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> MapResult[T]:
        self._gate.check_running()
        items = iterable if isinstance(iterable, (list, tuple)) else list(iterable)
        if chunksize is None and limits.rules is not None:
            chunksize = 1  # limits hold for tasks, and each call is one, unless the user says otherwise
        size = self._opener.chunksize(len(items), chunksize)
        story = f"{mode.name.lower()}({options.describe(func)})"
        result: MapResult[T] = MapResult(self, story, self._callbacks, callback, error_callback)
        self._opener.open_map(result, mode, func, items, size, limits)
        return result

    # One by one -----------------------------------------------------------------------------------------------------

    def imap(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> IMapIterator[T]:
        """Call ``func(item)`` for each item; an iterator gives the values in the order of the input.

        The input is drawn only as fast as results are consumed, so it may be infinite, and results are held only for
        what was drawn. The iterator is an asynchronous one, too: ``async for value in pool.imap(...)``.

        Args:
            func: what to call.
            iterable: the input; drawn and pickled in a thread of its own.
            chunksize: how many items may travel together before it is known how long a task runs.
            buffersize: the most items drawn and not consumed; None for a few per worker.
            timeout: how many seconds a task may run, until its worker is killed; see ``Pool``.
            retries: how often a task is tried again; see ``Pool``.
            retry_on: after which exceptions.
        """
        limits = self._limits.override(timeout, retries, retry_on)
        return self._imap(func, iterable, chunksize, buffersize, limits, ordered=True)

    def imap_unordered(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> IMapIterator[T]:
        """As ``imap``, but the values come in the order in which the calls finish."""
        limits = self._limits.override(timeout, retries, retry_on)
        return self._imap(func, iterable, chunksize, buffersize, limits, ordered=False)

    def _imap(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int,
        buffersize: int | None,
        limits: Limits,
        ordered: bool,
    ) -> IMapIterator[T]:
        self._gate.check_running()
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize}")
        if buffersize is not None and buffersize < 1:
            raise ValueError(f"buffersize must be 1 or more, not {buffersize}")
        kind = "imap" if ordered else "imap_unordered"
        stream = Stream(f"{kind}({options.describe(func)})", ordered)
        iterator: IMapIterator[T] = IMapIterator(stream, self)
        self._opener.open_stream(iterator, stream, func, iterable, chunksize, buffersize, limits)
        return iterator
