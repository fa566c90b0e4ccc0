"""joblib and mpire: APIs of their own, made to look like ``multiprocessing.Pool`` by means that their docs name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from benchmarks.peers.base import APPLY, ARGUMENTS, POOL, STREAM, Function, Handle, Peer, library_version


class JoblibHandle:
    """``joblib.Parallel``, once for each way to return results; its workers stay alive between calls."""

    def __init__(self, joblib: Any, workers: int) -> None:
        self._delayed = joblib.delayed
        self._pools = {
            how: joblib.Parallel(n_jobs=workers, return_as=how) for how in ("list", "generator", "generator_unordered")
        }

    def _run(self, how: str, function: Function, items: Iterable[Any]) -> Any:
        call = self._delayed(function)
        return self._pools[how](call(item) for item in items)

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        return list(self._run("list", function, items))

    def imap(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return iter(self._run("generator", function, items))

    def imap_unordered(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return iter(self._run("generator_unordered", function, items))

    def apply(self, function: Function, item: object) -> object:
        return self._run("list", function, [item])[0]

    def submit(self, function: Function, items: Sequence[Any]) -> None:
        raise NotImplementedError("joblib waits for what it starts")

    def close(self) -> None:
        # The executor outlives each Parallel and is shared by them all.
        importlib.import_module("joblib.externals.loky").get_reusable_executor().shutdown(wait=True)

    terminate = close


class Joblib(Peer):
    title = "joblib"
    note = "loky backend; batches and memory maps by its own choice"
    features = frozenset({ARGUMENTS, APPLY, STREAM})

    def __init__(self) -> None:
        self._joblib: Any = importlib.import_module("joblib")

    def version(self) -> str:
        return library_version("joblib")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return JoblibHandle(self._joblib, workers)


class MpireHandle:
    """mpire's ``WorkerPool``; a tuple as item would be spread over parameters, so each item is wrapped in one.

    Two of them, which start their workers at their first use: in one pool that is kept alive, ``map`` and
    ``imap_unordered`` one after the other raise IndexError or TypeError (mpire 2.10.2: a worker keeps the former's
    notion of order).
    """

    def __init__(self, make_pool: Callable[[], Any], lifespan: int | None) -> None:
        self._in_order = make_pool()
        self._unordered = make_pool()
        self._lifespan = lifespan

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        wrapped = [(item,) for item in items]
        options = {"chunk_size": chunksize, "worker_lifespan": self._lifespan}
        return list(self._in_order.map(function, wrapped, concatenate_numpy_output=False, **options))

    def imap(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return self._stream(self._in_order.imap, function, items, chunksize)

    def imap_unordered(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return self._stream(self._unordered.imap_unordered, function, items, chunksize)

    def _stream(self, method: Any, function: Function, items: Iterable[Any], chunksize: int) -> Iterator[Any]:
        wrapped = ((item,) for item in items)
        return iter(method(function, wrapped, chunk_size=chunksize, worker_lifespan=self._lifespan))

    def apply(self, function: Function, item: object) -> object:
        return self._in_order.apply(function, (item,))

    def submit(self, function: Function, items: Sequence[Any]) -> None:
        for item in items:
            self._in_order.apply_async(function, (item,))

    def close(self) -> None:
        self._in_order.stop_and_join()
        self._unordered.stop_and_join()

    def terminate(self) -> None:
        self._in_order.terminate()
        self._unordered.terminate()


class Mpire(Peer):
    title = "mpire"
    note = "fork; torch's reducers"
    features = POOL

    def __init__(self) -> None:
        self._mpire: Any = importlib.import_module("mpire")

    def version(self) -> str:
        return library_version("mpire")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return MpireHandle(lambda: self._mpire.WorkerPool(workers, keep_alive=True), maxtasksperchild)
