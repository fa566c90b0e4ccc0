"""What is said to the scheduler and what it answers.

Events (past tense) go in, actions (imperative) come out; both are plain data. Nobody but the scheduler and the
handler speaks this language: payloads and results ride along unopened.

Identity: a *slot* is a worker's place in the pool and is kept when the worker is replaced; a *worker* id names one
process and is never used again. A task is named by its job and its index in that job.

Where tasks are counted, each item of a span counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tpool.task import JobId, Rules, Slot, Task, WorkerId

# Events -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class JobOpened:
    """A caller made a job; its tasks follow.

    Attributes:
        job: its name from now on.
        batch: the caller's hint of how many may travel together.
        rules: what the caller asked for its tasks; None for nothing.
    """

    job: JobId
    batch: int = 1
    rules: Rules | None = None


@dataclass(slots=True, eq=False)
class JobSubmitted:
    """A caller made a job of these tasks, and no more will join it: JobOpened, TasksSubmitted and JobSealed in one."""

    job: JobId
    tasks: list[Task]
    batch: int = 1
    rules: Rules | None = None


@dataclass(slots=True, eq=False)
class TasksSubmitted:
    """Tasks joined the end of an open job, in order of index."""

    job: JobId
    tasks: list[Task]


@dataclass(slots=True, eq=False)
class JobSealed:
    """No more tasks will join this job."""

    job: JobId


@dataclass(slots=True, eq=False)
class JobCancelled:
    """Nobody wants the rest of this job: queued tasks are dropped, the job is sealed; running tasks run on.

    Attributes:
        job: which.
        kill: running tasks are dropped, too, and their workers killed.
        asker: whoever waits to hear what came of it, passed on with AnswerCancel; None if nobody does.
    """

    job: JobId
    kill: bool = False
    asker: Any = None


@dataclass(slots=True, eq=False)
class JobWithdrawn:
    """A caller was interrupted while it made a job: nobody wants it, and nothing more will be said of it.

    How much of the job was said is not known; it may never have been opened, or be finished. FinishJob is the answer.
    """

    job: JobId


@dataclass(slots=True, eq=False)
class WorkerBecameReady:
    """A worker ran its initializer and waits for tasks."""

    worker: WorkerId


@dataclass(slots=True, eq=False)
class InitializerFailed:
    """A worker's initializer raised; the worker is about to exit. ``error`` is passed on with EndPool."""

    worker: WorkerId
    error: Any


@dataclass(slots=True, eq=False)
class LoanWanted:
    """A caller would like to talk to a worker directly."""


@dataclass(slots=True, eq=False)
class WorkerReturned:
    """A lent worker is the scheduler's again, and idle."""

    worker: WorkerId


@dataclass(slots=True, eq=False)
class TasksFinished:
    """A worker answered. ``results`` are (job, index, result, seconds the task ran), in the order they were sent."""

    worker: WorkerId
    results: list[tuple[JobId, int, Any, float]]


@dataclass(slots=True, eq=False)
class RunFinished:
    """A worker answered the first tasks and items that it holds: these are of one job and stand behind each other.

    Attributes:
        worker: which.
        job: the job.
        index: of the first of them.
        results: of each.
        seconds: how long all of them ran.
    """

    worker: WorkerId
    job: JobId
    index: int
    results: list[Any]
    seconds: float


@dataclass(slots=True, eq=False)
class TaskFaltered:
    """A worker answered the first task it holds with an exception that is tried again, if its job allows one more.

    ``result`` is the task's outcome if not.
    """

    worker: WorkerId
    job: JobId
    index: int
    result: Any
    seconds: float


@dataclass(slots=True, eq=False)
class TasksRecalled:
    """The engine took back the last ``count`` tasks that the worker had not started.

    The worker still has to throw away its copies; until RecallSettled nothing may be sent to it. With count 0
    there is nothing to settle.
    """

    worker: WorkerId
    count: int


@dataclass(slots=True, eq=False)
class RecallSettled:
    """The worker threw away all that was recalled and may be sent tasks again."""

    worker: WorkerId


@dataclass(slots=True, eq=False)
class WorkerExited:
    """A worker is gone and everything it had written was read.

    Attributes:
        worker: which.
        unstarted: how many of the tasks it got were never started: the last ones.
        sent: how many tasks it got in its life; what was sent when it was gone, and nobody had heard of that, it did
            not get.
        cause: why, passed on with FailTask or EndPool.
    """

    worker: WorkerId
    unstarted: int
    sent: int
    cause: Any


