"""What the scheduler is given to do: tasks, and what their caller asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NewType

JobId = NewType("JobId", int)
WorkerId = NewType("WorkerId", int)
Slot = NewType("Slot", int)


@dataclass(slots=True, eq=False)
class Task:
    """One unit of work: a call of the user's function on one item, or on a chunk of items of a ``map``.

    Or a *span* of such units, each on one item, which stand behind each other in the job and travel together: tasks of
    microseconds, which it would cost more to handle one by one than to run. Each has its own claim, outcome and loss,
    and the span is cut where some of them go another way than the others.

    Attributes:
        job: the job it belongs to.
        index: its place in the job, from 0; of a span, that of its first item.
        payload: what the engine sends; the scheduler never looks into it.
        weight: how many calls of the user's function it stands for (counts towards ``max_tasks``).
        attempts: how often it was begun in vain: its worker was lost or killed, or it raised what is tried again.
        losses: the causes of the attempts that have one, in order.
        count: how many items a span has; 1 for any other task.
        start: which of the payload's items is its first one.
    """

    job: JobId
    index: int
    payload: Any
    weight: int = 1
    attempts: int = 0
    losses: tuple[Any, ...] = ()
    count: int = 1
    start: int = 0

    def cut(self, count: int) -> Task:
        """Take the first ``count`` items away from a span, as a task of their own; fewer than all."""
        head = Task(self.job, self.index, self.payload, self.weight, count=count, start=self.start)
        self.index += count
        self.start += count
        self.count -= count
        return head

    def singly(self) -> Iterator[Task]:
        """What ``items`` would give, with nothing changed; of a span as far as somebody looks."""
        if self.count == 1:
            yield self
            return
        for place in range(self.count):
            yield Task(self.job, self.index + place, self.payload, self.weight, start=self.start + place)

    def items(self) -> Iterator[Task]:
        """The items of a span, each as a task of its own; any other task itself."""
        while self.count > 1:
            yield self.cut(1)
        yield self


@dataclass(slots=True, eq=False)
class Rules:
    """What a caller asked for each task of a job.

    Attributes:
        timeout: how many seconds it may run; None for any time.
        retries: how often it is tried again.
        retry_lost: whether after the loss of its worker.
        retry_timed_out: whether after it ran for too long.
    """

    timeout: float | None = None
    retries: int = 0
    retry_lost: bool = False
    retry_timed_out: bool = False


@dataclass(slots=True, eq=False)
class TimedOut:
    """The cause of FailTask where a task ran for longer than ``timeout`` seconds; its worker is killed."""

    worker: WorkerId
    timeout: float
