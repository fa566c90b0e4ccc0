"""The pools that a case can be run on, each with the face of ``multiprocessing.Pool``.

An adapter says what its pool can do at all (``can``); a case says what it needs. What is missing is ``n/a`` in the
table, never a failure. Executors get ``map``, ``imap`` and ``apply_async`` out of ``submit``, one future per item,
which is what their users write.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# What a pool can do beyond ``apply``, ``apply_async``, ``map``, ``close`` and ``join``.
# "iterator": its imap gives an object of its own, made for several threads, not one that the adapter makes of futures.
POOL_LIKE = frozenset({"imap", "iterator", "callback", "terminate", "initializer", "maxtasks"})
EXECUTOR_LIKE = frozenset({"imap", "callback", "initializer"})


class FutureResult:
    """A future with the face of ``AsyncResult``."""

    def __init__(self, future: Any) -> None:
        self.future = future

    def get(self, timeout: float | None = None) -> Any:
        try:
            return self.future.result(timeout)
        except concurrent.futures.TimeoutError as error:
            if self.future.done():  # the task's own TimeoutError
                raise
            raise multiprocessing.TimeoutError from error

    def ready(self) -> bool:
        return self.future.done()

    def wait(self, timeout: float | None = None) -> None:
        concurrent.futures.wait([self.future], timeout)


class FutureListResult:
    """Several futures with the face of ``MapResult``."""

    def __init__(self, futures: list[Any]) -> None:
        self.futures = futures

    def get(self, timeout: float | None = None) -> list[Any]:
        return [FutureResult(future).get(timeout) for future in self.futures]

    def ready(self) -> bool:
        return all(future.done() for future in self.futures)


class FutureIterator:
    """Results in order; like the standard library's, it goes on after one that raised."""

    def __init__(self, futures: Iterable[Any]) -> None:
        self.futures = iter(futures)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.futures).result()

    def next(self, timeout: float | None = None) -> Any:
        return FutureResult(next(self.futures)).get(timeout)


class ExecutorPool:
    """An executor with the face of ``multiprocessing.Pool``."""

    def __init__(self, executor: Any, submit: Callable[..., Any], close: Callable[[], None], join: Callable[[], None]):
        self.executor = executor
        self.submit = submit
        self.close = close
        self._join = join
        self._futures: weakref.WeakSet[Any] = weakref.WeakSet()

    def join(self) -> None:
        """Not every executor still waits when it was told to shut down before."""
        concurrent.futures.wait(list(self._futures))
        self._join()

    def _submit(self, function, *args, **kwds):
        future = self.submit(function, *args, **kwds)
        self._futures.add(future)
        return future

    def apply_async(self, function, args=(), kwds=None, callback=None, error_callback=None):
        future = self._submit(function, *args, **(kwds or {}))

        def done(finished):
            if finished.cancelled():
                return
            if finished.exception() is None:
                if callback:
                    callback(finished.result())
            elif error_callback:
                error_callback(finished.exception())

        if callback or error_callback:
            future.add_done_callback(done)
        return FutureResult(future)

    def apply(self, function, args=(), kwds=None):
        return self.apply_async(function, args, kwds).get()

    def map_async(self, function, iterable, chunksize=None):
        return FutureListResult([self._submit(function, item) for item in iterable])

    def map(self, function, iterable, chunksize=None):
        return self.map_async(function, iterable).get()

    def imap(self, function, iterable, chunksize=1):
        return FutureIterator([self._submit(function, item) for item in iterable])

    def imap_unordered(self, function, iterable, chunksize=1):
        return FutureIterator(concurrent.futures.as_completed([self._submit(function, item) for item in iterable]))


class Adapter:
    """One kind of pool."""

    name = ""
    module = ""
    methods: tuple[str, ...] = ("forkserver", "fork", "spawn")
    can: frozenset[str] = POOL_LIKE

    def helpers(self, method: str) -> int:
        """Processes that may outlive a pool, until the interpreter ends: fork server, resource tracker, manager."""
        return 2

    @classmethod
    def installed(cls) -> bool:
        return importlib.util.find_spec(cls.module.partition(".")[0]) is not None

    def pool(self, processes: int, method: str, initializer=None, initargs=(), maxtasksperchild=None, **more) -> Any:
        """A new pool.

        Args:
            processes: how many workers.
            method: the start method.
            initializer: run in each worker before its first task.
            initargs: its arguments.
            maxtasksperchild: a worker is replaced after so many tasks.
            more: keywords that only tpool has.
        """
        raise NotImplementedError

    def end(self, pool: Any) -> None:
        """Ends the pool the quickest way it has."""
        pool.terminate()
        pool.join()


