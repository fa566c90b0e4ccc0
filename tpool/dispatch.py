"""Who is sent which tasks: the queues, the turns, and how far ahead.

Sending ahead. A worker that waits for its next task wastes a round trip; a task that waits behind a long one wastes
much more. So a job learns how long its tasks take, and a worker holds about AHEAD_SECONDS of work: many tasks of
microseconds in two messages, one task of milliseconds and none behind it. At the tail of a job the messages shrink, so
that the workers finish together. Where the guess was wrong (one task is long after many short ones), the tasks behind
it are recalled as soon as somebody is idle.

Cost. Nothing here looks at all workers or at all jobs: who may be sent something stands in ``idle`` or ``_hungry``,
and the jobs with queued tasks stand in ``_ring``. (With ``max_tasks`` a job may be passed over; only then is there a
search.)

Invariants (:meth:`Dispatcher.check`):

1. A job's queue is in order of index, also after tasks came back: within a job tasks are sent in order.
2. The ring has just the jobs with queued tasks, each once.
3. Only a READY worker is in ``idle``, ``_hungry`` or ``_loaded``, and only those are sent to, recalled from or
   retired.
4. After :meth:`Dispatcher.dispatch` a worker is idle only if nothing is queued; after :meth:`Dispatcher.recall` none
   has sat on unstarted tasks for RECALL_SECONDS while one is idle, or its recall is under way.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tpool.errors import ProtocolError
from tpool.messages import Action, JobId, RecallTasks, RetireWorker, SendTasks, Slot, Task, WorkerId

__all__ = ["AHEAD_SECONDS", "MAX_BATCH", "RECALL_SECONDS", "Dispatcher", "Job", "Worker", "WorkerState"]

AHEAD_SECONDS = 2e-3
"""How much work a worker may hold. More: a message costs less per task. Less: a long task holds back less, and jobs
take turns faster. A round trip is about 0.1 ms, so with 2 ms the wait for the next message is well hidden."""

MAX_BATCH = 256
"""The most tasks that a worker may hold where it is sent ahead; they come in two messages. More: no gain, as the
cost of a message is spread over enough tasks already. Less: that cost shows in tasks of a few microseconds."""

RECALL_SECONDS = 3e-3
"""How long a worker may sit on unstarted tasks, without a result, while another one is idle. Longer: they wait longer.
Shorter: tasks that were about to run anyway are moved around, at the price of a few messages."""

LEARNING_RATE = 0.5
"""The weight of the newest message in a job's mean task time. Higher: one odd message counts for too much. Lower:
after a slow first task (imports, caches) it takes longer to see that the rest is fast: as it is, ten messages for a
factor 1000."""


class WorkerState(enum.Enum):
    """Where a worker is on its way; see the drawing in ``scheduler.py``."""

    STARTING = enum.auto()
    READY = enum.auto()
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
        unresolved: how many of its tasks are queued or held.
        sealed: no more tasks will join it.
        cancelled: nobody waits for it.
    """

    id: JobId
    portion: int
    want: int = 1
    seconds: float | None = None
    queued: deque[Task] = field(default_factory=deque)
    unresolved: int = 0
    sealed: bool = False
    cancelled: bool = False

    def learn(self, seconds: float) -> None:
        """Take the mean task time of one message into account."""
        known = self.seconds
        self.seconds = mean = seconds if known is None else known + (seconds - known) * LEARNING_RATE
        self.want = MAX_BATCH if mean * MAX_BATCH <= AHEAD_SECONDS else max(1, int(AHEAD_SECONDS / mean))
        # Half of it, so that the next message is on its way while this one is worked on.
        self.portion = max(1, self.want // 2)


@dataclass(slots=True, eq=False)
class Worker:
    """A worker and what it holds.

    Attributes:
        id: its name in events and actions.
        slot: its place in the pool.
        state: where it is on its way.
        held: the tasks it was sent and has not answered, in that order.
        given: the weight of all the tasks it was sent, less what came back unstarted.
        last_job: the job of what it was sent last; None before that.
        recalled: what it holds was all started, as the rest was recalled; until it is sent something.
        progress_at: when it was last heard of: its last result, or the message that ended its idleness.
    """

    id: WorkerId
    slot: Slot
    state: WorkerState = WorkerState.STARTING
    held: deque[Task] = field(default_factory=deque)
    given: int = 0
    last_job: Job | None = None
    recalled: bool = False
    progress_at: float = 0.0

    def pop_last(self, count: int) -> list[Task]:
        """Take away the last tasks, which it never started, and give them in order."""
        tasks = [self.held.pop() for _ in range(count)]
        tasks.reverse()
        self.given -= sum(task.weight for task in tasks)
        return tasks

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
        for task, (job, index, result, seconds) in zip(self.held, results, strict=False):
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
            story = f"sent {len(results)} results, but it is {self.state.name} and holds {len(self.held)} tasks"
            raise ProtocolError(f"worker {self.id} {story}")
        runs.append((current, len(outcomes) - start, seconds_sum))
        return outcomes, runs


class Dispatcher:
    """The queues of all jobs and the workers that may be sent something.

    The scheduler tells it what has changed, then calls :meth:`dispatch` and :meth:`recall`.

    Args:
        max_tasks: how much weight a worker may be given in its life; None for any.

    Attributes:
        now: the time of the current event, set by the scheduler.
        out: where the actions go that answer the current event, set by the scheduler.
        idle: an ordered set of the workers that hold nothing. Last in, first out: who worked last has the warmest
            caches.
    """

    def __init__(self, max_tasks: int | None) -> None:
        self.now = 0.0
        self.out: list[Action] = []
        self.idle: dict[Worker, None] = {}
        self._max_tasks = max_tasks
        self._ring: deque[Job] = deque()  # the next to send first
        self._hungry: dict[Worker, None] = {}  # an ordered set: hold little enough to be sent more
        # Hold unstarted tasks (two or more, of which one may run), and since when without a result; the longest first.
        self._loaded: dict[Worker, float] = {}
        # One recall at a time: what it brings back may be enough for all who are idle.
        self._asked: Worker | None = None

    # Queues -------------------------------------------------------------------------------------------------------

    def enqueue(self, job: Job, tasks: list[Task]) -> None:
        """Put new tasks at the end of a job's queue."""
        if tasks and not job.queued:
            self._ring.append(job)
        job.queued.extend(tasks)

    def put_back(self, job: Job, tasks: list[Task]) -> None:
        """Put tasks that came back in their places in the job's queue."""
        queued = job.queued
        if not queued:
            self._ring.append(job)
        # Only tasks that came back before can belong in front of these. They need not be in order themselves: their
        # worker may have been sent later tasks first, and then earlier ones that had come back from another.
        last = max(task.index for task in tasks)
        returned = list(tasks)
        while queued and queued[0].index < last:
            returned.append(queued.popleft())
        returned.sort(key=lambda task: task.index, reverse=True)
        queued.extendleft(returned)

    def take_queue(self, job: Job) -> list[Task]:
        """Empty a job's queue and give what was in it."""
        tasks = list(job.queued)
        if tasks:
            self._ring.remove(job)
            job.queued.clear()
        return tasks

    # Workers ------------------------------------------------------------------------------------------------------

    def place(self, worker: Worker) -> None:
        """Put a worker into the sets where it belongs, after its state or what it holds has changed."""
        if worker.state is not WorkerState.READY:
            return
        if not worker.held:
            self.withdraw(worker)
            if self._max_tasks is not None and worker.given >= self._max_tasks:
                self.retire(worker)
            else:
                self.idle[worker] = None
            return
        self.idle.pop(worker, None)
        if self._may_be_sent_ahead(worker):
            self._hungry[worker] = None
        else:
            self._hungry.pop(worker, None)
        if len(worker.held) < 2 or worker.recalled:
            self._loaded.pop(worker, None)
        elif worker not in self._loaded:
            self._loaded[worker] = self.now

    def note_progress(self, worker: Worker) -> None:
        """Place a worker that has just sent results."""
        worker.progress_at = self.now
        self._loaded.pop(worker, None)  # to stand last in there
        self.place(worker)

    def withdraw(self, worker: Worker) -> None:
        """Send nothing more to this worker."""
        self.idle.pop(worker, None)
        self._hungry.pop(worker, None)
        self._loaded.pop(worker, None)
        if worker is self._asked:
            self._asked = None

    def retire(self, worker: Worker) -> None:
        """Let a worker go that holds nothing."""
        self.withdraw(worker)
        worker.state = WorkerState.RETIRING
        self.out.append(RetireWorker(worker.id))

    def _may_be_sent_ahead(self, worker: Worker) -> bool:
        """Say whether a busy worker is likely to need more soon.

        What it was sent last tells: tasks that are long or of unknown length go to idle workers and nothing follows
        them. And a worker that was not heard of for a while, as any that was recalled from, sits on a task that is
        longer than we thought.
        """
        job = worker.last_job
        if job is None or len(worker.held) > job.want // 2:
            return False
        return self.now < worker.progress_at + RECALL_SECONDS

    # Sending ------------------------------------------------------------------------------------------------------

    def dispatch(self, live_workers: int) -> None:
        """Send from the queues while there is somebody to send to; one message for each job in turn."""
        while self._ring:
            if self.idle:
                worker = next(reversed(self.idle))
                job = self._next_job(worker)
                if job is None:
                    self.retire(worker)  # It has too little left of max_tasks for any task there is.
                    continue
            # A job that must not be sent ahead is not passed over either, or it would wait for as long as others have
            # something to send: the workers run down until one is idle, which takes AHEAD_SECONDS.
            elif self._hungry and self._ring[0].want > 1:
                worker = next(reversed(self._hungry))
                job = self._next_job(worker)
                if job is None or job.want == 1 or not self._may_be_sent_ahead(worker):
                    del self._hungry[worker]  # Its next result will put it back.
                    continue
            else:
                return
            self._send(worker, job, live_workers)

    def _next_job(self, worker: Worker) -> Job | None:
        """Give the first job in the ring whose next task this worker may still be given.

        A job whose task is too heavy for this one keeps its turn for a fresh worker.
        """
        if self._max_tasks is None or not worker.given:
            return self._ring[0]
        room = self._max_tasks - worker.given
        return next((job for job in self._ring if job.queued[0].weight <= room), None)

    def _send(self, worker: Worker, job: Job, live_workers: int) -> None:
        ring, queued = self._ring, job.queued
        if job is ring[0]:
            ring.popleft()
        else:
            ring.remove(job)
        # The tail: leave enough for two more messages to each worker.
        count = min(job.portion, -(-len(queued) // (2 * live_workers)))
        if self._max_tasks is None:
            tasks = [queued.popleft() for _ in range(count)]
        else:
            tasks = self._take_weighed(worker, queued, count, self._max_tasks)
        if queued:
            ring.append(job)
        if not worker.held:
            worker.progress_at = self.now
        worker.held.extend(tasks)
        worker.last_job = job
        worker.recalled = False
        self.out.append(SendTasks(worker.id, tasks))
        self.place(worker)

    @staticmethod
    def _take_weighed(worker: Worker, queued: deque[Task], count: int, max_tasks: int) -> list[Task]:
        tasks: list[Task] = []
        # _next_job has seen that the first one fits.
        while not tasks or (len(tasks) < count and worker.given + queued[0].weight <= max_tasks):
            tasks.append(queued.popleft())
            worker.given += tasks[-1].weight
        return tasks

    # Recall -------------------------------------------------------------------------------------------------------

    def recall(self) -> float | None:
        """Take back what waits behind a task that turned out long, if somebody has nothing to do.

        Returns:
            When to call this again at the latest; None if there is nothing to wait for.
        """
        if not self.idle or not self._loaded or self._asked is not None:
            return None
        worker, since = next(iter(self._loaded.items()))
        due = since + RECALL_SECONDS
        if self.now < due:
            return due
        self.withdraw(worker)
        worker.state = WorkerState.ASKED
        self._asked = worker
        self.out.append(RecallTasks(worker.id))
        return None

    def take_recalled(self, worker: Worker, count: int) -> list[Task]:
        """Take from a worker what was recalled, and give it."""
        self._asked = None
        tasks = worker.pop_last(count)
        worker.recalled = True
        worker.state = WorkerState.SETTLING if count else WorkerState.READY
        self.place(worker)
        return tasks

    # The invariants -----------------------------------------------------------------------------------------------

    def check(self, workers: Iterable[Worker], jobs: Iterable[Job]) -> None:
        """Assert the invariants told at the top of the module, given all workers and jobs there are. For tests."""
        for job in jobs:
            indices = [task.index for task in job.queued]
            assert indices == sorted(set(indices)), f"the queue of job {job.id} is out of order: {indices}"
        assert len(self._ring) == len(set(self._ring)), "a job has two turns"
        assert set(self._ring) == {job for job in jobs if job.queued}
        ready = [worker for worker in workers if worker.state is WorkerState.READY]
        assert set(self.idle) == {worker for worker in ready if not worker.held}
        assert set(self._hungry) <= {worker for worker in ready if worker.held}
        assert set(self._loaded) == {worker for worker in ready if len(worker.held) > 1 and not worker.recalled}
        assert list(self._loaded.values()) == sorted(self._loaded.values()), "_loaded is out of order"
        asked = [worker for worker in workers if worker.state is WorkerState.ASKED]
        assert asked == ([] if self._asked is None else [self._asked])
        assert not self.idle or not self._ring, "a task waits while a worker is idle"
        if self._max_tasks is not None:
            assert all(worker.given < self._max_tasks for worker in self.idle), "a worker is due to retire"
