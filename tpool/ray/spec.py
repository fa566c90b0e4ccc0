"""What the user asks of Ray: where it runs, and what each worker needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RayEngine"]


@dataclass(frozen=True, kw_only=True)
class RayEngine:
    """``Pool(engine=RayEngine(...))``: run the workers on Ray, each an actor.

    >>> RayEngine(num_gpus=1, start_timeout=600).resources_text()
    '1 CPU, 1 GPU'

    Args:
        address: of the cluster, as ``ray.init`` takes it: ``"host:6379"``, ``"auto"``, or ``"local"`` for a Ray of
            this process alone (``"ray://…"``, a client, cannot run a pool). None: the Ray that this process is
            connected to, else the one that ``RAY_ADDRESS`` or ``ray start`` on this machine names, else a local one,
            which ends with the pool.
        num_cpus: that Ray reserves for each worker; also its threads, if the pool's ``threads`` does not say.
        num_gpus: likewise. Ray shows a worker its own GPUs only.
        resources: other resources of each worker, by name.
        runtime_env: what each worker needs on its node (``pip``, ``working_dir``, ``env_vars`` …); see Ray. tpool and
            torch must be there.
        start_timeout: how many seconds workers may wait for resources while none of the pool is ready, an autoscaler's
            time included; then the pool ends with ``WorkerStartError``. Where some are ready, the others are waited
            for without end, and a warning is logged as often.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is out of range.
    """

    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] | None = None
    start_timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.address is not None and not isinstance(self.address, str):
            raise TypeError(f"address must be text, such as 'auto' or '10.0.0.1:6379', not {self.address!r}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                "address: a Ray client (ray://…) cannot run a pool; run the program on a node of the cluster"
            )
        for name, number in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus), *self.resources.items()):
            _check_number(name, number)
        _check_number("start_timeout", self.start_timeout)
        if not self.start_timeout:
            raise ValueError("start_timeout must be more than 0 seconds")

    def resources_text(self) -> str:
        """What each worker needs, for messages."""
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items() if amount) or "nothing"

    def fits(self, total: Mapping[str, float]) -> int:
        """How many workers there is room for; GPUs count where workers need some.

        Args:
            total: the cluster's resources, by Ray's names: ``{"CPU": 8.0, "GPU": 1.0}``.

        Returns:
            At least 0.
        """
        if self.num_gpus:
            return math.floor(total.get("GPU", 0) / self.num_gpus)
        return math.floor(total.get("CPU", 0) / self.num_cpus) if self.num_cpus else 0


def _check_number(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, not {number!r}")
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be 0 or more, not {number!r}")
