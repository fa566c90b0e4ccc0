"""From the arguments of ``Pool`` to an engine: they are checked, and the engine that they ask for is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

from tpool import options
from tpool.arguments import check_args
from tpool.engine import Engine
from tpool.local.engine import LocalEngine
from tpool.local.lifetime import Lifetime
from tpool.local.setup import Settings, refuse_fork_after_cuda
from tpool.ray.making import check_engine, make_ray_engine, refuse_local_options
from tpool.ray.spec import RayEngine

__all__ = ["EngineArguments", "make_engine"]


@dataclass(slots=True)
class EngineArguments:
    """What ``Pool`` was given and its engine must know; see ``Pool``."""

    processes: int | None
    initializer: Callable[..., object] | None
    initargs: Iterable[Any]
    context: str | BaseContext | None
    preload: Iterable[str]
    memory: int | str | None
    sharing: str | None
    worker_exit: Callable[[], object] | None
    threads: int | None
    affinity: bool | Iterable[int | Iterable[int]] | None
    devices: Iterable[str] | None
    max_memory: int | str | None
    max_cuda_memory: int | str | None
    forward_logs: bool | int | str
    timeline: bool | int


def make_engine(engine: str | RayEngine, given: EngineArguments) -> tuple[Engine, int, int]:
    """Check the arguments and make an engine; its workers are not started yet.

    Returns:
        The engine, how many workers it has, and how many bytes of memory its tensors may take.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or out of range, or means nothing to this engine.
        Exception: what making it raises.
    """
    spec = check_engine(engine)
    if spec is not None:
        names = ("context", "memory", "sharing", "affinity", "devices", "forward_logs", "timeline")
        refuse_local_options({name: getattr(given, name) for name in names})
    method = options.start_method(given.context)
    steering = options.check_steering(
        given.threads, given.affinity, given.devices, given.max_memory, given.max_cuda_memory, method
    )
    initializer: Callable[..., object] | Lifetime | None = options.check_initializer(given.initializer)
    if (worker_exit := options.check_worker_exit(given.worker_exit)) is not None:
        initializer = Lifetime(given.initializer, worker_exit)
    initargs = check_args(given.initargs, "initargs")
    preload = options.check_preload(given.preload)
    if spec is not None:
        return make_ray_engine(
            spec,
            None if given.processes is None else options.check_processes(given.processes),
            initializer,
            initargs,
            preload=preload,
            threads=steering.threads,
            max_memory_nbytes=steering.max_memory_nbytes,
            max_cuda_nbytes=steering.max_cuda_nbytes,
        )
    settings = Settings(
        processes=options.check_processes(given.processes),
        method=method,
        initializer=initializer,
        initargs=initargs,
        preload=preload,
        memory_nbytes=options.parse_nbytes(given.memory),
        sharing=options.check_sharing(given.sharing or "share"),
        steering=steering,
        log_level=options.check_log_level(given.forward_logs),
        timeline=options.check_timeline(given.timeline),
    )
    refuse_fork_after_cuda(method)
    return LocalEngine(settings), settings.processes, settings.memory_nbytes
