"""The task scheduler: decides what is to be done, and does nothing itself.

Events (what happened) go in, actions (what to do) come out. There is no I/O, no clock and no thread here, so that
every rule can be shown by an example of events and actions, and all of them together by a property test::

    pool, feeder ─► JobOpened, TasksSubmitted, JobSealed, … ─┐               ┌─► ResolveTasks, FinishJob, … ─► results
                                                             ├─► handle() ─► ┤
    engine ──────► WorkerBecameReady, TasksFinished, … ──────┘               └─► StartWorker, SendTasks, … ──► engine

This module keeps the lives of workers, from the first to the last; the places that they are in, and how many there
are, are in ``slots.py``, the jobs in ``jobs.py``, and which worker is sent which task is ``dispatch.py``'s. A worker
goes one way, and may be recalled from on it::

    STARTING ─ready─► READY ─RetireWorker─► RETIRING ─exited─► (gone; the next worker takes its slot)
                      │  ▲
          RecallTasks ▼  │ nothing was taken back, or RecallSettled
                     ASKED ─TasksRecalled─► SETTLING

    READY, while nothing is queued ─LendWorker─► LENT ─WorkerReturned─► READY

    any state ─KillWorker─► KILLED ─exited─► (gone)

Invariants (:meth:`Scheduler.check`; the property test checks the same from outside):

1. A task is queued in its job or held by one worker, and ``job.unresolved`` counts just those. Whatever takes a task
   out of there says its outcome once: ResolveTasks, FailTask or DropTask.
2. A job is in the book until FinishJob; see ``jobs.py``.
3. While the pool needs workers there is one in each slot that it keeps, which are as many as were last asked for.
   There are more workers only while a pool that was made smaller waits for tasks that run: those are sent nothing.
4. Once the pool is over (closed and without jobs, or stopped) nothing starts, nothing is sent, and EndPool is said
   when the last worker is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tpool.dispatch import Dispatcher
from tpool.errors import ProtocolError
from tpool.jobs import JobBook
from tpool.killing import Killer
from tpool.messages import (
    Action,
    AnswerCancel,
    EndPool,
    Event,
    FailTask,
    InitializerFailed,
    JobCancelled,
    JobOpened,
    JobSealed,
    JobSubmitted,
    JobWithdrawn,
    LoanWanted,
    PoolClosed,
    PoolTerminated,
    RecallSettled,
    Resized,
    ResolveRun,
    ResolveTasks,
    RunFinished,
    TaskFaltered,
    TasksFinished,
    TasksRecalled,
    TasksSubmitted,
    TimePassed,
    WorkerBecameReady,
    WorkerExited,
    WorkerReturned,
)
from tpool.roster import Worker, WorkerState
from tpool.slots import Slots
from tpool.task import JobId

__all__ = ["MAX_START_FAILURES", "START_GRACE_SECONDS", "Scheduler"]

MAX_START_FAILURES = 3
"""How many workers in a row may be lost before they became ready until the pool gives up. More: a pool that cannot
work takes longer to say so. Fewer: a worker killed by chance while it starts ends the pool."""

START_GRACE_SECONDS = 10.0
"""How long a closed pool without work waits for workers that still start: a program may count on its initializer
having run in each, as in the standard library; one that hangs must not hold up the end for ever. 0 without one."""


class Scheduler:
    """The pure state machine of one pool. All its methods belong to the handler's thread.

    A raised :class:`~tpool.errors.ProtocolError` blames the worker that the event came from, AssertionError blames us;
    in both cases the event has changed nothing.

    Args:
        processes: how many workers the pool has at first.
        max_tasks: how many calls a worker may run until it is replaced; None for any number. No task may weigh more or
            be a span.
        grace: in seconds; see START_GRACE_SECONDS.

    Attributes:
        wake_at: when (as ``now`` counts) TimePassed should be said next; None while there is nothing to wait for.
    """

    def __init__(self, processes: int, max_tasks: int | None = None, grace: float = START_GRACE_SECONDS) -> None:
        self.wake_at: float | None = None
        self._dispatcher = Dispatcher(max_tasks)
        self._slots = Slots(processes, self._dispatcher)
        self._workers = self._slots.workers
        self._start_failures = 0  # in a row
        self._book = JobBook(self._dispatcher)
        self._killer = Killer(self._dispatcher, self._book)
        self._closed = False
        self._stopped = False  # by PoolTerminated or an error; the next two tell why
        self._cause: Any = None
        self._error: Any = None
        self._ended = False
        self._grace, self._grace_ends = grace, float("inf")  # the latter is known once the pool is over
        self._awaits_start = False
        self._out: list[Action] = []

    def begin(self) -> list[Action]:
        """Give the first actions: a worker for each slot. Called once, before any event."""
        assert not self._slots.used, "begin() was called twice"
        self._dispatcher.out = self._out = []
        self._slots.start_all()
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
        if dispatcher.deadlines.pending:
            self._killer.expire()
        dispatcher.dispatch(len(self._workers))
        if self._is_over():
            self._wind_up()
        self.wake_at = self._grace_ends if self._awaits_start else dispatcher.recall()
        if dispatcher.deadlines.pending:
            due = dispatcher.deadlines.next()
            self.wake_at = due if self.wake_at is None or (due is not None and due < self.wake_at) else self.wake_at
        return out

    # Jobs ---------------------------------------------------------------------------------------------------------

    def _job_opened(self, event: JobOpened | JobSubmitted) -> None:
        if self._closed and not self._stopped:
            raise AssertionError(f"job {event.job} was opened after the pool was closed")
        self._book.open(event.job, event.batch, event.rules)

    def _job_submitted(self, event: JobSubmitted) -> None:
        self._job_opened(event)
        self._tasks_submitted(event)
        self._job_sealed(event)

    def _tasks_submitted(self, event: TasksSubmitted | JobSubmitted) -> None:
        if self._stopped:
            self._book.refuse(event.job, event.tasks, self._cause)
        else:
            self._book.add(event.job, event.tasks)

    def _job_sealed(self, event: JobSealed | JobSubmitted) -> None:
        self._book.seal(event.job)

    def _job_cancelled(self, event: JobCancelled) -> None:
        job = self._book.get(event.job)
        # Legal, if None: it was finished while the caller made up their mind.
        dropped = job is not None and self._book.cancel(job)
        if job is not None and event.kill:
            dropped = self._killer.doom(job, self._workers.values()) or dropped
        if event.asker is not None:
            self._out.append(AnswerCancel(event.asker, dropped))

    def _job_withdrawn(self, event: JobWithdrawn) -> None:
        self._book.withdraw(event.job)

    @property
    def workers(self) -> list[Worker]:
        """Those there are, as they are now; any thread may read it."""
        return list(self._workers.values())

    def has_started(self, job_id: JobId) -> bool:
        """Whether a worker holds a task of this job. Any thread may ask; a moment later it may be otherwise."""
        job = self._book.get(job_id)
        return job is not None and job.unresolved > job.waiting

    # Workers ------------------------------------------------------------------------------------------------------

    def _worker_became_ready(self, event: WorkerBecameReady) -> None:
        worker = self._slots.get(event.worker, "became ready")
        if worker.state is WorkerState.KILLED:
            return  # Legal: it said so before the kill reached it.
        if worker.state is not WorkerState.STARTING:
            raise ProtocolError(f"worker {worker.id} became ready in state {worker.state.name}")
        worker.state = WorkerState.READY
        self._start_failures = 0
        self._dispatcher.place(worker)

    @property
    def wants_workers(self) -> bool:
        """Whether lent workers are needed back: something is queued that nobody is idle for, or they are to leave."""
        return self._dispatcher.has_queued or self._is_over() or self._slots.awaits_lent

    @property
    def can_lend(self) -> bool:
        """Whether there is a worker for LoanWanted."""
        return self._dispatcher.can_lend

    def _loan_wanted(self, event: LoanWanted) -> None:
        if self._dispatcher.can_lend and not self._is_over():
            self._dispatcher.lend()

    def _worker_returned(self, event: WorkerReturned) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.state is WorkerState.KILLED:
            return  # Legal: its exit, or the end of the pool, came in between.
        assert worker.state is WorkerState.LENT, f"worker {worker.id} was returned in state {worker.state.name}"
        worker.state = WorkerState.READY
        self._dispatcher.place(worker)

    def _initializer_failed(self, event: InitializerFailed) -> None:
        worker = self._slots.get(event.worker, "failed to initialize")
        if worker.state is WorkerState.KILLED:
            return  # Legal: it said so before the kill reached it.
        if worker.state is not WorkerState.STARTING:
            raise ProtocolError(f"worker {worker.id} failed to initialize in state {worker.state.name}")
        self._stop(cause=event.error, error=event.error)

    def _tasks_finished(self, event: TasksFinished) -> None:
        worker = self._slots.get(event.worker, "sent results")
        if worker.state is WorkerState.KILLED:
            return  # Legal: its tasks have failed already.
        outcomes, runs = worker.match(event.results)
        worker.pop_first(len(outcomes))
        self._out.append(ResolveTasks(outcomes))
        for job_id, count, seconds in runs:
            self._book.note_answers(job_id, count, seconds)
        self._note_progress(worker)

    def _run_finished(self, event: RunFinished) -> None:
        worker = self._slots.get(event.worker, "sent results")
        if worker.state is WorkerState.KILLED:
            return  # Legal: its tasks have failed already.
        worker.check_run(event.job, event.index, count := len(event.results))
        worker.pop_first(count)
        self._out.append(ResolveRun(event.job, event.index, event.results))
        self._book.note_answers(event.job, count, event.seconds)
        self._note_progress(worker)

    def _task_faltered(self, event: TaskFaltered) -> None:
        worker = self._slots.get(event.worker, "sent a result")
        if worker.state is WorkerState.KILLED:
            return  # Legal: its tasks have failed already.
        outcomes, _ = worker.match([(event.job, event.index, event.result, event.seconds)])
        worker.pop_first(1)
        if not self._book.try_again(outcomes[0][0], None):
            self._out.append(ResolveTasks(outcomes))
            self._book.leave_unresolved([outcomes[0][0]])
        self._note_progress(worker)

    def _note_progress(self, worker: Worker) -> None:
        self._dispatcher.note_progress(worker)
        if worker in self._killer.condemned:
            self._killer.judge(worker)

    def _tasks_recalled(self, event: TasksRecalled) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.state is WorkerState.KILLED:
            return  # Legal: its exit, or the end of the pool, came in between.
        if worker.state is not WorkerState.ASKED or not 0 <= event.count <= worker.load:
            story = f"{event.count} tasks were recalled, but it is {worker.state.name} and holds {worker.load}"
            raise ProtocolError(f"worker {worker.id}: {story}")
        self._book.put_back(self._dispatcher.take_recalled(worker, event.count))
        if worker in self._killer.condemned:
            self._killer.judge(worker)

    def _recall_settled(self, event: RecallSettled) -> None:
        worker = self._workers.get(event.worker)
        if worker is None or worker.state is WorkerState.KILLED:
            return  # Legal: its exit, or the end of the pool, came in between.
        if worker.state is not WorkerState.SETTLING:
            raise ProtocolError(f"worker {worker.id} settled a recall in state {worker.state.name}")
        worker.state = WorkerState.READY
        self._dispatcher.place(worker)

    def _worker_exited(self, event: WorkerExited) -> None:
        worker = self._slots.get(event.worker, "exited")
        if worker.state is not WorkerState.KILLED:  # Else its tasks have failed already, and nobody takes its place.
            count = event.unstarted + worker.sent - event.sent
            if not 0 <= event.unstarted <= count <= worker.load:
                story = f"exited with {event.unstarted} of {event.sent} tasks unstarted, but it held {worker.load}"
                raise ProtocolError(f"worker {worker.id} {story} of {worker.sent}")
            unstarted = worker.pop_last(count)
            # The clock of a task with a time limit stands still.
            for task in [item for held in worker.pop_all() for item in held.items()]:
                self._book.fail(task, event.cause, self._book[task.job].rules.retry_lost)
            self._book.put_back(unstarted)
        self._slots.remove(worker)
        self._killer.condemned.pop(worker, None)
        if worker.state is WorkerState.STARTING:
            self._start_failures += 1
            if self._start_failures >= MAX_START_FAILURES:
                self._stop(cause=event.cause, error=event.cause)
        if not self._is_over():
            self._slots.refill(worker.slot)

    def _resized(self, event: Resized) -> None:
        if not self._is_over():  # Legal: the pool came to its end while the caller made up their mind.
            self._slots.resize(event.processes)

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
            self._out.extend(FailTask(item, cause) for task in worker.pop_all() for item in task.items())
            self._killer.kill(worker)
        self._book.fail_all(cause)

    def _is_over(self) -> bool:
        return self._stopped or (self._closed and not self._book)

    def _wind_up(self) -> None:
        """Send the workers home, and end the pool when the last one has gone."""
        for worker in list(self._dispatcher.idle):
            self._dispatcher.retire(worker)
        now = self._dispatcher.now
        self._grace_ends = min(self._grace_ends, now + self._grace)
        starting = [worker for worker in self._workers.values() if worker.state is WorkerState.STARTING]
        self._awaits_start = bool(starting) and now < self._grace_ends
        if not self._awaits_start:
            for worker in starting:
                self._killer.kill(worker)
        if not self._workers and not self._ended:
            self._ended = True
            self._out.append(EndPool(self._error))

    _HANDLERS: ClassVar[dict[type[Any], Callable[..., None]]] = {
        JobOpened: _job_opened,
        JobSubmitted: _job_submitted,
        TasksSubmitted: _tasks_submitted,
        JobSealed: _job_sealed,
        JobCancelled: _job_cancelled,
        JobWithdrawn: _job_withdrawn,
        WorkerBecameReady: _worker_became_ready,
        InitializerFailed: _initializer_failed,
        LoanWanted: _loan_wanted,
        WorkerReturned: _worker_returned,
        TasksFinished: _tasks_finished,
        RunFinished: _run_finished,
        TaskFaltered: _task_faltered,
        TasksRecalled: _tasks_recalled,
        RecallSettled: _recall_settled,
        WorkerExited: _worker_exited,
        Resized: _resized,
        PoolClosed: _pool_closed,
        PoolTerminated: _pool_terminated,
        TimePassed: _time_passed,
    }

    # The invariants -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants told at the top of this module and of ``dispatch.py``. For tests."""
        workers, jobs = self._workers.values(), self._book.jobs()
        self._dispatcher.check(workers, jobs)
        held = [task for worker in workers for task in worker.held]
        self._book.check(held)
        if self._is_over():
            slots = [worker.slot for worker in workers]
            assert len(set(slots)) == len(slots), "two workers share a slot"
            assert not held, "the pool is over, but a task has no outcome"
            assert not any(job.queued for job in jobs), "the pool is over, but a task has no outcome"
            assert self._ended == (not workers)
        else:
            self._slots.check()
