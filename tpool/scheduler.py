"""The task scheduler: decides what is to be done, and does nothing itself.

Events (what happened) go in, actions (what to do) come out. There is no I/O, no clock and no thread here, so that
every rule can be shown by an example of events and actions, and all of them together by a property test::

    pool, feeder ─► JobOpened, TasksSubmitted, JobSealed, … ─┐               ┌─► ResolveTasks, FinishJob, … ─► results
                                                             ├─► handle() ─► ┤
    engine ──────► WorkerBecameReady, TasksFinished, … ──────┘               └─► StartWorker, SendTasks, … ──► engine

This module keeps the lives of jobs and workers, from the first to the last; which worker is sent which task is
``dispatch.py``'s. A worker goes one way, and may be recalled from on it::

    STARTING ─ready─► READY ─RetireWorker─► RETIRING ─exited─► (gone; the next worker takes its slot)
                      │  ▲
          RecallTasks ▼  │ nothing was taken back, or RecallSettled
                     ASKED ─TasksRecalled─► SETTLING

    any state ─KillWorker─► KILLED ─exited─► (gone)

Invariants (:meth:`Scheduler.check`; the property test checks the same from outside):

1. A task is queued in its job or held by one worker, and ``job.unresolved`` counts just those. Whatever takes a task
   out of there says its outcome once: ResolveTasks, FailTask or DropTask.
2. A job is in ``_jobs`` until FinishJob, which is said as soon as it is sealed and has nothing unresolved.
3. While the pool needs workers there is one in each slot, and never more.
4. Once the pool is over (closed and without jobs, or stopped) nothing starts, nothing is sent, and EndPool is said
   when the last worker is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from tpool.dispatch import Dispatcher, Job, Worker, WorkerState
from tpool.errors import ProtocolError
from tpool.messages import (
    Action,
    DropTask,
    EndPool,
    Event,
    FailTask,
    FinishJob,
    InitializerFailed,
    JobCancelled,
    JobId,
    JobOpened,
    JobSealed,
    JobSubmitted,
    KillWorker,
    PoolClosed,
    PoolTerminated,
    RecallSettled,
    ResolveTasks,
    Slot,
    StartWorker,
    Task,
    TasksFinished,
    TasksRecalled,
    TasksSubmitted,
    TimePassed,
    WorkerBecameReady,
    WorkerExited,
    WorkerId,
)

__all__ = ["MAX_START_FAILURES", "START_GRACE_SECONDS", "Scheduler"]

MAX_START_FAILURES = 3
"""How many workers in a row may be lost before they became ready until the pool gives up. More: a pool that cannot
work takes longer to say so. Fewer: a worker killed by chance while it starts ends the pool."""

START_GRACE_SECONDS = 10.0
"""How long a closed pool without work waits for workers that are still starting. A program may count on its
initializer having run in each worker, as in the standard library; one that hangs must not hold up the end for ever."""


class Scheduler:
    """The pure state machine of one pool. All its methods belong to the handler's thread.

    A raised :class:`~tpool.errors.ProtocolError` blames the worker that the event came from, AssertionError blames us;
    in both cases the event has changed nothing.

    Args:
        processes: how many workers the pool has.
        max_tasks: how many calls a worker may run until it is replaced; None for any number. No task may weigh more.

    Attributes:
        wake_at: when (as ``now`` counts) TimePassed should be said next; None while there is nothing to wait for.
    """

    def __init__(self, processes: int, max_tasks: int | None = None) -> None:
        self.wake_at: float | None = None
        self._processes = processes
        self._dispatcher = Dispatcher(max_tasks)
        self._workers: dict[WorkerId, Worker] = {}
        self._next_worker = 0
        self._start_failures = 0  # in a row
        self._jobs: dict[JobId, Job] = {}
        # Cancelled before they were sealed: the feeder may not know yet. It still has to seal them, which ends their
        # stay here, finished or not.
        self._unheeded: set[JobId] = set()
        self._closed = False
        self._stopped = False  # by PoolTerminated or an error; the next two tell why
        self._cause: Any = None
        self._error: Any = None
        self._ended = False
        self._grace_ends: float | None = None  # known once the pool is over
        self._awaits_start = False
        self._out: list[Action] = []

    def begin(self) -> list[Action]:
        """Give the first actions: a worker for each slot. Called once, before any event."""
        assert not self._next_worker, "begin() was called twice"
        self._out = []
        for slot in range(self._processes):
            self._start(Slot(slot))
        return self._out

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take note of an event and say what to do, in this order.

        Args:
            event: what happened.
            now: the time in seconds, of a clock that never goes back.

        Returns:
            The actions, to be carried out in order.

        Raises:
            ProtocolError: the event cannot be true, and its worker must have said something wrong.
        """
        dispatcher = self._dispatcher
        out: list[Action] = []
        self._out = dispatcher.out = out
        dispatcher.now = now
        self._HANDLERS[type(event)](self, event)
        dispatcher.dispatch(len(self._workers))
        if self._is_over():
            self._wind_up()
        self.wake_at = self._grace_ends if self._awaits_start else dispatcher.recall()
        return out

    # Jobs ---------------------------------------------------------------------------------------------------------

    def _job_opened(self, event: JobOpened | JobSubmitted) -> None:
        if event.job in self._jobs:
            raise AssertionError(f"job {event.job} was opened twice")
        if self._closed and not self._stopped:
            raise AssertionError(f"job {event.job} was opened after the pool was closed")
        self._jobs[event.job] = Job(event.job, portion=event.batch)

    def _job_submitted(self, event: JobSubmitted) -> None:
        self._job_opened(event)
        self._tasks_submitted(event)
        self._job_sealed(event)

    def _tasks_submitted(self, event: TasksSubmitted | JobSubmitted) -> None:
        if event.job in self._unheeded:
            self._out.extend(map(DropTask, event.tasks))
            return
        job = self._open_job(event.job, "was given more tasks")
        if self._stopped:
            # Legal: the caller did not know yet. Somebody waits for these.
            self._out.extend(FailTask(task, self._cause) for task in event.tasks)
        else:
            job.unresolved += len(event.tasks)
            self._dispatcher.enqueue(job, event.tasks)

    def _job_sealed(self, event: JobSealed | JobSubmitted) -> None:
        if event.job in self._unheeded:
            self._unheeded.remove(event.job)
            return
        job = self._open_job(event.job, "was sealed")
        job.sealed = True
        self._finish_if_over(job)

    def _open_job(self, job_id: JobId, story: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None or job.sealed:
            raise AssertionError(f"job {job_id} {story}, but it was sealed before or never opened")
        return job

    def _job_cancelled(self, event: JobCancelled) -> None:
        job = self._jobs.get(event.job)
        if job is None or job.cancelled:
            return  # Legal: it was finished or cancelled while the caller made up their mind.
        if not job.sealed:
            self._unheeded.add(job.id)
        job.sealed = job.cancelled = True
        queued = self._dispatcher.take_queue(job)
        self._out.extend(map(DropTask, queued))
        job.unresolved -= len(queued)
        self._finish_if_over(job)

    def _finish_if_over(self, job: Job) -> None:
        if job.sealed and not job.unresolved:
            del self._jobs[job.id]
            self._out.append(FinishJob(job.id))

    # Workers ------------------------------------------------------------------------------------------------------

    def _start(self, slot: Slot) -> None:
        worker = Worker(WorkerId(self._next_worker), slot)
        self._next_worker += 1
        self._workers[worker.id] = worker
        self._out.append(StartWorker(worker.id, slot))

    def _worker(self, worker_id: WorkerId, story: str) -> Worker:
        worker = self._workers.get(worker_id)
        if worker is None:
            raise ProtocolError(f"worker {worker_id} {story}, but it is gone or was never started")
        return worker

    def _worker_became_ready(self, event: WorkerBecameReady) -> None:
        worker = self._worker(event.worker, "became ready")
        if worker.state is WorkerState.KILLED:
            return  # Legal: it said so before the kill reached it.
        if worker.state is not WorkerState.STARTING:
            raise ProtocolError(f"worker {worker.id} became ready in state {worker.state.name}")
        worker.state = WorkerState.READY
        self._start_failures = 0
        self._dispatcher.place(worker)

    def _initializer_failed(self, event: InitializerFailed) -> None:
        worker = self._worker(event.worker, "failed to initialize")
        if worker.state is WorkerState.KILLED:
            return  # Legal: it said so before the kill reached it.
        if worker.state is not WorkerState.STARTING:
            raise ProtocolError(f"worker {worker.id} failed to initialize in state {worker.state.name}")
        self._stop(cause=event.error, error=event.error)

    def _tasks_finished(self, event: TasksFinished) -> None:
        worker = self._worker(event.worker, "sent results")
        if worker.state is WorkerState.KILLED:
            return  # Legal: its tasks have failed already.
        outcomes, runs = worker.match(event.results)
        held = worker.held
        if len(outcomes) == len(held):
            held.clear()
        else:
            for _ in outcomes:
                held.popleft()
        self._out.append(ResolveTasks(outcomes))
        for job_id, count, seconds in runs:
            job = self._jobs[job_id]
            job.unresolved -= count
            job.learn(seconds / count)
            self._finish_if_over(job)
        self._dispatcher.note_progress(worker)

    def _tasks_recalled(self, event: TasksRecalled) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.state is WorkerState.KILLED:
            return  # Legal: its exit, or the end of the pool, came in between.
        if worker.state is not WorkerState.ASKED or not 0 <= event.count <= len(worker.held):
            story = f"{event.count} tasks were recalled, but it is {worker.state.name} and holds {len(worker.held)}"
            raise ProtocolError(f"worker {worker.id}: {story}")
        self._put_back(self._dispatcher.take_recalled(worker, event.count))

    def _recall_settled(self, event: RecallSettled) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.state is WorkerState.KILLED:
            return  # Legal: its exit, or the end of the pool, came in between.
        if worker.state is not WorkerState.SETTLING:
            raise ProtocolError(f"worker {worker.id} settled a recall in state {worker.state.name}")
        worker.state = WorkerState.READY
        self._dispatcher.place(worker)

    def _worker_exited(self, event: WorkerExited) -> None:
        worker = self._worker(event.worker, "exited")
        held = worker.held
        if worker.state is not WorkerState.KILLED:  # Else its tasks have failed already, and nobody takes its place.
            if not 0 <= event.unstarted <= len(held):
                story = f"exited with {event.unstarted} unstarted tasks, but it held {len(held)}"
                raise ProtocolError(f"worker {worker.id} {story}")
            unstarted = worker.pop_last(event.unstarted)
            for task in held:
                task.attempts += 1
                self._out.append(FailTask(task, event.cause))
            self._leave_unresolved(held)
            self._put_back(unstarted)
        del self._workers[worker.id]
        self._dispatcher.withdraw(worker)
        if worker.state is WorkerState.STARTING:
            self._start_failures += 1
            if self._start_failures >= MAX_START_FAILURES:
                self._stop(cause=event.cause, error=event.cause)
        if not self._is_over():
            self._start(worker.slot)

    def _put_back(self, tasks: list[Task]) -> None:
        """Return tasks that never started to the queues, or drop them if nobody waits for them."""
        by_job: dict[JobId, list[Task]] = {}
        for task in tasks:
            by_job.setdefault(task.job, []).append(task)
        for job_id, returned in by_job.items():
            job = self._jobs[job_id]
            if job.cancelled:
                self._out.extend(map(DropTask, returned))
                self._leave_unresolved(returned)
            else:
                self._dispatcher.put_back(job, returned)

    def _leave_unresolved(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            job = self._jobs[task.job]
            job.unresolved -= 1
            self._finish_if_over(job)

    # The end ------------------------------------------------------------------------------------------------------

    def _pool_closed(self, event: PoolClosed) -> None:
        self._closed = True

    def _pool_terminated(self, event: PoolTerminated) -> None:
        if not self._stopped and not self._ended:  # Legal: it may be said twice, or too late.
            self._stop(cause=event.cause, error=None)

    def _time_passed(self, event: TimePassed) -> None:
        """Nothing to note: what is due is looked for after every event."""

    def _stop(self, cause: Any, error: Any) -> None:
        """Fail all that is unresolved and kill all workers. Jobs that are not sealed yet wait until they are."""
        self._stopped, self._cause, self._error = True, cause, error
        for worker in self._workers.values():
            self._out.extend(FailTask(task, cause) for task in worker.held)
            worker.held.clear()
            self._kill(worker)
        for job in list(self._jobs.values()):
            self._out.extend(FailTask(task, cause) for task in self._dispatcher.take_queue(job))
            job.unresolved = 0
            self._finish_if_over(job)

    def _kill(self, worker: Worker) -> None:
        if worker.state is not WorkerState.KILLED:
            self._dispatcher.withdraw(worker)
            worker.state = WorkerState.KILLED
            self._out.append(KillWorker(worker.id))

    def _is_over(self) -> bool:
        return self._stopped or (self._closed and not self._jobs)

    def _wind_up(self) -> None:
        """Send the workers home, and end the pool when the last one has gone."""
        for worker in list(self._dispatcher.idle):
            self._dispatcher.retire(worker)
        now = self._dispatcher.now
        self._grace_ends = now + START_GRACE_SECONDS if self._grace_ends is None else self._grace_ends
        starting = [worker for worker in self._workers.values() if worker.state is WorkerState.STARTING]
        if now < self._grace_ends:
            self._awaits_start = bool(starting)
        else:
            self._awaits_start = False
            for worker in starting:
                self._kill(worker)
        if not self._workers and not self._ended:
            self._ended = True
            self._out.append(EndPool(self._error))

    _HANDLERS: ClassVar[dict[type[Any], Callable[..., None]]] = {
        JobOpened: _job_opened,
        JobSubmitted: _job_submitted,
        TasksSubmitted: _tasks_submitted,
        JobSealed: _job_sealed,
        JobCancelled: _job_cancelled,
        WorkerBecameReady: _worker_became_ready,
        InitializerFailed: _initializer_failed,
        TasksFinished: _tasks_finished,
        TasksRecalled: _tasks_recalled,
        RecallSettled: _recall_settled,
        WorkerExited: _worker_exited,
        PoolClosed: _pool_closed,
        PoolTerminated: _pool_terminated,
        TimePassed: _time_passed,
    }

    # The invariants -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants told at the top of this module and of ``dispatch.py``. For tests."""
        workers, jobs = self._workers.values(), self._jobs.values()
        self._dispatcher.check(workers, jobs)
        places = [task for worker in workers for task in worker.held] + [task for job in jobs for task in job.queued]
        assert len({(task.job, task.index) for task in places}) == len(places), "a task is in two places"
        counts = Counter(task.job for task in places)
        for job in jobs:
            assert counts[job.id] == job.unresolved, f"job {job.id} has {counts[job.id]} tasks, not {job.unresolved}"
            assert job.unresolved or not job.sealed, f"job {job.id} is over, but not finished"
        assert counts.keys() <= self._jobs.keys(), "a task outlived its job"
        slots = sorted(worker.slot for worker in workers)
        if self._is_over():
            assert len(set(slots)) == len(slots), "two workers share a slot"
            assert not places, "the pool is over, but a task has no outcome"
            assert self._ended == (not workers)
        else:
            assert slots == list(range(self._processes)), "not one worker per slot"
