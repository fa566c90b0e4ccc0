"""From the arguments of ``Pool`` to an engine on Ray; what cannot be done there is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tpool.local.lifetime import Lifetime
from tpool.ray.cluster import Cluster, connect
from tpool.ray.engine import ActorEngine
from tpool.ray.settings import RaySettings
from tpool.ray.spec import RayEngine

__all__ = ["check_engine", "make_ray_engine", "refuse_local_options"]

# By name: what cannot be had on Ray, and what to do.
_LOCAL_ONLY = {
    "context": "Ray starts its own processes; for modules and variables use RayEngine(runtime_env=...)",
    "memory": "the object store is Ray's: ray start --object-store-memory, or ray.init(object_store_memory=...)",
    "sharing": "no memory is shared between machines, so tensors always travel by copy; leave sharing out",
    "affinity": "which CPUs a worker may use is up to its node; leave affinity out",
    "devices": "Ray gives each worker devices of its own: RayEngine(num_gpus=1)",
    "timeline": "Ray has one of its own: ray timeline; leave timeline out",
    "forward_logs": "Ray collects what its processes log; leave forward_logs out",
}


def check_engine(engine: Any) -> RayEngine | None:
    """What the user chose; None for local processes.

    Raises:
        TypeError: it is no engine.
        ValueError: it is a name that is none.
    """
    if engine == "local":
        return None
    if engine == "ray":
        return RayEngine()
    if isinstance(engine, RayEngine):
        return engine
    kind = ValueError if isinstance(engine, str) else TypeError
    raise kind(f"engine must be 'local', 'ray' or a tpool.RayEngine(...), not {engine!r}")


def refuse_local_options(given: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that was given and means nothing on Ray.

    Args:
        given: options of ``Pool`` by name; those that were left out are None or False.
    """
    for name, cure in _LOCAL_ONLY.items():
        if given[name] is not None and given[name] is not False:
            raise ValueError(f"{name}={given[name]!r} cannot be used with engine='ray': {cure}")


def make_ray_engine(
    spec: RayEngine,
    processes: int | None,
    initializer: Callable[..., object] | Lifetime | None,
    initargs: tuple[Any, ...],
    **more: Any,
) -> tuple[ActorEngine, int, int]:
    """Connect to Ray and make an engine.

    Args:
        spec: where, and what each worker needs.
        processes: how many workers; None for as many as the cluster has room for.
        initializer: run in each worker before its first task.
        initargs: its arguments.
        more: see ``RaySettings``.

    Returns:
        The engine, how many workers it has, and the size of the object store in bytes.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no Ray at that address.
        ValueError: the cluster has no room for a single worker, and nobody said how many there should be.
    """
    cluster = connect(spec)
    try:
        count = processes if processes is not None else _room(spec, cluster)
        settings = RaySettings(spec, initializer, initargs, **more)
        return ActorEngine(settings, cluster, count), count, cluster.store_nbytes()
    except BaseException:
        cluster.release()
        raise


def _room(spec: RayEngine, cluster: Cluster) -> int:
    total = cluster.total()
    count = spec.fits(total)
    if count < 1:
        has = ", ".join(f"{total.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        raise ValueError(
            f"the cluster has {has}, and a worker needs {spec.resources_text()}: there is room for none; say how many"
            " processes there should be, if nodes are to be added"
        )
    return count
