"""What the user asked of a pool on Ray, validated; and the first words to each worker."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tpool.local.identity import WorkerInfo
from tpool.local.lifetime import Lifetime
from tpool.local.seat import Seat
from tpool.local.setup import main_attributes, working_directory
from tpool.ray.journal import Address
from tpool.ray.spec import RayEngine
from tpool.ray.tasks import Hello

__all__ = ["RaySettings"]


@dataclass(slots=True)
class RaySettings:
    """What the user asked for.

    Attributes:
        spec: where, and what each worker needs.
        initializer, initargs: run in each worker before its first task.
        preload: modules that each worker imports first.
        threads: of each worker; None for its CPUs.
        max_memory_nbytes, max_cuda_nbytes: see ``Seat``.
        seed: what the workers' seeds begin with.
    """

    spec: RayEngine
    initializer: Callable[..., object] | Lifetime | None
    initargs: tuple[Any, ...]
    preload: tuple[str, ...] = ()
    threads: int | None = None
    max_memory_nbytes: int | None = None
    max_cuda_nbytes: int | None = None
    seed: int = field(default_factory=lambda: secrets.randbits(62))

    def hello(self, slot: int, processes: int, store_nbytes: int, journal: Address | None) -> Hello:
        """The first words to a slot's worker."""
        threads = self.threads or max(1, int(self.spec.num_cpus))
        own_directory = bool(self.spec.runtime_env and "working_dir" in self.spec.runtime_env)
        return Hello(
            info=WorkerInfo(slot, processes, (self.seed + slot) % 2**63),
            seat=Seat(
                threads,
                self.threads is not None,
                max_memory_nbytes=self.max_memory_nbytes,
                max_cuda_nbytes=self.max_cuda_nbytes,
            ),
            preload=self.preload,
            directory=None if own_directory else working_directory(),
            path=list(sys.path),
            argv=list(sys.argv),
            main_attributes=main_attributes(),
            store_nbytes=store_nbytes,
            journal=journal,
        )
