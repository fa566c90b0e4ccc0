"""The result-handler thread: the loop that joins scheduler, engine and results. One per pool.

    callers, feeders ── post, submit ──► inbox ─┐
                                                ├─► Scheduler.handle ─► actions ─┬─► engine.perform
    engine.wait ──────── events ────────────────┘                                └─► sinks (results)

No user code runs in this thread, and it never waits for memory or for a caller.

A caller could run the scheduler itself and save one of the four wake-ups of an ``apply``. It must not: a signal
handler (Ctrl-C) may raise between any two steps of the main thread, and would leave the scheduler torn.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from tpool import failures
from tpool.basket import Basket
from tpool.engine import Encoded, Engine, Result, WorkerLoss
from tpool.errors import ProtocolError, TpoolError
from tpool.inbox import Inbox
from tpool.messages import (
    Action,
    AnswerCancel,
    DropTask,
    EndPool,
    Event,
    FailTask,
    FinishJob,
    JobCancelled,
    JobOpened,
    JobSubmitted,
    KillWorker,
    LendWorker,
    PoolTerminated,
    RecallTasks,
    ResolveRun,
    ResolveTasks,
    RetireWorker,
    RetryTask,
    SendTasks,
    StartWorker,
    TasksSubmitted,
    TimePassed,
    VacateSlot,
)
from tpool.results import Callbacks, Failure, SharedFailure, Sink
from tpool.scheduler import Scheduler
from tpool.task import JobId, Rules, Task, TimedOut, WorkerId
from tpool.waiting import Flag

logger = logging.getLogger("tpool")

# At the interpreter's exit: enough to kill workers in good order; what is left then dies with this process anyway.
EXIT_SECONDS = 2.0

NAMES_KEPT = 1 << 17
"""How many calls a timeline knows by name. More would take more memory: about 150 bytes for each."""


class Handler:
    """Runs a pool.

    Args:
        engine: runs the workers; closed by this thread at the end.
        scheduler: decides.
        callbacks: told when no more results will come.
        name: of the pool, for threads and messages.

    Attributes:
        thread: runs all this.

    Shared data: ``_inbox`` and ``sinks`` are written by callers and read here, each in single atomic steps.
    """

    def __init__(self, engine: Engine, scheduler: Scheduler, callbacks: Callbacks, name: str) -> None:
        self.engine = engine
        engine.may_give_back = self._may_give_back
        engine.awaits_earlier = self._awaits_earlier
        self.scheduler = scheduler
        self._callbacks = callbacks
        self._pid = os.getpid()
        self._inbox = Inbox(engine.wake)
        self.sinks: dict[JobId, Sink] = {}
        self.direct: dict[JobId, tuple[str, float]] = {}  # calls in lent workers: what, and since when
        self._job_ids = itertools.count(1)
        self.names: dict[JobId, str] | None = None  # of the latest jobs, if there is to be a timeline
        self._followups: deque[Event] = deque()
        self._begun = Flag()
        self._ended = Flag()
        self.terminating = False  # nobody should be told that a worker was lost
        self.terminated_at = math.inf
        self._last_words: Failure | SharedFailure | None = None  # what tasks without an outcome get, once known
        self.error: Failure | SharedFailure | None = None  # why the pool ended by itself
        self.workers_lost = 0
        self.tasks_retried = 0
        self.tasks_timed_out = 0
        self._actions: dict[type[Any], Callable[[Any], None]] = {
            StartWorker: self._pass_on,
            SendTasks: self._pass_on,
            LendWorker: self._pass_on,
            RecallTasks: self._pass_on,
            RetireWorker: self._pass_on,
            KillWorker: self._pass_on,
            VacateSlot: self._pass_on,
            ResolveTasks: self._resolve,
            ResolveRun: self._resolve_run,
            FailTask: self._fail,
            RetryTask: self._retry,
            DropTask: self._drop,
            AnswerCancel: self._answer,
            FinishJob: self._finish,
            EndPool: self._end,
        }
        # Daemonic, so that a program that ends without closing its pool ends.
        self.thread = threading.Thread(target=self._run, name=f"{name}-handler", daemon=True)

    # Any thread -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; called once. Returns when the first workers have been asked for.

        A fork inherits the state of the moment the pool is made, so it must not happen later.
        """
        atexit.register(self._at_exit)
        self.thread.start()
        self._begun.wait()

    def open_job(
        self, job: JobId, sink: Sink, mode: int, function: Encoded, batch: int = 1, rules: Rules | None = None
    ) -> None:
        """Make a job known, before its tasks. Whoever is interrupted in this must post JobWithdrawn."""
        self.sinks[job] = sink
        self.engine.open_job(job, mode, function)
        self.post(JobOpened(job, batch, rules))

    def open_single(self, job: JobId, sink: Sink, mode: int, payload: Encoded, rules: Rules | None = None) -> None:
        """As ``open_job``, for a job of one task, which is submitted; the handler is woken once."""
        self.sinks[job] = sink
        self.engine.open_job(job, mode, None)
        self.post(JobSubmitted(job, [Task(job, 0, payload)], rules=rules))

    def new_job(self, story: str) -> JobId:
        """A number for a job; the story is what a timeline calls it."""
        job = JobId(next(self._job_ids))
        if self.names is not None:
            self.names[job] = story
            self.names.pop(JobId(job - NAMES_KEPT), None)
        return job

    def submit_soon(self, task: Task) -> None:
        """Add a task of microseconds to the end of its job: many of them are taken up together."""
        self._inbox.put_soon(task)
        if self._last_words is not None:
            self._abandon_all()

    def visit(self, basket: Basket, hurry: bool) -> None:
        """Take up what is in a basket, likewise; at once, if that is much."""
        self._inbox.announce(basket, hurry)
        if self._last_words is not None:
            self._abandon_all()

    def post(self, item: Event | Task) -> None:
        """Tell the scheduler of an event, or add a task to the end of its job; takes no lock: finalizers call it."""
        self._inbox.put(item)
        if self._last_words is not None:
            self._abandon_all()

    def cancel_job(self, job: JobId, kill: bool, asker: Callable[[bool], None] | None) -> bool:
        """Cancel a job, with what runs of it if ``kill``; this thread tells ``asker`` whether anything was dropped.

        Returns:
            Whether the answer can be waited for. A finalizer may call this in the very thread that would give it.
        """
        self.post(JobCancelled(job, kill, asker))
        return threading.current_thread() is not self.thread

    def has_started(self, job: JobId) -> bool:
        """Whether a worker holds a task of this job."""
        return self.scheduler.has_started(job)

    def terminate(self) -> None:
        """Stop everything; returns at once."""
        self.terminating = True
        self.terminated_at = min(self.terminated_at, monotonic())
        self.post(PoolTerminated(None))

    def join(self, timeout: float | None) -> bool:
        """Wait for the end; returns whether it came."""
        if threading.current_thread() is self.thread:
            return False
        return self._ended.wait(timeout)

    @property
    def ended(self) -> bool:
        """Whether the pool has come to its end."""
        return self._ended.is_set()

    def lift_back_pressure(self) -> None:
        """Let streams run to their end though nobody consumes them: somebody waits for the end of all work."""
        for sink in list(self.sinks.values()):
            sink.lift_back_pressure()

    def _may_give_back(self) -> bool:
        """Whether a caller may yet take a result and so give its memory back; see Engine."""
        return any(sink.has_consumable() for sink in list(self.sinks.values()))

    def _awaits_earlier(self) -> bool:
        """Whether a stream holds back results until an earlier one comes; see Engine."""
        return any(sink.awaits_earlier() for sink in list(self.sinks.values()))

    def forget_pool(self, description: str) -> None:
        """The pool object was collected; called by its finalizer."""
        if self._ended.is_set() or os.getpid() != self._pid:
            return
        self.terminate()
        warnings.warn(f"unclosed running multiprocessing pool {description}", ResourceWarning, stacklevel=2)

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:  # a forked child inherits the hook, not the pool
            self.terminate()
            self._ended.wait(EXIT_SECONDS)

    # The loop -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._carry_out(self.scheduler.begin())
            self._begun.set()
            while not self._ended.is_set():
                self._take_inbox()
                if not self._ended.is_set():
                    self._take_events()
        except BaseException as error:  # our bug; whoever waits must hear of it
            logger.exception("the pool's handler failed")
            self._collapse(error)

    def _take_inbox(self) -> None:
        inbox = self._inbox
        while inbox:
            item = inbox.popleft()
            if type(item) is Task:
                tasks = [item]
                while inbox and type(inbox[0]) is Task and inbox[0].job == item.job:
                    tasks.append(inbox.popleft())  # type: ignore[arg-type]
                self._handle(TasksSubmitted(item.job, tasks))
            elif type(item) is Basket:
                if spans := item.take(self.engine.encode_items):
                    self._handle(TasksSubmitted(spans[0].job, spans))
            else:
                self._handle(item)  # type: ignore[arg-type]

    def _take_events(self) -> None:
        timeout = self._inbox.fall_asleep()
        if timeout != 0 and self.scheduler.wake_at is not None:
            until = max(0.0, self.scheduler.wake_at - monotonic())
            timeout = until if timeout is None else min(until, timeout)
        self.engine.pressing = self.scheduler.wants_workers
        self.engine.can_lend = self.scheduler.can_lend
        events = self.engine.wait(timeout)
        self._inbox.wake_up()
        self._take_inbox()  # first what was asked before these came: a worker that is to leave gets no other task
        if self._ended.is_set():
            return
        for event in events:
            self._handle(event)
        wake_at = self.scheduler.wake_at
        if wake_at is not None and monotonic() >= wake_at:
            self._handle(TimePassed())

    def _handle(self, event: Event) -> None:
        try:
            actions = self.scheduler.handle(event, monotonic())
        except ProtocolError as error:
            worker: WorkerId = event.worker  # type: ignore[union-attr]
            logger.warning("worker %s is killed: %s", worker, error)
            self._pass_on(KillWorker(worker))
            return
        self._carry_out(actions)

    def _carry_out(self, actions: list[Action]) -> None:
        table = self._actions
        for action in actions:
            table[type(action)](action)
        actions.clear()  # the scheduler keeps the list; payloads and results must not wait for its next event
        while self._followups:
            # Only after all actions of one event, so that they are carried out in the scheduler's order.
            self._handle(self._followups.popleft())

    # Actions --------------------------------------------------------------------------------------------------------

    def _pass_on(self, action: Any) -> None:
        self._followups.extend(self.engine.perform(action))

    def _resolve(self, action: ResolveTasks) -> None:
        sinks = self.sinks
        for task, result in action.outcomes:
            sinks[task.job].resolve(task.index, result)

    def _resolve_run(self, action: ResolveRun) -> None:
        self.sinks[action.job].resolve_run(action.index, action.results)

    def _fail(self, action: FailTask) -> None:
        task = action.task
        sink = self.sinks[task.job]
        sink.resolve(task.index, self._explain(action.cause, task, sink))

    def _explain(self, cause: Any, task: Task, sink: Sink) -> Result:
        if isinstance(cause, WorkerLoss) and cause.ready:
            self.workers_lost += 1
            failure = failures.lost(cause, task, sink.story)
            logger.warning("%s", failure.take())
            return failure
        if isinstance(cause, TimedOut):
            self.tasks_timed_out += 1
            failure = failures.timed_out(cause, task, sink.story)
            logger.warning("%s", failure.take())
            return failure
        if cause is None:
            return failures.terminated(sink.story)
        return self._failure_to_start(cause)

    def _failure_to_start(self, cause: Any) -> Failure | SharedFailure:
        """One and the same for all tasks of the pool."""
        if self.error is None:
            self.error = failures.start_failed(cause)
        return self.error

    def _retry(self, action: RetryTask) -> None:
        task, cause = action.task, action.cause
        self.tasks_retried += 1
        self.workers_lost += isinstance(cause, WorkerLoss)
        self.tasks_timed_out += isinstance(cause, TimedOut)
        story = self.sinks[task.job].story
        logger.warning("task %d of %s is tried again: %s", task.index, story, failures.why(cause))

    def _drop(self, action: DropTask) -> None:
        sink = self.sinks.get(action.task.job)
        if sink is not None:  # else the job was finished, and its feeder has just added this
            for task in action.task.items():
                sink.drop(task.index)

    def _answer(self, action: AnswerCancel) -> None:
        action.asker(action.dropped)

    def _finish(self, action: FinishJob) -> None:
        self.engine.forget_job(action.job)
        sink = self.sinks.pop(action.job, None)
        if sink is not None:  # else it was withdrawn: never opened, or finished before
            sink.finish()

    def _end(self, action: EndPool) -> None:
        if action.error is not None:
            self._failure_to_start(action.error)
        self.engine.close()
        self._conclude(self.error or failures.terminated("this call"))

    # The end --------------------------------------------------------------------------------------------------------

    def _collapse(self, error: BaseException) -> None:
        """Our bug: end the pool with it. Closing the engine's connections ends its workers."""
        self.error = Failure(TpoolError(f"the pool failed by a bug of tpool: {error!r}"))
        self.error.take().__cause__ = error
        try:
            self.engine.close()
        finally:
            self._begun.set()
            self._conclude(self.error)

    def _conclude(self, failure: Failure | SharedFailure) -> None:
        self._last_words = failure
        self._ended.set()
        self._abandon_all()
        self._callbacks.end()
        atexit.unregister(self._at_exit)

    def _abandon_all(self) -> None:
        """Whatever was submitted in the moment of the end has an outcome too."""
        assert self._last_words is not None
        self._inbox.clear()
        while self.sinks:
            _, sink = self.sinks.popitem()
            sink.abandon(self._last_words)
