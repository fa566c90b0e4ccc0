"""Pools with the API of ``multiprocessing.Pool``."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from typing import Any

from benchmarks.peers.base import POOL, RECYCLE, TERMINATE, Function, Handle, Peer, library_version

_WORKERS_OF_RAY = 2


class PoolHandle:
    """Any object with the methods of ``multiprocessing.Pool``."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None = None) -> list[Any]:
        return list(self._pool.map(function, items, chunksize))

    def imap(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return iter(self._pool.imap(function, items, chunksize))

    def imap_unordered(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]:
        return iter(self._pool.imap_unordered(function, items, chunksize))

    def apply(self, function: Function, item: object) -> object:
        return self._pool.apply(function, (item,))

    def submit(self, function: Function, items: Sequence[Any]) -> None:
        self._pool.map_async(function, items, 1)

    def close(self) -> None:
        self._pool.close()
        self._pool.join()

    def terminate(self) -> None:
        self._pool.terminate()
        self._pool.join()


class TorchFileDescriptor(Peer):
    """The baseline. ``torch.multiprocessing.Pool`` itself is this: the standard class with torch's reducers."""

    title = "torch.multiprocessing"
    note = "fork, file_descriptor strategy: the baseline of all ratios"
    strategy = "file_descriptor"

    def __init__(self) -> None:
        torch_multiprocessing: Any = importlib.import_module("torch.multiprocessing")

        # Process-wide, and one of the reasons why each pool has a process of its own.
        torch_multiprocessing.set_sharing_strategy(self.strategy)
        self._context = torch_multiprocessing.get_context("fork")

    def version(self) -> str:
        return library_version("torch")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return PoolHandle(self._context.Pool(workers, maxtasksperchild=maxtasksperchild))


class TorchFileSystem(TorchFileDescriptor):
    """The same with files in ``/dev/shm`` in the place of descriptors."""

    title = "torch.multiprocessing (file_system)"
    note = "fork, file_system strategy"
    strategy = "file_system"


class Multiprocessing(Peer):
    """The standard library alone: tensors go through the pipe by value."""

    title = "multiprocessing"
    note = "fork; torch's reducers taken out, so tensors are pickled by value"

    def __init__(self) -> None:
        # `import torch` registers its reducers for everybody; with them this column would repeat torch's.
        reducers: dict[type, Callable[..., object]] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        for kind in [each for each in reducers if each.__module__.partition(".")[0] == "torch"]:
            del reducers[kind]
        self._context = get_context("fork")

    def version(self) -> str:
        return platform.python_version()

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return PoolHandle(self._context.Pool(workers, maxtasksperchild=maxtasksperchild))


class Billiard(Peer):
    """Celery's fork of ``multiprocessing``."""

    title = "billiard"
    note = "fork; its own pickler, so tensors are pickled by value"

    def __init__(self) -> None:
        self._billiard: Any = importlib.import_module("billiard")

    def version(self) -> str:
        return library_version("billiard")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return PoolHandle(self._billiard.Pool(workers, maxtasksperchild=maxtasksperchild))


class RayHandle(PoolHandle):
    """Ray's Pool has no chunksize of its own choice in ``imap``, and ends its actors in ``terminate``."""

    def apply(self, function: Function, item: object) -> object:
        return self._pool.apply(function, args=(item,))


class Ray(Peer):
    """``ray.util.multiprocessing.Pool`` on a private Ray of two CPUs."""

    title = "ray.util.multiprocessing"
    note = "local Ray, two CPUs; workers are actors; close and terminate are Ray's own, not a stop of Ray"
    # terminate() does not wait for the actors' processes, so it cannot be compared; and a hundred actors one after
    # another, a second or two each, would only show a timeout.
    features = POOL - {TERMINATE, RECYCLE}

    def __init__(self) -> None:
        self._pools: Any = importlib.import_module("ray.util.multiprocessing")
        ray: Any = importlib.import_module("ray")
        ray.init(num_cpus=_WORKERS_OF_RAY, include_dashboard=False, log_to_driver=False, configure_logging=False)

    def version(self) -> str:
        return library_version("ray")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return RayHandle(self._pools.Pool(workers, maxtasksperchild=maxtasksperchild))


class Tpool(Peer):
    """This project, as it comes."""

    title = "tpool"
    note = "default start method, memory shared between caller and workers"
    options: dict[str, str] = {}  # noqa: RUF012 - never changed, and a ClassVar would say less

    def __init__(self) -> None:
        self._tpool: Any = importlib.import_module("tpool")
        if not hasattr(self._tpool, "Pool"):
            raise ImportError("tpool has no Pool")

    def version(self) -> str:
        try:
            return library_version("tpool")
        except importlib.metadata.PackageNotFoundError:
            return "not installed: the working tree"

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        return PoolHandle(self._tpool.Pool(workers, maxtasksperchild=maxtasksperchild, **self.options))


class TpoolRay(Tpool):
    """This project's workers as actors of Ray, beside Ray's own Pool."""

    title = "tpool on Ray"
    note = "local Ray; workers are actors; to be compared with Ray's own pool"
    features = Ray.features
    cases = ("tensor-*", "noop-*", "apply", "uneven-*", "scaling-workers-*", "stream-*", "numpy", "break-even-*")

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        # Two CPUs in all, however many workers there are: these sleep, where there are more.
        engine = self._tpool.RayEngine(address="local", num_cpus=min(1.0, _WORKERS_OF_RAY / workers))
        return PoolHandle(self._tpool.Pool(workers, maxtasksperchild=maxtasksperchild, engine=engine))


class TpoolCopy(Tpool):
    """This project with value semantics."""

    title = "tpool (copy mode)"
    note = "sharing='copy': the caller's tensors stay where they are"
    cases = ("generator-*", "tensor-*", "stream-*", "resend-*")
    options = {"sharing": "copy"}  # noqa: RUF012
