"""Pools with the API of ``concurrent.futures``.

They have no chunks of their own choice, so ``map`` sends eight in all: four per worker, as the standard library does.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import multiprocessing
import platform
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.peers.base import (
    APPLY,
    ARGUMENTS,
    RECYCLE,
    STREAM,
    TERMINATE,
    Function,
    Handle,
    Peer,
    default_chunk,
    library_version,
)


class ExecutorHandle:
    """A ``concurrent.futures.Executor``; input is read whole, as ``Executor.map`` does."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        return list(self._executor.map(function, items, chunksize=chunksize or default_chunk(items)))

    def imap(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return iter(self._executor.map(function, items, chunksize=chunksize))

    def imap_unordered(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        waiting = {self._executor.submit(function, item) for item in items}
        # as_completed keeps every future it was given; taking each out as it ends lets the results go.
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            while done:
                yield done.pop().result()

    def apply(self, function: Function, item: object) -> object:
        return self._executor.submit(function, item).result()

    def submit(self, function: Function, items: Sequence[Any]) -> None:
        for item in items:
            self._executor.submit(function, item)

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def terminate(self) -> None:
        self._executor.shutdown(wait=True, kill_workers=True)


class Futures(Peer):
    title = "concurrent.futures"
    note = "fork; torch's reducers"
    features = frozenset({ARGUMENTS, APPLY, STREAM})

    def version(self) -> str:
        return platform.python_version()

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        context = multiprocessing.get_context("fork")
        return ExecutorHandle(concurrent.futures.ProcessPoolExecutor(workers, mp_context=context))


class Loky(Peer):
    title = "loky"
    note = "its own start method"
    features = frozenset({ARGUMENTS, APPLY, STREAM, TERMINATE})

    def __init__(self) -> None:
        self._loky: Any = importlib.import_module("loky")

    def version(self) -> str:
        return library_version("loky")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return ExecutorHandle(self._loky.ProcessPoolExecutor(workers))


class PebbleHandle:
    """pebble's ``ProcessPool``; its ``map`` gives results in order only, so ``imap_unordered`` schedules each task."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        return list(self._pool.map(function, items, chunksize=chunksize or default_chunk(items)).result())

    def imap(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return iter(self._pool.map(function, items, chunksize=chunksize).result())

    def imap_unordered(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        waiting = {self._pool.schedule(function, args=(item,)) for item in items}
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            while done:
                yield done.pop().result()

    def apply(self, function: Function, item: object) -> object:
        return self._pool.schedule(function, args=(item,)).result()

    def submit(self, function: Function, items: Sequence[Any]) -> None:
        for item in items:
            self._pool.schedule(function, args=(item,))

    def close(self) -> None:
        self._pool.close()
        self._pool.join()

    def terminate(self) -> None:
        self._pool.stop()
        self._pool.join()


class Pebble(Peer):
    title = "pebble"
    note = "fork; torch's reducers"
    features = frozenset({ARGUMENTS, APPLY, STREAM, RECYCLE, TERMINATE})

    def __init__(self) -> None:
        self._pebble: Any = importlib.import_module("pebble")

    def version(self) -> str:
        return library_version("pebble")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        context = multiprocessing.get_context("fork")
        return PebbleHandle(self._pebble.ProcessPool(workers, max_tasks=maxtasksperchild or 0, context=context))
