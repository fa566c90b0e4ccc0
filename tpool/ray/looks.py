"""What an engine on Ray tells of its workers, for people; from any thread."""

from __future__ import annotations

from typing import Any

from tpool.local.crew import SlotRecord
from tpool.ray.member import Member
from tpool.task import JobId, WorkerId

__all__ = ["RayLook"]

STACK_SECONDS = 1.0
"""How long a worker may take to tell where it is. One that is deep in C code, with the interpreter's lock, cannot."""


class RayLook:
    """A look at the workers of one pool; see ``tpool.engine.Look``.

    Args:
        slots: what each slot has done.
        ray: the module.
        members: the workers, by id.

    Attributes:
        slots: see above.
    """

    def __init__(self, slots: list[SlotRecord], ray: Any, members: dict[int, Member]) -> None:
        self.slots = slots
        self._ray = ray
        self._members = members

    @property
    def tasks_done(self) -> int:
        """How many tasks were answered."""
        return sum(slot.tasks_done for slot in self.slots)

    def memory_nbytes(self, slot: int | None) -> tuple[int, int]:
        """None: the object store is Ray's, and its numbers are those of the cluster."""
        return 0, 0

    def direct_job(self, worker: WorkerId) -> JobId | None:
        """None: no worker is lent."""
        return None

    def stack(self, slot: int) -> str:
        """Where the slot's worker is; why it does not say."""
        member = next((each for each in list(self._members.values()) if each.slot == slot and each.pid), None)
        if member is None:
            return "it has no process yet"
        try:
            told: str = self._ray.get(member.stack(), timeout=STACK_SECONDS)
        except self._ray.exceptions.RayError as error:
            return f"it does not tell where it is: {type(error).__name__} on node {member.node}"
        return told or "it runs nothing"
