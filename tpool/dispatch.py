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
4. A worker that is leaving, as the pool shrinks, is sent nothing.
5. After :meth:`Dispatcher.dispatch` a worker is idle only if nothing is queued; after :meth:`Dispatcher.recall` none
   has sat on unstarted tasks for RECALL_SECONDS while one is idle, or its recall is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from tpool.deadlines import Deadlines
from tpool.messages import Action, LendWorker, RecallTasks, RetireWorker, SendTasks
from tpool.roster import AHEAD_SECONDS, MAX_BATCH, Job, SoloJob, Worker, WorkerState
from tpool.task import Task

__all__ = ["AHEAD_SECONDS", "MAX_BATCH", "RECALL_SECONDS", "Dispatcher"]

RECALL_SECONDS = 3e-3
"""How long a worker may sit on unstarted tasks, without a result, while another one is idle. Longer: they wait longer.
Shorter: tasks that were about to run anyway are moved around, at the price of a few messages."""


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
        deadlines: of the tasks with a time limit.
    """

    def __init__(self, max_tasks: int | None) -> None:
        self.now = 0.0
        self.out: list[Action] = []
        self.idle: dict[Worker, None] = {}
        self.deadlines = Deadlines()
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
        job.waiting += sum([task.count for task in tasks])

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
        job.waiting += sum([task.count for task in tasks])

    def take_queue(self, job: Job) -> list[Task]:
        """Empty a job's queue and give what was in it."""
        tasks = list(job.queued)
        if tasks:
            self._ring.remove(job)
            job.queued.clear()
            job.waiting = 0
        return tasks

    # Workers ------------------------------------------------------------------------------------------------------

    def place(self, worker: Worker) -> None:
        """Put a worker into the sets where it belongs, after its state or what it holds has changed."""
        if worker.state is not WorkerState.READY:
            return
        if worker.leaving:
            self.withdraw(worker)
            if not worker.held:
                self.retire(worker)
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
        if worker.load < 2 or worker.recalled:
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

    @property
    def has_queued(self) -> bool:
        """Whether any job has queued tasks."""
        return bool(self._ring)

    @property
    def can_lend(self) -> bool:
        """Whether a worker is idle that may be lent: one whose tasks need not be counted."""
        return bool(self.idle) and self._max_tasks is None

    def lend(self) -> None:
        """Lend an idle worker: the one that would be sent something next."""
        worker = next(reversed(self.idle))
        self.withdraw(worker)
        worker.state = WorkerState.LENT
        self.out.append(LendWorker(worker.id))

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
        if job is None or worker.load > job.want // 2:
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
        count = min(job.portion, -(-job.waiting // (2 * live_workers)))
        if self._max_tasks is not None:
            tasks = self._take_weighed(worker, queued, count, self._max_tasks)
            count = len(tasks)
        elif job.waiting == len(queued):
            tasks = [queued.popleft() for _ in range(count)]
        else:
            tasks = self._take_spans(queued, count)
        job.waiting -= count
        if queued:
            ring.append(job)
        if not worker.held:
            worker.progress_at = self.now
        worker.held.extend(tasks)
        worker.load += count
        worker.sent += count
        worker.last_job = job
        if job.timeout is not None:
            self.deadlines.begin(worker, tasks[0], self.now + job.timeout)
        worker.recalled = False
        self.out.append(SendTasks(worker.id, tasks))
        self.place(worker)

    @staticmethod
    def _take_spans(queued: deque[Task], count: int) -> list[Task]:
        tasks: list[Task] = []
        while count:
            task = queued[0].cut(count) if queued[0].count > count else queued.popleft()
            tasks.append(task)
            count -= task.count
        return tasks

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
        self.ask_back(worker)
        self._asked = worker
        return None

    def ask_back(self, worker: Worker) -> None:
        """Take back what a worker has not started."""
        self.withdraw(worker)
        worker.state = WorkerState.ASKED
        self.out.append(RecallTasks(worker.id))

    def take_recalled(self, worker: Worker, count: int) -> list[Task]:
        """Take from a worker what was recalled, and give it."""
        if worker is self._asked:
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
            assert job.waiting == sum(task.count for task in job.queued)
        assert all(worker.load == sum(task.count for task in worker.held) for worker in workers)
        assert not any(worker.leaving for worker in [*self.idle, *self._hungry]), "who leaves may be sent something"
        assert len(self._ring) == len(set(self._ring)), "a job has two turns"
        assert set(self._ring) == {job for job in jobs if job.queued}
        ready = [worker for worker in workers if worker.state is WorkerState.READY]
        assert set(self.idle) == {worker for worker in ready if not worker.held}
        assert set(self._hungry) <= {worker for worker in ready if worker.held}
        assert set(self._loaded) == {worker for worker in ready if worker.load > 1 and not worker.recalled}
        assert list(self._loaded.values()) == sorted(self._loaded.values()), "_loaded is out of order"
        assert self._asked is None or self._asked.state is WorkerState.ASKED
        solo = [worker for worker in workers if worker.held and isinstance(worker.last_job, SoloJob)]
        assert all(worker.load == 1 for worker in solo), "something was sent with a task that has a time limit"
        due = [worker.due for worker in solo if worker.due is not None]
        assert self.deadlines.next() == min(due, default=None), "a deadline is forgotten"
        assert not self.idle or not self._ring, "a task waits while a worker is idle"
        if self._max_tasks is not None:
            assert all(worker.given < self._max_tasks for worker in self.idle), "a worker is due to retire"
