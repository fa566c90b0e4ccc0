"""Jobs and workers as the scheduler knows them, and what is learned about the tasks of a job."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tpool.errors import ProtocolError
from tpool.task import JobId, Rules, Slot, Task, WorkerId

__all__ = ["AHEAD_SECONDS", "MAX_BATCH", "Job", "SoloJob", "Worker", "WorkerState"]

NO_RULES = Rules()

AHEAD_SECONDS = 2e-3
"""How much work a worker may hold. More: a message costs less per task. Less: a long task holds back less, and jobs
take turns faster. A round trip is about 0.1 ms, so with 2 ms the wait for the next message is well hidden."""

MAX_BATCH = 512
"""The most tasks that a worker may hold where it is sent ahead; they come in two messages. More: no gain, as the
cost of a message is spread over enough tasks already. Less: that cost shows in tasks of a few microseconds; in 200,000
no-ops workers ran out of tasks 1,300 times with 256, 800 times with 512."""

LEARNING_RATE = 0.5
"""The weight of the newest message in a job's mean task time. Higher: one odd message counts for too much. Lower:
after a slow first task (imports, caches) it takes longer to see that the rest is fast: as it is, ten messages for a
factor 1000."""


class WorkerState(enum.Enum):
    """Where a worker is on its way; see the drawing in ``scheduler.py``."""

    STARTING = enum.auto()
    READY = enum.auto()
    LENT = enum.auto()
    ASKED = enum.auto()
    SETTLING = enum.auto()
    RETIRING = enum.auto()
    KILLED = enum.auto()


@dataclass(slots=True, eq=False)
class Job:
    """A job, its queue, and what was learned about its tasks.

    Attributes:
        id: its name in events and actions.
        portion: the most tasks in one message; at first the caller's hint.
        want: how many tasks a worker should hold; with 1, as at first, none are sent ahead.
        seconds: the mean time of a task, None before the first result.
        queued: its tasks that no worker holds.
        waiting: how many these are, each item of a span counted.
        unresolved: how many of its tasks are queued or held.
        sealed: no more tasks will join it.
        cancelled: nobody waits for it.
        doomed: nor may it run on.
        rules: what its caller asked for.
        timeout: of the rules; how many seconds a task may run.
    """

    id: JobId
    portion: int
    want: int = 1
    seconds: float | None = None
    queued: deque[Task] = field(default_factory=deque)
    waiting: int = 0
    unresolved: int = 0
    sealed: bool = False
    cancelled: bool = False
    doomed: bool = False
    rules: Rules = NO_RULES
    timeout: float | None = None

    def learn(self, seconds: float) -> None:
        """Take the mean task time of one message into account."""
        known = self.seconds
        self.seconds = mean = seconds if known is None else known + (seconds - known) * LEARNING_RATE
        self.want = MAX_BATCH if mean * MAX_BATCH <= AHEAD_SECONDS else max(1, int(AHEAD_SECONDS / mean))
        # Half of it, so that the next message is on its way while this one is worked on.
        self.portion = max(1, self.want // 2)


class SoloJob(Job):
    """A job whose tasks have a time limit: neither sent ahead nor packed, and nothing is sent behind them."""

    __slots__ = ()

    def learn(self, seconds: float) -> None:
        """See Job: the portion stays 1, whatever the time."""
        self.seconds = seconds


@dataclass(slots=True, eq=False)
class Worker:
    """A worker and what it holds.

    Attributes:
        id: its name in events and actions.
        slot: its place in the pool.
        state: where it is on its way.
        held: the tasks it was sent and has not answered, in that order.
        load: how many these are, each item of a span counted.
        sent: how many tasks it was sent, whatever became of them.
        given: the weight of all the tasks it was sent, less what came back unstarted.
        last_job: the job of what it was sent last; None before that.
        recalled: what it holds was all started, as the rest was recalled; until it is sent something.
        progress_at: when it was last heard of: its last result, or the message that ended its idleness.
        leaving: the pool shrinks, and it is sent nothing more.
        due: when the last task with a time limit that it was sent has to be answered; None before that.
    """

    id: WorkerId
    slot: Slot
    state: WorkerState = WorkerState.STARTING
    held: deque[Task] = field(default_factory=deque)
    load: int = 0
    sent: int = 0
    given: int = 0
    last_job: Job | None = None
    recalled: bool = False
    leaving: bool = False
    progress_at: float = 0.0
    due: float | None = None

    def runs(self, task: Task) -> bool:
        """Whether it holds this task and no other before it."""
        return bool(self.held) and self.held[0] is task

    def pop_all(self) -> list[Task]:
        """Take everything away that it holds."""
        tasks = list(self.held)
        self.held.clear()
        self.load = 0
        return tasks

    def pop_first(self, count: int) -> None:
        """Forget the first tasks: they have their outcomes."""
        held = self.held
        self.load -= count
        if not self.load:
            held.clear()
            return
        while count:
            first = held[0]
            if first.count > count:
                first.cut(count)
                return
            count -= first.count
            held.popleft()

    def pop_last(self, count: int) -> list[Task]:
        """Take away the last tasks, which it never started, and give them in order."""
        held = self.held
        self.load -= count
        tasks: list[Task] = []
        while count:
            last = held.pop()
            if last.count > count:
                held.append(last.cut(last.count - count))
            tasks.append(last)
            count -= last.count
        tasks.reverse()
        self.given -= sum(task.weight for task in tasks)
        return tasks

    def check_run(self, job: JobId, index: int, count: int) -> None:
        """Whether the first tasks that it holds are these.

        Raises:
            ProtocolError: they are not.
        """
        if not 0 < count <= self.load:
            story = f"sent {count} results, but it is {self.state.name} and holds {self.load} tasks"
            raise ProtocolError(f"worker {self.id} {story}")
        end = index + count
        for task in self.held:
            if index >= end:
                return
            if task.index != index or task.job != job:
                story = f"answered task {index} of job {job}, but task {task.index} of job {task.job} was next"
                raise ProtocolError(f"worker {self.id} {story}")
            index += task.count

    def match(
        self, results: list[tuple[JobId, int, Any, float]]
    ) -> tuple[list[tuple[Task, Any]], list[tuple[JobId, int, float]]]:
        """Pair results with the tasks at the front of what it holds; nothing is changed.

        Returns:
            The (task, result) pairs; and for each stretch of results of one job: the job, their number, their seconds.
        """
        outcomes: list[tuple[Task, Any]] = []
        runs: list[tuple[JobId, int, float]] = []
        current, start, seconds_sum = None, 0, 0.0
        held = self.held if self.load == len(self.held) else self._singly()
        for task, (job, index, result, seconds) in zip(held, results, strict=False):
            if task.index != index or task.job != job:
                story = f"answered task {index} of job {job}, but task {task.index} of job {task.job} was next"
                raise ProtocolError(f"worker {self.id} {story}")
            if job != current:
                if current is not None:
                    runs.append((current, len(outcomes) - start, seconds_sum))
                current, start, seconds_sum = job, len(outcomes), 0.0
            seconds_sum += seconds
            outcomes.append((task, result))
        if len(outcomes) < len(results) or current is None:
            story = f"sent {len(results)} results, but it is {self.state.name} and holds {self.load} tasks"
            raise ProtocolError(f"worker {self.id} {story}")
        runs.append((current, len(outcomes) - start, seconds_sum))
        return outcomes, runs

    def _singly(self) -> Iterator[Task]:
        """What it holds, with each item of a span as a task; nothing is changed."""
        for task in self.held:
            yield from task.singly()
