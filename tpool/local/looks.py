"""What an engine of local workers tells of them, for people; from any thread, as it is at the moment."""

from __future__ import annotations

from tpool.local.crew import Crew, Life, SlotRecord
from tpool.local.encodings import Encoding
from tpool.local.lending import Lending
from tpool.local.setup import PoolMemory
from tpool.local.stacks import shorten
from tpool.local.trace import Record
from tpool.task import JobId, WorkerId

__all__ = ["Look"]


class Look:
    """A look at the workers of one pool.

    Args:
        crew: what they have done.
        memory: the pool's.
        lending: who is lent.

    Attributes:
        slots: what each slot has done.
    """

    def __init__(self, crew: Crew, memory: PoolMemory, lending: Lending) -> None:
        self.slots: list[SlotRecord] = crew.slots
        self._memory = memory
        self._lending = lending

    @property
    def tasks_done(self) -> int:
        """How many tasks were answered."""
        return sum(slot.tasks_done for slot in self.slots)

    def memory_nbytes(self, slot: int | None) -> tuple[int, int]:
        """Shared memory that a slot has (the caller for None), and the most that it ever had."""
        return self._memory.committed_nbytes(slot)

    def direct_job(self, worker: WorkerId) -> JobId | None:
        """The call that a caller makes in this worker directly."""
        return self._lending.job_of(worker)

    @property
    def began(self) -> float:
        """When the pool was made, as its trace counts time."""
        return self._memory.began

    def trace(self, slot: int) -> tuple[list[Record], int, list[Life], tuple[int, int, float] | None]:
        """What the slot's workers did, how many older records are gone, their lives, and the task that runs."""
        record = self.slots[slot]
        if record.trace is None:
            return [], 0, [], None
        running = record.trace.running()
        records, gone = record.trace.read()
        return records, gone, list(record.lives), running

    def encodings(self) -> tuple[list[Encoding], int]:
        """What the caller's threads encoded, and how many older ones are gone."""
        encodings = self._memory.encodings
        return ([], 0) if encodings is None else encodings.read()

    def stack(self, slot: int) -> str | None:
        """Where the slot's worker is; None if it does not say."""
        pid = self.slots[slot].pid
        stack = None if pid is None else self._memory.stacks.ask(pid)
        return None if stack is None else shorten(stack)
