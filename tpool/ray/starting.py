"""Workers from the request to readiness: where they are placed, how long they may wait for resources, who is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import Any

from tpool.local.crew import SlotRecord
from tpool.messages import StartWorker
from tpool.ray.actor import actor_class
from tpool.ray.cluster import Cluster
from tpool.ray.journal import Journals
from tpool.ray.member import Member, Shared
from tpool.ray.orders import Orders
from tpool.ray.parcels import Parcel
from tpool.ray.settings import RaySettings

__all__ = ["TELL_SECONDS", "Starting"]

logger = logging.getLogger("tpool")

TELL_SECONDS = 5.0
"""When it is told that workers wait for resources, and again when they have waited twice as long; where there is room,
processes start at once."""


class Starting:
    """The workers of one pool that have no process yet. The handler's thread's.

    Args:
        settings: what the user asked for.
        cluster: the connection.
        slots: where workers are, or may be.
        store_nbytes: how much of the object store a worker may hold mapped.
        journals: of the slots whose workers are near.
        initializer: (function, arguments).
        orders: says what a worker must hear first.
        tell: told what is waited for; with an empty text when that is over.
    """

    def __init__(self, settings: RaySettings, cluster: Cluster, slots: list[SlotRecord], store_nbytes: int,
                 initializer: Parcel, orders: Orders, journals: Journals,
                 tell: Callable[[str], object]) -> None:  # fmt: skip
        self._settings = settings
        self._spec = settings.spec
        self._cluster = cluster
        self._slots = slots
        self._store_nbytes = store_nbytes
        self._initializer: Parcel | None = initializer
        self._orders = orders
        self._journals = journals
        self._class = actor_class(cluster.ray)
        self._waiting: dict[int, Member] = {}  # by worker id: without a process
        self._begun_at = 0.0  # when the present wait began
        self._tell = tell
        self._told = False
        self._tell_at = 0.0

    def start(self, action: StartWorker, shared: Shared, record: SlotRecord) -> Member:
        """Ask for a worker."""
        spec = self._spec
        options: dict[str, Any] = {
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "allow_out_of_order_execution": False,
            "scheduling_strategy": "SPREAD",
        }
        if spec.resources:
            options["resources"] = dict(spec.resources)
        if spec.runtime_env:
            options["runtime_env"] = dict(spec.runtime_env)
        member = Member(action.worker, int(action.slot), self._class.options(**options).remote(), shared, record)
        record.workers += 1
        record.vacant = False
        if not self._waiting:
            self._begun_at = monotonic()
            self._tell_at = self._begun_at + TELL_SECONDS
        self._waiting[member.id] = member
        member.watch()
        return member

    def hear(self, member: Member, kind: str, value: Any) -> None:
        """Something was heard of a member: if it has a process now, it becomes a worker."""
        if kind == "live" or (kind == "hello" and isinstance(value, BaseException)):
            self._got(member)
        elif kind == "hello":
            self._got(member)
            assert self._initializer is not None
            near = member.node == self._cluster.node_id()
            journal = self._journals.hand_over(member.slot) if near else None
            hello = self._settings.hello(member.slot, self._processes(), self._store_nbytes, journal)
            self._orders.begin(member, hello, self._initializer)

    def _got(self, member: Member) -> None:
        self._waiting.pop(member.id, None)
        if self._told and not self._waiting:
            self._told = False
            self._tell("")

    def until_due(self, timeout: float | None) -> float | None:
        """How long the handler may sleep."""
        if not self._waiting:
            return timeout
        due = max(0.0, min(self._tell_at, self._begun_at + self._spec.start_timeout) - monotonic())
        return due if timeout is None else min(timeout, due)

    def check(self, members: dict[int, Member]) -> None:
        """Tell of workers that wait for long; give up if they wait for too long and there is nobody else."""
        if not self._waiting:
            return
        now = monotonic()
        if now >= self._tell_at:
            self._told, text = True, self.text()
            self._tell(text)
            logger.warning("%s", text)
            self._tell_at = now + max(TELL_SECONDS, now - self._begun_at)
        if now < self._begun_at + self._spec.start_timeout:
            return
        self._begun_at = now
        if any(member.ready for member in members.values()):
            return
        for member in self._waiting.values():
            member.story = f"got no resources within {self._spec.start_timeout:g} s (start_timeout): {self.text()}"
            member.kill()

    def text(self) -> str:
        """What is waited for, for people; empty if nothing is."""
        if not self._waiting:
            return ""
        total, free = self._cluster.total(), self._cluster.available()
        names = ("CPU", "GPU", *self._spec.resources)
        has = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}" for name in names)
        return (
            f"{len(self._waiting)} of {self._processes()} workers wait for resources: each needs"
            f" {self._spec.resources_text()}, and free in the cluster are {has}; if that is too little, ask for fewer"
            " processes or resources, or add nodes"
        )

    def _processes(self) -> int:
        return sum(not slot.vacant for slot in self._slots)

    def close(self) -> None:
        """The pool has ended."""
        self._waiting.clear()
        self._initializer = None
