"""torch's DataLoader as a pool: it calls a function on indices in workers and streams the results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.peers.base import Function, Handle, Peer, library_version


class _Calls:
    """A dataset whose item number `index` is ``function(index)``."""

    def __init__(self, function: Function) -> None:
        self._function = function

    def __getitem__(self, index: int) -> object:
        return self._function(index)


class _Indices:
    """A sampler whose indices can be set anew for each pass over the loader."""

    def __init__(self) -> None:
        self.items: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class LoaderHandle:
    """One loader with persistent workers per function and order, since a loader's function is fixed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._loaders: dict[tuple[Function, bool], tuple[_Indices, Any]] = {}

    def _run(self, function: Function, items: Iterable[Any], in_order: bool) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        key = (function, in_order)
        if key not in self._loaders:
            indices = _Indices()
            loader: Any = DataLoader(
                _Calls(function),  # type: ignore[arg-type]
                batch_size=None,
                sampler=indices,
                num_workers=self._workers,
                persistent_workers=True,
                in_order=in_order,
            )
            self._loaders[key] = indices, loader
        indices, loader = self._loaders[key]
        indices.items = items
        return iter(loader)

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        return list(self._run(function, items, in_order=True))

    def imap(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return self._run(function, items, in_order=True)

    def imap_unordered(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return self._run(function, items, in_order=False)

    def apply(self, function: Function, item: object) -> object:
        raise NotImplementedError("a DataLoader has no single tasks")

    def submit(self, function: Function, items: Sequence[Any]) -> None:
        raise NotImplementedError("a DataLoader starts work only as it is consumed")

    def close(self) -> None:
        # A loader has no close: it stops its workers when it dies.
        self._loaders.clear()

    terminate = close


class Loader(Peer):
    title = "DataLoader"
    note = "batch_size=None, persistent workers; only cases whose input is an index"
    features: frozenset[str] = frozenset()

    def version(self) -> str:
        return library_version("torch")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return LoaderHandle(workers)
