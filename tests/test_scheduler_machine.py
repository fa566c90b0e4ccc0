"""All the promises of the scheduler at once: hypothesis plays the outside world against it.

The machine keeps its own model, from events and actions alone, of where each task is and what each worker does. Every
action is checked against it as it is carried out (``do_…``), and everything that must hold in between after each step
(``settle_accounts``, numbered as the invariants of the design). In the end the world is driven to its end, and
whatever has not been resolved by then is a lost wake-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tpool.dispatch import AHEAD_SECONDS, MAX_BATCH, RECALL_SECONDS
from tpool.errors import ProtocolError
from tpool.messages import (
    AnswerCancel,
    DropTask,
    EndPool,
    FailTask,
    FinishJob,
    InitializerFailed,
    JobCancelled,
    JobOpened,
    JobSealed,
    JobSubmitted,
    JobWithdrawn,
    KillWorker,
    LendWorker,
    LoanWanted,
    PoolClosed,
    PoolTerminated,
    RecallSettled,
    RecallTasks,
    Resized,
    ResolveRun,
    ResolveTasks,
    RetireWorker,
    RetryTask,
    RunFinished,
    SendTasks,
    StartWorker,
    TaskFaltered,
    TasksFinished,
    TasksRecalled,
    TasksSubmitted,
    TimePassed,
    VacateSlot,
    WorkerBecameReady,
    WorkerExited,
    WorkerReturned,
)
from tpool.scheduler import MAX_START_FAILURES, START_GRACE_SECONDS, Scheduler
from tpool.task import JobId, Rules, Task, TimedOut, WorkerId

Key = tuple[int, int]  # (job, index)

SHORT = AHEAD_SECONDS / 1000
PACES = [SHORT, SHORT, SHORT, SHORT, AHEAD_SECONDS / 4, AHEAD_SECONDS, 1.0]  # seconds that a job's tasks mostly take
TICK = RECALL_SECONDS / 1000  # how much later the next event comes at least
LIMIT = 0.5  # seconds, where tasks have a time limit
RULES = [
    *[None] * 4,
    Rules(retries=1, retry_lost=True),
    Rules(timeout=LIMIT),
    Rules(timeout=LIMIT, retries=2, retry_lost=True, retry_timed_out=True),
]
MANY = 20_000  # steps, more than anything needs
SPAN_SIZES = [1, 7, 64]
SELDOM = st.sampled_from([False] * 5 + [True])


@dataclass(eq=False)
class ModelWorker:
    id: int
    slot: int
    state: str = "starting"  # ready, asked, settling, retiring, killed
    held: list[Task] = field(default_factory=list)
    started: int = 0  # how many of the held tasks must have been started, as only others are recalled
    given: int = 0
    sent: int = 0
    since: float = 0.0  # it has held two or more for so long, without a result
    heard_at: float = 0.0  # its last result, or the message that ended its idleness
    due: float = 0.0  # of the last task with a time limit


@dataclass(eq=False)
class ModelJob:
    id: int
    batch: int
    pace: float
    count: int = 0
    sealed: bool = False  # by JobSealed
    cancelled: bool = False
    doomed: bool = False  # cancelled, and nothing of it may run on
    finished: bool = False
    rules: Rules = field(default_factory=Rules)
    queue: dict[int, Task] = field(default_factory=dict)
    durations: list[float] = field(default_factory=list)
    turn: int = 0  # the number of messages before it came to wait for its turn


def units_of(task: Task) -> list[Task]:
    """The tasks that a span stands for; any other stands for itself."""
    if not isinstance(task.payload, tuple):
        return [task]
    units = list(task.payload[task.start : task.start + task.count])
    assert len(units) == task.count, "a span has more items than its payload"
    assert (units[0].job, units[0].index) == (task.job, task.index), "a span was cut in the wrong place"
    return units


class SchedulerMachine(RuleBasedStateMachine):
    """The outside world: callers, feeder, engine and clock."""

    # Playing ------------------------------------------------------------------------------------------------------

    @initialize(
        processes=st.sampled_from([1, 2, 2, 3, 4]),
        max_tasks=st.sampled_from([None, None, None, None, 2, 40, 200]),
        not_ready=SELDOM,
        grace=st.sampled_from([START_GRACE_SECONDS, 0.0]),
        peace=st.integers(0, 40),
        pace=st.sampled_from(PACES),
        span_size=st.sampled_from(SPAN_SIZES),
        in_runs=st.booleans(),
    )
    def begin(
        self,
        processes: int,
        max_tasks: int | None,
        not_ready: bool,
        grace: float,
        peace: int,
        pace: float,
        span_size: int,
        in_runs: bool,
    ) -> None:
        self.span_size, self.in_runs = span_size, in_runs
        if span_size > 1:  # of tasks that are sent many at a time, and not weighed
            max_tasks, pace = None, SHORT
        self.peace = peace  # for so many steps nobody ends the pool, so that something can happen first
        self.processes, self.max_tasks = processes, max_tasks
        self.kept = set(range(processes))  # slots that have a worker, or get the next one
        self.leaving: list[ModelWorker] = []  # of the other slots, in the order in which they were to leave
        self.grace = grace
        self.scheduler = Scheduler(processes, max_tasks, grace)
        self.now = self.said_at = 0.0
        self.workers: dict[int, ModelWorker] = {}
        self.gone: list[ModelWorker] = []
        self.jobs: dict[int, ModelJob] = {}
        self.withdrawn: int | None = None  # a job that was withdrawn but is not open, until that is answered
        self.unresolved: dict[Key, Task] = {}
        self.outcome: dict[Key, str] = {}
        self.attempts: dict[Key, int] = {}
        self.messages = 0
        self.start_failures = 0
        self.closed = False
        self.stopped: tuple[Any, Any] | None = None  # (cause, error)
        self.over_since: float | None = None
        self.ended = False
        self.settling: list[Task] = []  # on their way back from a worker, while one event is handled
        self.expected: list[tuple[str, Key, Any]] = []  # the outcomes that the event under way must have
        self.to_retry: list[Task] = []  # the tasks that the event under way must put back after an attempt in vain
        self.dropped = 0  # in the event under way
        self.carry_out(self.scheduler.begin())
        if not not_ready:
            for worker in list(self.workers.values()):
                self.become_ready(worker)
        self.begin_job(ModelJob(0, batch=1, pace=pace), tasks=40 if span_size == 1 else 200, weight=1)
        if span_size > 1:
            self.give_a_result()

    def give_a_result(self) -> None:
        """So that it is known how long tasks take."""
        for worker in self.holding()[:1]:
            self.give_results(worker, 1, None)

    def say(self, event: Any, expect: list[tuple[str, Key, Any]] | None = None) -> None:
        self.in_doubt = True
        self.expected = expect or []
        self.dropped = 0
        self.said_at = self.now
        self.now += TICK
        actions = self.scheduler.handle(event, self.said_at)
        self.carry_out(actions)
        if self.over() and self.over_since is None:
            self.over_since = self.said_at
        assert not self.expected, f"{event} should have given {self.expected}"
        assert not self.to_retry, f"{event} should have put back {self.to_retry}"
        for action in actions:
            if isinstance(action, RecallTasks):
                self.answer_recall(self.workers[action.worker])

    def carry_out(self, actions: list[Any]) -> None:
        for action in actions:
            getattr(self, f"do_{type(action).__name__}")(action)

    def over(self) -> bool:
        return self.stopped is not None or (self.closed and all(job.finished for job in self.jobs.values()))

    def working(self, *states: str) -> list[ModelWorker]:
        return [worker for worker in self.workers.values() if worker.state in states]

    def waiting(self) -> list[ModelJob]:
        return [job for job in self.jobs.values() if job.queue]

    def idle(self) -> list[ModelWorker]:
        return [worker for worker in self.working("ready") if not worker.held]

    def loaded(self) -> list[ModelWorker]:
        return [worker for worker in self.working("ready") if 2 <= len(worker.held) > worker.started]

    def fits(self, worker: ModelWorker, task: Task) -> bool:
        return self.max_tasks is None or not worker.given or worker.given + task.weight <= self.max_tasks

    # What the scheduler does: is it allowed, and what changes -----------------------------------------------------

    def do_StartWorker(self, action: StartWorker) -> None:
        assert action.worker not in {worker.id for worker in self.gone} | set(self.workers), "an id was used again"
        assert action.slot in self.kept, "more workers than there should be"
        assert action.slot not in {worker.slot for worker in self.workers.values()}, "the slot is taken"
        assert not self.over(), "something starts after the end"
        self.workers[action.worker] = ModelWorker(action.worker, action.slot)

    def do_SendTasks(self, action: SendTasks) -> None:
        worker = self.workers[action.worker]
        assert worker.state == "ready", f"sent to a worker that is {worker.state}"
        assert worker not in self.leaving, "sent to a worker that is to leave"
        assert not self.over(), "something is sent after the end"
        tasks = [unit for task in action.tasks for unit in units_of(task)]
        assert tasks, "an empty message"
        assert len({task.job for task in tasks}) == 1
        job = self.jobs[tasks[0].job]
        assert [task.index for task in tasks] == sorted(job.queue)[: len(tasks)], "sent out of order"
        self.check_turn(worker, job)
        self.check_portion(worker, job, len(tasks))
        if job.rules.timeout is not None:
            assert len(tasks) == 1, "tasks with a time limit were packed"
            assert not worker.held, "a task with a time limit was sent ahead"
            worker.due = self.said_at + job.rules.timeout
        else:
            assert not self.timed(worker), "something was sent behind a task with a time limit"
        self.messages += 1
        job.turn = self.messages
        if not worker.held:
            worker.heard_at = self.said_at
        if worker not in self.loaded():
            worker.since = self.said_at
        for task in tasks:
            assert job.queue.pop(task.index) is task
            worker.held.append(task)
            worker.sent += 1
            worker.given += task.weight
        if self.max_tasks is not None:
            assert worker.given <= self.max_tasks, "a worker was given too much"

    def check_turn(self, worker: ModelWorker, job: ModelJob) -> None:
        """Jobs share the workers: nobody who has waited for longer is passed over, unless his task does not fit."""
        for other in self.waiting():
            if other.turn < job.turn:
                assert not self.fits(worker, other.queue[min(other.queue)]), f"job {other.id} was passed over"

    def check_portion(self, worker: ModelWorker, job: ModelJob, count: int) -> None:
        assert count <= -(-len(job.queue) // (2 * len(self.workers))), "too much at the tail"
        if not job.durations:
            assert count <= job.batch, "too many of unknown length"
        if min(job.durations, default=1.0) >= AHEAD_SECONDS:
            assert count == 1 or not job.durations, "long tasks were packed"
            assert not worker.held, "a long task, or one of unknown length, was sent ahead"
        if worker.held:
            assert self.idle() == [], "sent ahead while another worker is idle"
            last = self.jobs[worker.held[-1].job]
            assert min(last.durations, default=1.0) < AHEAD_SECONDS, "sent behind a long task"
            assert self.said_at < worker.heard_at + RECALL_SECONDS, "sent ahead to a worker that is stuck"
        assert len(worker.held) + count <= MAX_BATCH or count <= job.batch

    def timed(self, worker: ModelWorker) -> bool:
        return bool(worker.held) and self.jobs[worker.held[0].job].rules.timeout is not None

    def do_RecallTasks(self, action: RecallTasks) -> None:
        worker = self.workers[action.worker]
        doomed = [self.jobs[task.job].doomed for task in worker.held]
        if worker in self.leaving and not any(doomed):
            assert worker.state == "ready"
            assert len(worker.held) > 1, "recalled from a worker that has nothing unstarted"
            worker.state = "asked"
            return
        if any(doomed):
            assert worker.state == "ready"
            assert not all(doomed), "recalled before a kill that harms nobody"
            worker.state = "asked"
            return
        assert worker in self.loaded(), "recalled from a worker that has nothing unstarted"
        assert self.idle(), "a recall for nobody"
        assert not self.waiting(), "a recall while something is queued"
        assert not self.working("asked"), "two recalls at once"
        assert self.said_at >= worker.since + RECALL_SECONDS, "recalled too early"
        worker.state = "asked"

    def do_LendWorker(self, action: LendWorker) -> None:
        worker = self.workers[action.worker]
        assert worker in self.idle(), "lent, but busy or not ready"
        assert not self.waiting(), "lent while something is queued"
        assert not self.over(), "lent after the end"
        assert self.max_tasks is None
        worker.state = "lent"

    def do_RetireWorker(self, action: RetireWorker) -> None:
        worker = self.workers[action.worker]
        assert worker in self.idle(), "told to retire, but busy or not ready"
        if not self.over() and worker not in self.leaving:
            assert self.max_tasks is not None, "retired for no reason"
            heads = [job.queue[min(job.queue)] for job in self.waiting()]
            fitting = any(self.fits(worker, task) for task in heads)
            assert worker.given >= self.max_tasks or (heads and not fitting), "retired too early"
        worker.state = "retiring"

    def do_VacateSlot(self, action: VacateSlot) -> None:
        assert action.slot not in self.kept, "a slot that is kept was left empty"
        assert action.slot not in {worker.slot for worker in self.workers.values()}, "the slot is not empty"

    def do_KillWorker(self, action: KillWorker) -> None:
        worker = self.workers[action.worker]
        assert worker.state != "killed", "killed twice"
        over_since = self.now if self.over_since is None and self.over() else self.over_since
        late = over_since is not None and self.now >= over_since + self.grace
        if self.stopped is None and not (late and worker.state == "starting"):
            assert worker.held, "killed for no reason"
            if all(self.jobs[task.job].doomed for task in worker.held):
                self.expected += [("dropped", (task.job, task.index), None) for task in worker.held]
            else:
                assert self.timed(worker), "killed for no reason"
                assert self.said_at >= worker.due, "killed too early"
                (task,) = worker.held
                self.note_attempt(task, "timed out", self.jobs[task.job].rules.retry_timed_out)
            worker.held.clear()
            worker.started = 0
        worker.state = "killed"

    def note_attempt(self, task: Task, how: str, again: bool) -> None:
        """An attempt was in vain: it must be followed by another, or by the failure."""
        key, job = (task.job, task.index), self.jobs[task.job]
        self.attempts[key] = self.attempts.get(key, 0) + 1
        if not again or self.attempts[key] > job.rules.retries:
            self.expected.append(("failed", key, how))
        elif job.cancelled:
            self.expected.append(("dropped", key, None))
        else:
            self.to_retry.append(task)

    def do_RetryTask(self, action: RetryTask) -> None:
        (task,) = units_of(action.task)
        self.to_retry.remove(task)
        self.enqueue(self.jobs[task.job], [task])

    def do_AnswerCancel(self, action: AnswerCancel) -> None:
        assert action.dropped == bool(self.dropped), "whoever cancelled was told wrongly"

    def resolve(self, task: Task, how: str, extra: Any) -> None:
        key = (task.job, task.index)
        assert self.unresolved.pop(key, None) is task, f"{key} {how}, but: {self.outcome.get(key, 'no such task')}"
        assert (how, key, extra) in self.expected, f"{key} {how} ({extra}) unexpectedly"
        self.expected.remove((how, key, extra))
        self.outcome[key] = how
        assert not self.jobs[task.job].finished, "an outcome after FinishJob"

    def do_ResolveTasks(self, action: ResolveTasks) -> None:
        assert [("resolved", (task.job, task.index), result) for task, result in action.outcomes] == self.expected
        for task, result in action.outcomes:
            (unit,) = units_of(task)
            self.resolve(unit, "resolved", result)

    def do_ResolveRun(self, action: ResolveRun) -> None:
        keys = [(int(action.job), index) for index, _ in enumerate(action.results, action.index)]
        assert [("resolved", *pair) for pair in zip(keys, action.results, strict=True)] == self.expected
        for key, result in zip(keys, action.results, strict=True):
            self.resolve(self.unresolved[key], "resolved", result)

    def do_FailTask(self, action: FailTask) -> None:
        (task,) = units_of(action.task)
        cause = "timed out" if isinstance(action.cause, TimedOut) else action.cause
        self.resolve_unless_late(task, "failed", cause)
        assert action.task.attempts == self.attempts.get((action.task.job, action.task.index), 0)

    def do_DropTask(self, action: DropTask) -> None:
        assert self.jobs[action.task.job].cancelled
        self.dropped += 1
        for task in units_of(action.task):
            self.resolve_unless_late(task, "dropped", None)

    def resolve_unless_late(self, task: Task, how: str, extra: Any) -> None:
        if self.jobs[task.job].finished:  # Only what the feeder adds to a cancelled job comes so late.
            assert self.jobs[task.job].cancelled
            self.unresolved.pop((task.job, task.index))
            self.expected.remove((how, (task.job, task.index), extra))
            self.outcome[(task.job, task.index)] = how
        else:
            self.resolve(task, how, extra)

    def do_FinishJob(self, action: FinishJob) -> None:
        if action.job == self.withdrawn:  # never opened, or finished before
            self.withdrawn = None
            return
        job = self.jobs[action.job]
        assert not job.finished, "finished twice"
        assert job.sealed or job.cancelled, "finished before it was sealed"
        assert not [key for key in self.unresolved if key[0] == job.id], "finished with tasks unresolved"
        job.finished = True

    def do_EndPool(self, action: EndPool) -> None:
        assert not self.ended, "ended twice"
        assert self.over(), "ended for no reason"
        assert not self.workers, "ended with a worker left"
        assert not self.unresolved, "ended with a task left"
        assert action.error == (self.stopped[1] if self.stopped else None)
        self.ended = True

    # Growing and shrinking ---------------------------------------------------------------------------------------

    @rule(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3))
    def resize(self, sizes: list[int]) -> None:
        for processes in sizes:
            self.resize_to(processes)
            self.settle_accounts()

    @precondition(lambda self: len(self.loaded()) > 1)
    @rule(processes=st.integers(1, 2))
    def shrink_the_busy(self, processes: int) -> None:
        """Somebody who is sent ahead has to go."""
        self.resize_to(processes)

    def resize_to(self, processes: int) -> None:
        before = dict(self.workers)
        if not self.over():
            self.processes = processes
            self.shrink(len(self.kept) - processes)
            self.grow(processes)
        self.say(Resized(processes))
        new = {worker.slot for id, worker in self.workers.items() if id not in before}
        assert not self.over() or not new, "something starts after the end"

    def shrink(self, surplus: int) -> None:
        """Who leaves: those that go anyway, the idle, the starting, the lent, the busy; of the highest slots."""
        ranks = {"retiring": 0, "killed": 0, "starting": 2, "lent": 3}
        idle = self.idle()
        there = [worker for worker in self.workers.values() if worker.slot in self.kept]
        there.sort(key=lambda worker: (1 if worker in idle else ranks.get(worker.state, 4), -worker.slot))
        for worker in there[: max(0, surplus)]:
            self.kept.remove(worker.slot)
            if worker.state not in ("retiring", "killed"):
                self.leaving.append(worker)

    def grow(self, processes: int) -> None:
        """Who stays, and what is filled: whoever was not told yet, then empty slots, then those whose worker goes."""
        for worker in reversed(self.leaving.copy()):
            if len(self.kept) < processes and worker.state not in ("retiring", "killed"):
                self.leaving.remove(worker)
                self.kept.add(worker.slot)
        taken = {worker.slot for worker in self.workers.values()}
        free = sorted(set(range(processes)) - self.kept, key=lambda slot: (slot in taken, slot))
        self.kept.update(free[: max(0, processes - len(self.kept))])

    # Lending --------------------------------------------------------------------------------------------------

    @rule()
    def want_a_loan(self) -> None:
        before = len(self.working("lent"))
        wanted = self.max_tasks is None and self.idle() and not self.over()
        self.say(LoanWanted())
        assert len(self.working("lent")) == before + bool(wanted)

    @precondition(lambda self: self.working("lent"))
    @rule(data=st.data())
    def return_a_worker(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.working("lent")), label="worker")
        worker.state = "ready"
        self.say(WorkerReturned(WorkerId(worker.id)))

    # What callers and the feeder do -------------------------------------------------------------------------------

    @precondition(lambda self: not self.closed and len(self.jobs) < 12)
    @rule(
        batch=st.sampled_from([1, 1, 5]),
        pace=st.sampled_from(PACES),
        tasks=st.sampled_from([0, 1, 5, 40, 200]),
        weight=st.integers(1, 3),
        seal=st.booleans(),
        rules=st.sampled_from(RULES),
    )
    def open_job(self, batch: int, pace: float, tasks: int, weight: int, seal: bool, rules: Rules | None) -> None:
        job = ModelJob(len(self.jobs), batch, pace, rules=rules or Rules())
        self.begin_job(job, tasks, weight)
        if seal:
            self.seal(job)

    @precondition(lambda self: not self.closed and len(self.jobs) < 12)
    @rule(weight=st.integers(1, 3), rules=st.sampled_from(RULES))
    def submit_job(self, weight: int, rules: Rules | None) -> None:
        """A job that comes with its task, and with no more."""
        job = self.jobs[len(self.jobs)] = ModelJob(len(self.jobs), batch=1, pace=SHORT, rules=rules or Rules())
        job.sealed = True
        tasks, expect = self.new_tasks(job, 1, weight)
        self.say(JobSubmitted(JobId(job.id), tasks, rules=rules), expect)

    def begin_job(self, job: ModelJob, tasks: int, weight: int) -> None:
        self.jobs[job.id] = job
        self.say(JobOpened(JobId(job.id), job.batch, job.rules if job.rules.retries or job.rules.timeout else None))
        self.add(job, tasks, weight)

    @precondition(lambda self: self.unsealed())
    @rule(data=st.data(), tasks=st.sampled_from([0, 1, 3, 10, 40, 200]), weight=st.integers(1, 3))
    def submit(self, data: st.DataObject, tasks: int, weight: int) -> None:
        self.add(data.draw(st.sampled_from(self.unsealed()), label="job"), tasks, weight)

    @precondition(lambda self: self.unsealed() and not self.over())
    @rule(data=st.data(), again=st.booleans(), pause=st.sampled_from([0.0, 0.0, RECALL_SECONDS]))
    def rush(self, data: st.DataObject, again: bool, pause: float) -> None:
        """Many short tasks at once: soon all workers are sent ahead."""
        job = data.draw(st.sampled_from(self.unsealed()), label="job")
        for worker in self.working("starting"):
            self.become_ready(worker)
        self.add(job, 100, weight=1)
        for worker in self.holding():
            if worker.held:  # It may have been recalled from, or died, in the meantime.
                self.give_results(worker, len(worker.held), SHORT)
        self.time_passes(pause)
        if again:
            self.add(job, 100, weight=1)

    def unsealed(self) -> list[ModelJob]:
        return [job for job in self.jobs.values() if not job.sealed]

    def add(self, job: ModelJob, count: int, weight: int) -> None:
        tasks, expect = self.new_tasks(job, count, weight)
        self.say(TasksSubmitted(JobId(job.id), tasks), expect)

    def new_tasks(self, job: ModelJob, count: int, weight: int) -> tuple[list[Task], list[tuple[str, Key, Any]]]:
        """Tasks for a job, and the outcomes that they must have at once."""
        if self.max_tasks is not None:  # Else a worker for each few tasks makes this slow.
            weight, count = min(weight, self.max_tasks), min(count, 5 * self.max_tasks)
        tasks = [Task(JobId(job.id), job.count + number, object(), weight) for number in range(count)]
        job.count += count
        self.unresolved |= {(task.job, task.index): task for task in tasks}
        expect: list[tuple[str, Key, Any]] = []
        if job.cancelled:
            expect = [("dropped", (task.job, task.index), None) for task in tasks]
        elif self.stopped:
            expect = [("failed", (task.job, task.index), self.stopped[0]) for task in tasks]
        else:
            self.enqueue(job, tasks)
        return self.pack(tasks), expect

    @rule(size=st.sampled_from(SPAN_SIZES))
    def plan_spans(self, size: int) -> None:
        self.span_size = size

    def pack(self, tasks: list[Task]) -> list[Task]:
        """The same as spans; each carries what it stands for."""
        if self.span_size == 1 or self.max_tasks is not None:
            return tasks
        spans = [tasks[start : start + self.span_size] for start in range(0, len(tasks), self.span_size)]
        return [Task(span[0].job, span[0].index, tuple(span), count=len(span)) for span in spans]

    def enqueue(self, job: ModelJob, tasks: list[Task]) -> None:
        if not job.queue:
            job.turn = self.messages
        job.queue |= {task.index: task for task in tasks}

    @precondition(lambda self: self.unsealed())
    @rule(data=st.data())
    def seal_job(self, data: st.DataObject) -> None:
        self.seal(data.draw(st.sampled_from(self.unsealed()), label="job"))

    def seal(self, job: ModelJob) -> None:
        job.sealed = True
        self.say(JobSealed(JobId(job.id)))

    @precondition(lambda self: [job for job in self.jobs.values() if job.sealed])
    @rule(data=st.data())
    def add_to_a_sealed_job(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from([job for job in self.jobs.values() if job.sealed]), label="job")
        with pytest.raises(AssertionError, match=f"job {job.id} was"):
            self.say(TasksSubmitted(JobId(job.id), [Task(JobId(job.id), job.count, None)]))

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), luck=SELDOM, kill=st.booleans())
    def cancel(self, data: st.DataObject, luck: bool, kill: bool) -> None:
        if luck:
            self.cancel_job(data.draw(st.sampled_from(list(self.jobs.values())), label="job"), kill)

    @precondition(lambda self: self.holding())
    @rule(data=st.data(), luck=SELDOM)
    def cancel_what_runs(self, data: st.DataObject, luck: bool) -> None:
        worker = data.draw(st.sampled_from(self.loaded() or self.holding()), label="worker")
        if luck:
            self.cancel_job(self.jobs[data.draw(st.sampled_from(worker.held), label="task").job], kill=True)

    def cancel_job(self, job: ModelJob, kill: bool = False) -> None:
        if not job.finished:
            job.cancelled = True
            job.doomed = job.doomed or kill
        expect: list[tuple[str, Key, Any]] = [("dropped", (job.id, index), None) for index in job.queue]
        job.queue.clear()
        self.say(JobCancelled(JobId(job.id), kill, "somebody"), expect)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), luck=SELDOM, opened=st.booleans())
    def withdraw(self, data: st.DataObject, luck: bool, opened: bool) -> None:
        """Its caller was interrupted."""
        if not luck:
            return
        expect: list[tuple[str, Key, Any]] = []
        job_id = len(self.jobs) + 100
        if opened:
            job = data.draw(st.sampled_from(list(self.jobs.values())), label="job")
            job_id = job.id
            job.sealed = True
        if not opened or job.finished:
            self.withdrawn = job_id
        else:
            job.cancelled = True
            expect = [("dropped", (job.id, index), None) for index in job.queue]
            job.queue.clear()
        self.say(JobWithdrawn(JobId(job_id)), expect)
        assert self.withdrawn is None, "whoever made it was not answered"

    @precondition(lambda self: self.peace < 0 and not self.closed)
    @rule()
    def close(self) -> None:
        self.closed = True
        self.say(PoolClosed())

    @precondition(lambda self: self.peace < 0)
    @rule(luck=SELDOM)
    def terminate(self, luck: bool) -> None:
        if not luck:
            return
        expect = [] if self.stopped else self.stop("terminated", None)
        self.say(PoolTerminated("terminated"), expect)
        for worker in self.working("killed"):
            self.say(TasksFinished(WorkerId(worker.id), [(JobId(0), 0, "late", 0.0)]))

    def stop(self, cause: Any, error: Any) -> list[tuple[str, Key, Any]]:
        if self.ended:
            return []
        self.stopped = (cause, error)
        for job in self.jobs.values():
            job.queue.clear()
        for worker in self.workers.values():
            worker.held.clear()
            worker.started = 0
        return [("failed", key, cause) for key in self.unresolved]

    # What workers, the engine and the clock do ----------------------------------------------------------------------

    @precondition(lambda self: self.working("starting"))
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        self.become_ready(data.draw(st.sampled_from(self.working("starting")), label="worker"))

    def become_ready(self, worker: ModelWorker) -> None:
        worker.state = "ready"
        self.start_failures = 0
        self.say(WorkerBecameReady(WorkerId(worker.id)))

    @precondition(lambda self: self.peace < 0 and self.working("starting"))
    @rule(data=st.data(), luck=SELDOM)
    def initializer_fails(self, data: st.DataObject, luck: bool) -> None:
        worker = data.draw(st.sampled_from(self.working("starting")), label="worker")
        if luck:
            self.say(InitializerFailed(WorkerId(worker.id), "init"), self.stop("init", "init"))

    @precondition(lambda self: self.holding())
    @rule(data=st.data(), odd=st.sampled_from([None] * 8 + [SHORT, 1.0]))
    def finish(self, data: st.DataObject, odd: float | None) -> None:
        worker = data.draw(st.sampled_from(self.holding()), label="worker")
        few = st.integers(1, len(worker.held))
        count = data.draw(st.one_of(st.just(len(worker.held)), few, few), label="count")
        self.give_results(worker, count, odd)

    @precondition(lambda self: self.holding())
    @rule(part=st.sampled_from([2, 3, 10]))
    def answer_in_part(self, part: int) -> None:
        """All workers are in the middle of what they hold, and of spans."""
        for worker in self.holding():
            if worker.held:  # It may have been recalled from, or died, in the meantime.
                self.give_results(worker, max(1, len(worker.held) // part), SHORT)

    @precondition(lambda self: self.holding())
    @rule(
        data=st.data(),
        steps=st.sampled_from([3, 10, 1000]),
        odd=st.sampled_from([None, SHORT]),
        pause=st.sampled_from([0.0, RECALL_SECONDS]),
    )
    def all_is_well(self, data: st.DataObject, steps: int, odd: float | None, pause: float) -> None:
        """For a while everybody does what they should, but one worker is stuck."""
        stuck = data.draw(st.sampled_from(self.loaded() or self.holding()), label="stuck")
        for _ in range(steps):
            if not self.go_on(stuck, odd):
                break
        self.time_passes(pause)

    @precondition(lambda self: self.loaded())
    @rule(data=st.data(), cancel=SELDOM)
    def one_is_stuck(self, data: st.DataObject, cancel: bool) -> None:
        """The others run out of work, so that it comes to a recall."""
        stuck = data.draw(st.sampled_from(self.loaded()), label="stuck")
        if cancel:
            self.cancel_job(self.jobs[stuck.held[-1].job])
        for _ in range(MANY):
            if not self.go_on(stuck, SHORT):
                break
        else:
            raise AssertionError("they never run out of work")
        self.time_passes(RECALL_SECONDS)

    def holding(self) -> list[ModelWorker]:
        return [worker for worker in self.working("ready", "settling") if worker.held]

    @rule(in_runs=st.booleans())
    def plan_runs(self, in_runs: bool) -> None:
        self.in_runs = in_runs

    def give_results(self, worker: ModelWorker, count: int, odd: float | None) -> None:
        first = worker.held[0]
        if self.in_runs:
            follows = [
                (task.job, task.index) == (first.job, first.index + place) for place, task in enumerate(worker.held)
            ]
            count = min(count, [*follows, False].index(False))
        done, worker.held = worker.held[:count], worker.held[count:]
        worker.started = max(0, worker.started - count)
        worker.since = worker.heard_at = self.now
        results = [(task.job, task.index, object(), odd or self.jobs[task.job].pace) for task in done]
        for job, _, _, seconds in results:
            self.jobs[job].durations.append(seconds)
        expect = [("resolved", (int(job), index), result) for job, index, result, _ in results]
        if self.in_runs:
            seconds = sum(seconds for _, _, _, seconds in results)
            outcomes = [result for _, _, result, _ in results]
            self.say(RunFinished(WorkerId(worker.id), first.job, first.index, outcomes, seconds), expect)
        else:
            self.say(TasksFinished(WorkerId(worker.id), results), expect)

    @precondition(lambda self: [worker for worker in self.holding() if self.jobs[worker.held[0].job].rules.retries])
    @rule(data=st.data())
    def falter(self, data: st.DataObject) -> None:
        """A task raises an exception that is to be tried again."""
        faltering = [worker for worker in self.holding() if self.jobs[worker.held[0].job].rules.retries]
        worker = data.draw(st.sampled_from(faltering), label="worker")
        task = worker.held.pop(0)
        worker.started = max(0, worker.started - 1)
        worker.since = worker.heard_at = self.now
        expect: list[tuple[str, Key, Any]] = []
        key, job = (task.job, task.index), self.jobs[task.job]
        self.attempts[key] = self.attempts.get(key, 0) + 1
        if self.attempts[key] > job.rules.retries:
            expect = [("resolved", key, "its error")]
        elif job.cancelled:
            expect = [("dropped", key, None)]
        else:
            self.to_retry.append(task)
        self.say(TaskFaltered(WorkerId(worker.id), task.job, task.index, "its error", job.pace), expect)

    @precondition(lambda self: self.holding())
    @rule(data=st.data(), wrong=st.sampled_from(["other index", "other job", "too many", "none"]))
    def answer_wrongly(self, data: st.DataObject, wrong: str) -> None:
        worker = data.draw(st.sampled_from(self.holding()), label="worker")
        results = [(task.job, task.index, object(), 0.0) for task in worker.held]
        job, index, result, seconds = results[-1]
        if wrong == "other index":
            results[-1] = (job, index + 1, result, seconds)
        elif wrong == "other job":
            results[-1] = (JobId(job + 1), index, result, seconds)
        elif wrong == "too many":
            results.append((job, index + 1, result, seconds))
        else:
            results.clear()
        with pytest.raises(ProtocolError, match=f"worker {worker.id} "):
            self.say(TasksFinished(WorkerId(worker.id), results))

    @precondition(lambda self: self.holding())
    @rule(data=st.data(), wrong=st.sampled_from(["other index", "other job", "too many", "none"]))
    def answer_a_wrong_run(self, data: st.DataObject, wrong: str) -> None:
        worker = data.draw(st.sampled_from(self.holding()), label="worker")
        first = worker.held[0]
        job, index, count = first.job, first.index, 1
        if wrong == "other index":
            index += 1
        elif wrong == "other job":
            job = JobId(job + 1)
        else:
            count = 0 if wrong == "none" else len(worker.held) + 1
        with pytest.raises(ProtocolError, match=f"worker {worker.id} "):
            self.say(RunFinished(WorkerId(worker.id), job, index, [object()] * count, 0.0))

    def answer_recall(self, worker: ModelWorker) -> None:
        """The engine answers at once: it takes back what it can, or less, or finds the worker dead."""
        unstarted = len(worker.held) - worker.started
        if self.recall_plan == "die":
            return self.lose(worker, unstarted)
        count = {"none": 0, "one": min(1, unstarted), "all": unstarted}[self.recall_plan]
        self.come_back(worker, count)
        worker.started = len(worker.held)
        worker.state = "settling" if count else "ready"
        self.say(TasksRecalled(WorkerId(worker.id), count), self.drops())

    recall_plan = "all"

    @rule(plan=st.sampled_from(["all", "all", "one", "none", "die"]))
    def plan_recalls(self, plan: str) -> None:
        self.recall_plan = plan

    def come_back(self, worker: ModelWorker, count: int) -> None:
        """The last tasks of a worker go back to their queues, or are on the way to be dropped."""
        returned = worker.held[len(worker.held) - count :]
        del worker.held[len(worker.held) - count :]
        worker.given -= sum(task.weight for task in returned)
        self.settling = [task for task in returned if self.jobs[task.job].cancelled]
        for task in returned:
            if task not in self.settling:
                self.enqueue(self.jobs[task.job], [task])

    def drops(self) -> list[tuple[str, Key, Any]]:
        dropped, self.settling = self.settling, []
        return [("dropped", (task.job, task.index), None) for task in dropped]

    @precondition(lambda self: self.working("settling"))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        self.settle_recall(data.draw(st.sampled_from(self.working("settling")), label="worker"))

    def settle_recall(self, worker: ModelWorker) -> None:
        worker.state = "ready"
        self.say(RecallSettled(WorkerId(worker.id)))

    @precondition(lambda self: self.working("retiring", "killed"))
    @rule(data=st.data())
    def exit(self, data: st.DataObject) -> None:
        self.lose(data.draw(st.sampled_from(self.working("retiring", "killed")), label="worker"), 0)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), luck=st.booleans())
    def die(self, data: st.DataObject, luck: bool) -> None:
        """A worker is lost; if there is one, then one that holds something."""
        worker = data.draw(st.sampled_from(self.loaded() or list(self.workers.values())), label="worker")
        last_chance = worker.state == "starting" and self.start_failures == MAX_START_FAILURES - 1
        if luck and (self.peace < 0 or not last_chance):
            unstarted = len(worker.held) - worker.started
            few = st.integers(max(0, unstarted - 1), unstarted)
            self.lose(worker, data.draw(st.one_of(few, st.integers(0, unstarted)), label="unstarted"))

    @precondition(lambda self: self.working("starting") and (self.peace < 0 or self.start_failures < 2))
    @rule(data=st.data(), luck=st.booleans())
    def fail_to_start(self, data: st.DataObject, luck: bool) -> None:
        worker = data.draw(st.sampled_from(self.working("starting")), label="worker")
        if luck:
            self.lose(worker, 0)

    @precondition(lambda self: len(self.loaded()) > 1)
    @rule(data=st.data(), cancel=SELDOM)
    def die_together(self, data: st.DataObject, cancel: bool) -> None:
        """The machine runs out of memory: several workers are lost before another is ready."""
        lost = data.draw(st.permutations(self.loaded()), label="lost")
        if cancel:
            self.cancel_job(self.jobs[lost[0].held[-1].job])
        for worker in lost:
            if worker.id in self.workers and worker.held:
                self.lose(worker, len(worker.held) - max(1, worker.started))
                self.settle_accounts()

    def lose(self, worker: ModelWorker, unstarted: int) -> None:
        expect: list[tuple[str, Key, Any]] = []
        unheard = unstarted // 2  # were sent when it was gone already
        if not self.stopped:
            self.come_back(worker, unstarted)
            self.expected = []
            for task in worker.held:
                self.note_attempt(task, "lost", self.jobs[task.job].rules.retry_lost)
            expect = self.expected + self.drops()
            worker.held.clear()
        del self.workers[worker.id]
        self.leaving = [other for other in self.leaving if other is not worker]
        self.gone.append(worker)
        if worker.state == "starting" and not self.stopped:
            self.start_failures += 1
            if self.start_failures == MAX_START_FAILURES:
                expect = self.stop("lost", "lost")
                self.to_retry.clear()
        self.say(WorkerExited(WorkerId(worker.id), unstarted - unheard, worker.sent - unheard, "lost"), expect)

    @precondition(lambda self: self.gone or self.working("killed"))
    @rule(data=st.data())
    def speak_from_the_grave(self, data: st.DataObject) -> None:
        """What was on the way when a worker died or was killed changes nothing."""
        lost = self.working("killed") or self.gone[-3:]
        worker = WorkerId(data.draw(st.sampled_from(lost), label="worker").id)
        late: list[Any] = [TasksRecalled(worker, 0), TasksRecalled(worker, 3), RecallSettled(worker)]
        if worker in self.workers:
            late += [WorkerBecameReady(worker), InitializerFailed(worker, "late")]
            late += [TasksFinished(worker, [(JobId(0), 0, "late", 0.0)])]
            late += [RunFinished(worker, JobId(0), 0, ["late"], 0.0)]
        before = len(self.outcome), len(self.workers), self.messages
        self.say(data.draw(st.sampled_from(late), label="event"))
        assert before == (len(self.outcome), len(self.workers), self.messages)

    @precondition(lambda self: self.holding())
    @rule(seconds=st.sampled_from([0.0, RECALL_SECONDS / 4, RECALL_SECONDS / 2, RECALL_SECONDS, 1.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.time_passes(seconds)

    def time_passes(self, seconds: float) -> None:
        """The handler sleeps, but not past ``wake_at``."""
        until = self.now + seconds
        while self.scheduler.wake_at is not None and self.scheduler.wake_at <= until:
            assert self.scheduler.wake_at > self.said_at, "it was woken for nothing"
            self.now = max(self.now, self.scheduler.wake_at)
            self.say(TimePassed())
        self.now = max(self.now, until)
        self.say(TimePassed())

    # What must hold in between --------------------------------------------------------------------------------------

    @invariant()
    def settle_accounts(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.in_doubt = True
        self.peace -= 1
        self.scheduler.check()
        # 1 and 2: each task is in one place, or has its outcome.
        held = [(task.job, task.index) for worker in self.workers.values() for task in worker.held]
        queued = [(job.id, index) for job in self.jobs.values() for index in job.queue]
        assert sorted(held + queued) == sorted(self.unresolved), "a task is lost or in two places"
        jobs_with_tasks = {key[0] for key in self.unresolved}
        for job in self.jobs.values():
            over = job.id not in jobs_with_tasks
            assert job.finished == (over and (job.sealed or job.cancelled)), f"job {job.id} is not finished"
        # 4: a worker in each slot that is kept, which are `processes`; more only while a shrink waits for those to end
        # their tasks that are to leave and are sent nothing (see do_SendTasks).
        slots = [worker.slot for worker in self.workers.values()]
        assert len(set(slots)) == len(slots)
        if not self.over():
            assert len(self.kept) == self.processes
            assert self.kept <= set(slots)
            for worker in self.workers.values():
                if worker.slot not in self.kept and worker.state not in ("retiring", "killed"):
                    assert worker in self.leaving
                    assert worker.held or worker.state != "ready", "who is to leave and holds nothing was not told"
                    started = max(1, worker.started)
                    assert worker.state != "ready" or len(worker.held) <= started, "who is to leave keeps the rest"
        # Nobody is idle while something waits for him.
        assert not (self.idle() and self.waiting()), "a task waits while a worker is idle"
        if self.max_tasks is not None:
            assert all(worker.given < self.max_tasks for worker in self.idle()), "a worker should retire"
        # 5: nothing waits long behind a long task, and the clock is set for when it would.
        overdue = min((worker.since + RECALL_SECONDS for worker in self.loaded()), default=None)
        due = min((worker.due for worker in self.workers.values() if self.timed(worker)), default=None)
        if self.over() and self.working("starting"):
            assert self.scheduler.wake_at == self.over_since + self.grace
        else:
            times = [time for time in (overdue if self.idle() else None, due) if time is not None]
            assert self.scheduler.wake_at == min(times, default=None)
        # What was cancelled with a kill does not run on; what stands before it in its worker is heard first.
        for worker in self.working("ready", "settling"):
            doomed = [self.jobs[task.job].doomed for task in worker.held]
            assert not doomed or not all(doomed), "a doomed task runs on"
        assert self.scheduler.wake_at is None or self.scheduler.wake_at > self.said_at, "a recall is overdue"
        # 7: the end comes when it can.
        if self.over():
            mercy = self.stopped is None and self.said_at < self.over_since + self.grace
            assert mercy or not self.working("starting"), "the end waits for an initializer"
            assert not self.idle(), "the end waits for a worker that was not told"
            assert not self.stopped or not self.working("ready", "asked", "settling", "retiring"), "not killed"
            assert self.ended == (not self.workers)
        awaited = any(worker in self.leaving for worker in self.working("lent"))
        assert self.scheduler.wants_workers == bool(self.over() or self.waiting() or awaited)
        self.in_doubt = False
        # 8 is in do_EndPool and lose: MAX_START_FAILURES in a row, or an initializer, and then that error.

    def teardown(self) -> None:
        """Drive the world to its end: everything comes to an outcome by itself, without a clock but ``wake_at``."""
        if not hasattr(self, "scheduler") or self.in_doubt:
            return  # A step has failed; what would fail here is only a consequence.
        for job in self.unsealed():
            self.seal(job)
        if not self.closed:
            self.closed = True
            self.say(PoolClosed())
        for _ in range(MANY):
            if self.ended:
                break
            assert self.go_on(None, SHORT), "a lost wake-up: nobody has anything to do, and the pool has not ended"
            self.settle_accounts()
        assert self.ended, "the pool never ends"
        assert not self.unresolved
        assert len(self.outcome) == sum(job.count for job in self.jobs.values())
        assert all(job.finished for job in self.jobs.values())

    def go_on(self, stuck: ModelWorker | None, odd: float | None) -> bool:
        """Let each worker but one take the step that it would in a healthy world; False if there is none."""
        gone_on = False
        for worker in list(self.workers.values()):
            if worker is stuck or worker.id not in self.workers:
                continue
            if worker.state == "starting":
                self.become_ready(worker)
            elif worker.state == "settling":
                self.settle_recall(worker)
            elif worker.state == "lent" and self.scheduler.wants_workers:
                worker.state = "ready"
                self.say(WorkerReturned(WorkerId(worker.id)))
            elif worker.state in ("retiring", "killed"):
                self.lose(worker, 0)
            elif worker.held:
                self.give_results(worker, len(worker.held), odd)
            else:
                continue
            gone_on = True
        return gone_on


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
