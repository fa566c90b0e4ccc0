"""The public calls that run a function over many items and give all values at once: a part of ``Pool``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tpool import options
from tpool.arguments import check_callback, check_func, check_items
from tpool.futures import Keeper
from tpool.gate import Gate
from tpool.limits import POOL, Limits, PoolDefault, RetryOn
from tpool.local.starring import Starred
from tpool.map_result import MapResult
from tpool.opening import Opener
from tpool.progress import Meter, MeteredMap, Show, check_progress
from tpool.results import Callbacks
from tpool.stats import PoolStats

T = TypeVar("T")


@dataclass(slots=True)
class MapCall:
    """What is called on every item, and how.

    Attributes:
        func: the user's function.
        carrier: what is sent in its place and calls it; None for the function itself.
    """

    name: str
    func: Callable[..., Any]
    limits: Limits
    progress: bool | Show
    ordered: bool = True
    carrier: Callable[..., Any] | None = None

    @property
    def story(self) -> str:
        """What it is, for messages."""
        return f"{self.name}({options.describe(self.func)})"


class Calls(Keeper):
    """What the parts of ``Pool`` have in common."""

    _gate: Gate
    _opener: Opener
    _callbacks: Callbacks
    _limits: Limits

    def stats(self) -> PoolStats:
        """What the pool has done so far; from any thread."""
        raise NotImplementedError

    def _meter(self, progress: bool | Show, story: str, total: int | None) -> Meter | None:
        show = check_progress(progress, story)
        return None if show is None else Meter(show, self._callbacks, self.stats, total)


class MapCalls(Calls):
    """``map`` and its kin. Pools have these methods; nothing else does."""

    def map(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
        progress: bool | Show = False,
    ) -> list[T]:
        """Call ``func(item)`` for each item, in the workers, and wait for all values.

        >>> with tpool.Pool(2) as pool:
        ...     pool.map(abs, [-1, -2, -3], timeout=60, retries=2)
        [1, 2, 3]
        >>> with tpool.Pool(2) as pool:
        ...     values = pool.map(abs, range(10), progress=lambda now: now.finished and print(now.done, now.total))
        10 10

        For several iterables: ``starmap(func, zip(xs, ys))``, or ``executor().map(func, xs, ys)``.

        Args:
            func: what to call.
            iterable: the items; read to its end at once.
            chunksize: how many items travel together and answer as one; None chooses (1 with a ``timeout`` or
                ``retries``, which count for the chunk as a whole).
            timeout: how many seconds a task may run, until its worker is killed; see ``Pool``.
            retries: how often a task is tried again; see ``Pool``.
            retry_on: after which exceptions.
            progress: True for a bar (of tqdm: items, rate, bytes moved, workers lost), or a callable that is given a
                ``tpool.Progress`` now and then, in the callback thread.

        Returns:
            The values, in the order of the items.

        Raises:
            Exception: what the first call to fail raised; the other calls still run.
            WorkerLostError: a worker died while it ran one of the chunks.
            TaskTimeoutError: one of the chunks ran for too long.
            PoolEndedError: the pool takes no more work.
        """
        limits = self._limits.override(timeout, retries, retry_on)
        call = MapCall("map", func, limits, progress)
        return self._wait_for_map(call, iterable, chunksize)

    def map_unordered(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
        progress: bool | Show = False,
    ) -> list[T]:
        """As ``map``, but the values stand in the order in which the chunks finished.

        >>> with tpool.Pool(2) as pool:
        ...     sorted(pool.map_unordered(abs, [-1, -2, -3]))
        [1, 2, 3]
        """
        limits = self._limits.override(timeout, retries, retry_on)
        call = MapCall("map_unordered", func, limits, progress, ordered=False)
        return self._wait_for_map(call, iterable, chunksize)

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
        progress: bool | Show = False,
    ) -> MapResult[T]:
        """As ``map``, but returns as soon as the items are pickled; see ``apply_async`` for the callbacks.

        >>> with tpool.Pool(2) as pool:
        ...     result = pool.map_async(abs, [-1, -2])
        ...     result.get(timeout=60)
        [1, 2]

        Returns:
            The result, which is there when all calls are done; of ``starmap_async``, likewise.
        """
        limits = self._limits.override(timeout, retries, retry_on)
        call = MapCall("map", func, limits, progress)
        return self._map_async(call, iterable, chunksize, callback, error_callback)

    def starmap(
        self,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
        progress: bool | Show = False,
    ) -> list[T]:
        """As ``map``, with ``func(*item)``.

        >>> with tpool.Pool(2) as pool:
        ...     pool.starmap(pow, [(2, 5), (3, 2)])
        [32, 9]
        """
        limits = self._limits.override(timeout, retries, retry_on)
        call = MapCall("starmap", func, limits, progress, carrier=Starred(func))
        return self._wait_for_map(call, iterable, chunksize)

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
        progress: bool | Show = False,
    ) -> MapResult[T]:
        """As ``map_async``, with ``func(*item)``."""
        limits = self._limits.override(timeout, retries, retry_on)
        call = MapCall("starmap", func, limits, progress, carrier=Starred(func))
        return self._map_async(call, iterable, chunksize, callback, error_callback)

    def _wait_for_map(self, call: MapCall, iterable: Iterable[Any], chunksize: int | None) -> list[T]:
        result: MapResult[T] = self._map_async(call, iterable, chunksize, None, None)
        try:
            values = result.get()
        except BaseException:
            # Interrupted, perhaps: nobody can ask for the rest any more.
            if not result.ready() and result._job is not None:
                self._opener.cancel(result._job)
                if isinstance(result, MeteredMap):
                    result.give_up()
            raise
        finally:
            if isinstance(result, MeteredMap) and result.ready():
                result.wait_shown()
        return values

    def _map_async(
        self,
        call: MapCall,
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Callable[[list[T]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> MapResult[T]:
        self._gate.check_running()
        check_func(call.func)
        chunksize = options.check_chunksize(chunksize)
        check_items(iterable)
        check_callback("callback", callback)
        check_callback("error_callback", error_callback)
        items = iterable if isinstance(iterable, (list, tuple)) else list(iterable)
        if chunksize is None and call.limits.rules is not None:
            chunksize = 1  # limits hold for tasks, and each call is one, unless the user says otherwise
        size = self._opener.chunksize(len(items), chunksize)
        meter = self._meter(call.progress, call.story, len(items))
        arguments = (self, call.story, self._callbacks, callback, error_callback)
        result: MapResult[T]
        if meter is None:
            result = MapResult(*arguments, ordered=call.ordered)
        else:
            result = MeteredMap(meter, len(items), size, *arguments, ordered=call.ordered)
        self._opener.open_map(result, call.carrier or call.func, items, size, call.limits)
        return result
