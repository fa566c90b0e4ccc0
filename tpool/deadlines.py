"""When the tasks with a time limit are due.

A task of a job with a time limit is sent to an idle worker and nothing is sent behind it (``SoloJob``), so its time is
known: it begins when it is sent. Sent ahead, it would begin at the result before it, which may be read late, or be a
result that its worker keeps for a moment to send it with others; a limit must not depend on that.
"""

from __future__ import annotations

import heapq
from typing import Protocol

from tpool.task import Task

__all__ = ["Deadlines"]


class Holder(Protocol):
    """A worker, as far as it matters here."""

    due: float | None

    def runs(self, task: Task) -> bool:
        """Whether it holds this task and no other before it."""


class Deadlines:
    """The running tasks that have a time limit.

    Attributes:
        pending: a heap of (due, number, worker, task). Once its worker has answered the task an entry is stale, and
            thrown away when it is met: finishing a task costs nothing here.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[float, int, Holder, Task]] = []
        self._count = 0  # so that no two entries compare their workers

    def begin(self, worker: Holder, task: Task, due: float) -> None:
        """The task was sent to this idle worker and must be answered by then."""
        worker.due = due
        self._count += 1
        heapq.heappush(self.pending, (due, self._count, worker, task))

    def next(self) -> float | None:
        """When the first task is due; None if there is none."""
        pending = self.pending
        while pending:
            due, _, worker, task = pending[0]
            if worker.due == due and worker.runs(task):
                return due
            heapq.heappop(pending)
        return None

    def pop_due(self, now: float) -> Holder | None:
        """A worker whose task has run out of time; None if there is none (any more)."""
        due = self.next()
        return heapq.heappop(self.pending)[2] if due is not None and due <= now else None