class Tpool(Adapter):
    name = module = "tpool"
    can = POOL_LIKE | {"torch", "tpool"}

    def helpers(self, method):
        return 1 if method == "forkserver" else 0  # the zygote

    def pool(self, processes, method, **options):
        import tpool

        return tpool.Pool(processes, context=method, **options)


class Multiprocessing(Adapter):
    name = module = "multiprocessing"

    def pool(self, processes, method, **options):
        return multiprocessing.get_context(method).Pool(processes, **options)


class TorchMultiprocessing(Adapter):
    name = module = "torch.multiprocessing"
    can = POOL_LIKE | {"torch"}

    def pool(self, processes, method, **options):
        import torch.multiprocessing

        return torch.multiprocessing.get_context(method).Pool(processes, **options)


class Billiard(Adapter):
    name = module = "billiard"

    def pool(self, processes, method, **options):
        import billiard

        return billiard.get_context(method).Pool(processes, **options)


class ConcurrentFutures(Adapter):
    name = module = "concurrent.futures"
    can = EXECUTOR_LIKE | {"maxtasks"}

    def pool(self, processes, method, maxtasksperchild=None, **options):
        options["mp_context"] = multiprocessing.get_context(method)
        if maxtasksperchild:
            options["max_tasks_per_child"] = maxtasksperchild
        executor = concurrent.futures.ProcessPoolExecutor(processes, **options)
        return ExecutorPool(executor, executor.submit, lambda: executor.shutdown(wait=False), executor.shutdown)

    def end(self, pool):
        pool.executor.shutdown(wait=True, cancel_futures=True)


class Loky(Adapter):
    name = module = "loky"
    methods = ("loky", "spawn")
    can = EXECUTOR_LIKE | {"terminate"}

    def pool(self, processes, method, maxtasksperchild=None, **options):
        import loky

        executor = loky.ProcessPoolExecutor(processes, context=loky.backend.get_context(method), **options)
        pool = ExecutorPool(executor, executor.submit, lambda: executor.shutdown(wait=False), executor.shutdown)
        pool.terminate = lambda: executor.shutdown(wait=True, kill_workers=True)
        return pool


class Pebble(Adapter):
    name = module = "pebble"
    can = EXECUTOR_LIKE | {"terminate", "maxtasks"}

    def pool(self, processes, method, maxtasksperchild=None, **options):
        import pebble

        executor = pebble.ProcessPool(
            processes, max_tasks=maxtasksperchild or 0, context=multiprocessing.get_context(method), **options
        )

        def submit(function, *args, **kwds):
            return executor.schedule(function, args=args, kwargs=kwds)

        pool = ExecutorPool(executor, submit, executor.close, executor.join)
        pool.terminate = executor.stop
        return pool


class MpirePool(ExecutorPool):
    """mpire's pool speaks most of the language already, but ``join`` also closes, and ``map`` unpacks tuples."""

    def __init__(self, pool: Any) -> None:
        self.executor = pool
        self.close = lambda: None
        self.join = pool.stop_and_join
        self.terminate = pool.terminate

    def apply_async(self, function, args=(), kwds=None, callback=None, error_callback=None):
        return self.executor.apply_async(function, args, kwds, callback, error_callback)

    def map(self, function, iterable, chunksize=None):
        return self.executor.map(function, list(iterable), chunk_size=chunksize or 1)

    def map_async(self, function, iterable, chunksize=None):
        results = [self.executor.apply_async(function, (item,)) for item in iterable]
        return FutureListResult([_MpireFuture(result) for result in results])

    def imap(self, function, iterable, chunksize=1):
        return self.executor.imap(function, iterable, chunk_size=chunksize)

    def imap_unordered(self, function, iterable, chunksize=1):
        return self.executor.imap_unordered(function, iterable, chunk_size=chunksize)


class _MpireFuture:
    def __init__(self, result: Any) -> None:
        self.result = result.get
        self.done = result.ready


class Mpire(Adapter):
    name = module = "mpire"
    can = frozenset({"imap", "callback", "terminate"})

    def pool(self, processes, method, maxtasksperchild=None, **options):
        import mpire

        return MpirePool(mpire.WorkerPool(processes, start_method=method, **options))


ADAPTERS: dict[str, type[Adapter]] = {
    adapter.name: adapter
    for adapter in (
        Tpool,
        Multiprocessing,
        TorchMultiprocessing,
        ConcurrentFutures,
        Loky,
        Mpire,
        Pebble,
        Billiard,
    )
}