@dataclass(slots=True, eq=False)
class Resized:
    """The pool is to have so many workers from now on; there is room for them."""

    processes: int


@dataclass(slots=True, eq=False)
class PoolClosed:
    """No more jobs will be opened; the open ones go on to their end."""


@dataclass(slots=True, eq=False)
class PoolTerminated:
    """Stop everything now. ``cause`` is passed on with FailTask for whatever has no outcome yet."""

    cause: Any


@dataclass(slots=True, eq=False)
class TimePassed:
    """The moment in ``Scheduler.wake_at`` has come."""


Event = (
    JobOpened
    | JobSubmitted
    | TasksSubmitted
    | JobSealed
    | JobCancelled
    | JobWithdrawn
    | WorkerBecameReady
    | InitializerFailed
    | LoanWanted
    | WorkerReturned
    | TasksFinished
    | RunFinished
    | TaskFaltered
    | TasksRecalled
    | RecallSettled
    | WorkerExited
    | Resized
    | PoolClosed
    | PoolTerminated
    | TimePassed
)


# Actions ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class StartWorker:
    """Start a process in this slot; it is ``worker`` from now on."""

    worker: WorkerId
    slot: Slot


@dataclass(slots=True, eq=False)
class SendTasks:
    """Send these tasks to a worker, in this order, in one message."""

    worker: WorkerId
    tasks: list[Task]


@dataclass(slots=True, eq=False)
class LendWorker:
    """Let callers talk to this idle worker directly, until WorkerReturned or its exit."""

    worker: WorkerId


@dataclass(slots=True, eq=False)
class RecallTasks:
    """Take back what the worker has not started; answered at once by TasksRecalled."""

    worker: WorkerId


@dataclass(slots=True, eq=False)
class RetireWorker:
    """Tell a worker that holds nothing to collect its garbage and exit."""

    worker: WorkerId


@dataclass(slots=True, eq=False)
class KillWorker:
    """Kill a worker, whatever it does."""

    worker: WorkerId


@dataclass(slots=True, eq=False)
class VacateSlot:
    """The worker of this slot is gone and no other follows for now: what it kept need not be kept."""

    slot: Slot


@dataclass(slots=True, eq=False)
class ResolveTasks:
    """These tasks have their outcomes: (task, result) pairs."""

    outcomes: list[tuple[Task, Any]]


@dataclass(slots=True, eq=False)
class ResolveRun:
    """The tasks and items of this job from ``index`` on have these outcomes."""

    job: JobId
    index: int
    results: list[Any]


@dataclass(slots=True, eq=False)
class FailTask:
    """This task will have no result: the cause of WorkerExited, PoolTerminated or InitializerFailed, or TimedOut."""

    task: Task
    cause: Any


@dataclass(slots=True, eq=False)
class RetryTask:
    """This task went back to its place in the queue after an attempt in vain; for the record.

    ``cause`` is that of WorkerExited, TimedOut, or None for an exception of its own.
    """

    task: Task
    cause: Any


@dataclass(slots=True, eq=False)
class DropTask:
    """Nobody waits for this task any more: its job was cancelled. It will not start, or dies with its worker."""

    task: Task


@dataclass(slots=True, eq=False)
class AnswerCancel:
    """What came of JobCancelled: whether any of the job's tasks was dropped. Said after the last DropTask."""

    asker: Any
    dropped: bool


@dataclass(slots=True, eq=False)
class FinishJob:
    """The job is sealed and each of its tasks has been resolved, failed or dropped; said once per job.

    Of a job that was withdrawn before it was opened, or after it was finished, it is said as well.
    """

    job: JobId


@dataclass(slots=True, eq=False)
class EndPool:
    """The end: no task and no worker is left. ``error`` is None unless workers could not start. Said once."""

    error: Any


Action = (
    StartWorker
    | SendTasks
    | LendWorker
    | RecallTasks
    | RetireWorker
    | KillWorker
    | VacateSlot
    | ResolveTasks
    | ResolveRun
    | FailTask
    | RetryTask
    | DropTask
    | AnswerCancel
    | FinishJob
    | EndPool
)
