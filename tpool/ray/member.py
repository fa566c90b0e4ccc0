"""One actor as the engine sees it: what it was told, what it owes, what it says.

    StartWorker ─► the actor is asked for ─hello─► it has a process ─begin─► ready ─► runs calls ─► retires
                                                                                      │
                   ``live`` fails, whatever it is doing, and every call it holds fails too ─► it is gone

Calls are worked on in the order in which they were made, but Ray may call back in another: an answer that comes early
waits for those before it. The end is believed when ``live`` and all calls have come to
theirs: what was answered before the death is delivered before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tpool.engine import WorkerLoss
from tpool.local.crew import SlotRecord
from tpool.messages import (
    Event,
    InitializerFailed,
    RecallSettled,
    TaskFaltered,
    TasksFinished,
    TasksRecalled,
    WorkerBecameReady,
)
from tpool.ray import parcels
from tpool.ray.answers import RayResult
from tpool.ray.journal import Journal, Record
from tpool.ray.tasks import Answer, Call, Reply
from tpool.task import JobId, WorkerId

__all__ = ["Member", "SentCall", "Shared"]

logger = logging.getLogger("tpool")

MAX_TEXT = 600
"""How much of Ray's own words is told."""

Post = Callable[["Member", str, Any, Any], None]


@dataclass(slots=True)
class Shared:
    """What the members of one pool share.

    Attributes:
        ray: the module.
        post: tells the engine, from any thread, that a call of a member has ended: (member, kind, call, value).
        codec, memory: of the caller.
        results: those that may hold buffers in the object store.
    """

    ray: Any
    post: Post
    codec: Any
    memory: Any
    results: Any


@dataclass(slots=True, eq=False)
class SentCall:
    """A call that was made.

    Attributes:
        number: counts the member's calls from 1.
        count: how many of its tasks were neither answered nor taken back.
        buffers: Ray's reference to the buffers of its results.
        early: answers that were given before its end and have come, each with the reference to their buffers.
        early_heard: how many of these were heard.
        answered: how many of its tasks were.
        outcome: what it came to, while that waits for earlier calls.
        open: it has not ended, one way or the other.
    """

    number: int
    count: int
    buffers: Any = None
    early: list[tuple[Reply, Any]] = field(default_factory=list)
    early_heard: int = 0
    answered: int = 0
    outcome: Any = None
    open: bool = True


@dataclass(eq=False)
class Member:
    """One worker.

    Attributes:
        id: the scheduler's name for it.
        slot: its place.
        actor: Ray's handle.
        shared, record: see there.
        pid, node: once it has a process.
        ready: it ran its initializer.
        keeps_journal: it is on this machine; see ``journal``.
        sent_jobs, sent_groups, sent_objects: what it was told once.
        news: what it is to be told with the next call.
        calls: those that are open, or hold tasks; in order.
        story: why we gave it up, or why it left.
        leaving: it has said that it runs nothing more.
        sent: how many tasks it was sent.
        ended: ``live`` has failed.
    """

    id: WorkerId
    slot: int
    actor: Any
    shared: Shared
    record: SlotRecord
    pid: int | None = None
    node: str | None = None
    ready: bool = False
    keeps_journal: bool = False
    sent_jobs: set[JobId] = field(default_factory=set)
    sent_groups: set[Any] = field(default_factory=set)
    sent_objects: set[int] = field(default_factory=set)
    news: list[tuple[str, int, Any]] = field(default_factory=list)
    calls: dict[int, SentCall] = field(default_factory=dict)
    story: str = ""
    exitcode: int | None = None
    leaving: bool = False
    ended: bool = False
    retiring: bool = False
    sent: int = 0
    _number: int = 0

    def __str__(self) -> str:
        return f"worker {self.id} (slot {self.slot})"

    # To the worker --------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Be told of its process, and of its end."""
        self._stay_informed()
        self._ask("hello", self.actor.hello.remote())

    def _stay_informed(self) -> None:
        reply, buffers = self.actor.live.options(concurrency_group="life", num_returns=2).remote()
        self._ask("live", reply, SentCall(0, 0, buffers))

    def begin(self, hello: Any, call: Call, refs: list[Any]) -> None:
        """Have it become a worker."""
        reply, buffers = self.actor.begin.options(num_returns=2).remote(hello, call, *refs)
        self._ask("begin", reply, SentCall(0, 0, buffers))

    def send(self, call: Call, refs: list[Any]) -> None:
        """Give it a call, and the news."""
        self._number += 1
        call.number = self._number
        call.news, self.news = [*self.news, *call.news], []
        reply, buffers = self.actor.run.options(num_returns=2).remote(call, *refs)
        self.calls[call.number] = sent = SentCall(call.number, len(call.tasks), buffers)
        self.sent += len(call.tasks)
        self._ask("run", reply, sent)

    def recall(self) -> None:
        """Ask for what it has not started."""
        asked = self.actor.recall.options(concurrency_group="control").remote(self._number)
        self._ask("recall", asked)

    def retire(self) -> None:
        """Let it end as a program does."""
        if not self.retiring:
            self.retiring = True
            self._ask("retire", self.actor.retire.remote())

    def stack(self) -> Any:
        """A reference to where it is in its code."""
        return self.actor.stack.options(concurrency_group="control").remote()

    def kill(self) -> None:
        """End its process, or the request for one."""
        self.shared.ray.kill(self.actor, no_restart=True)

    def _ask(self, kind: str, ref: Any, call: SentCall | None = None) -> None:
        post = self.shared.post
        # In a thread of Ray's, with whatever the value is; it must not be kept waiting.
        ref._on_completed(lambda value: post(self, kind, call, value))

    # From the worker ------------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """How many tasks it was sent and has neither answered nor given back."""
        return sum([call.count for call in self.calls.values()])

    @property
    def gone(self) -> bool:
        """Whether nothing more will be heard of it."""
        return self.ended and not any(call.open for call in self.calls.values())

    def hear(self, kind: str, call: SentCall | None, value: Any, events: list[Event]) -> None:
        """Take note of the end of a call."""
        if kind == "live":
            self._hear_early(value, call, events)
        elif kind == "run":
            assert call is not None
            call.outcome = value
            self._hear_in_order(events)
        elif isinstance(value, BaseException):
            self._hear_failure(value)
        elif kind == "hello":
            self.pid, self.node = value
            self.record.pid = self.pid
            logger.info("%s started, pid %d on node %s", self, *value)
        elif kind == "begin":
            self._hear_begun(value, call, events)
        elif kind == "recall":
            self._hear_recalled(value, events)
        elif kind == "retire":
            self._hear_retired(value)

    def _hear_early(self, value: Any, call: SentCall | None, events: list[Event]) -> None:
        if isinstance(value, BaseException):
            self.ended = True
            self._hear_failure(value)
        else:
            assert call is not None
            self.calls[value.number].early.append((value, call.buffers))
            self._stay_informed()
        self._hear_in_order(events)

    def _hear_in_order(self, events: list[Event]) -> None:
        for call in [each for each in self.calls.values() if each.open]:
            for reply, buffers in call.early:
                call.early_heard += 1
                self._hear_answers(reply, buffers, call, events)
            call.early.clear()
            if call.outcome is None:
                return
            if isinstance(call.outcome, Reply) and call.outcome.early > call.early_heard:
                if not self.ended:
                    return
                call.outcome = self.shared.ray.exceptions.RayActorError()  # with its first answers, all are lost
            outcome, call.outcome, call.open = call.outcome, None, False
            if isinstance(outcome, BaseException):
                self._hear_failure(outcome)  # what it holds is lost with the worker
            else:
                self._hear_reply(outcome, call, events)
                self._settle(call, 0)

    def _hear_failure(self, error: BaseException) -> None:
        if not self.story and self.exitcode is None:
            self.story = _story_of(error, self.shared.ray)
        if not self.ended and not isinstance(error, self.shared.ray.exceptions.RayActorError):
            # It lives, but what it had to do failed in Ray's hands: an argument that was lost, memory, a bug of ours.
            self.kill()

    def _hear_begun(self, value: Reply, call: SentCall | None, events: list[Event]) -> None:
        assert call is not None
        if value.answers:
            events.append(InitializerFailed(self.id, self._result(value.answers[0], call.buffers)))
            self.kill()
            return
        self.ready = True
        self.keeps_journal = value.journal
        self.record.note_ready()
        logger.info("%s is ready, pid %s", self, self.pid)
        events.append(WorkerBecameReady(self.id))

    def _hear_reply(self, reply: Reply, call: SentCall, events: list[Event]) -> None:
        self._hear_answers(reply, call.buffers, call, events)
        self.record.transferred += reply.transfer_seconds
        if reply.excess:
            self.story = f"left, as {reply.excess}"
            self.exitcode, self.leaving = 0, True
            self.retire()

    def _hear_answers(self, reply: Reply, buffers: Any, call: SentCall, events: list[Event]) -> None:
        results: list[tuple[JobId, int, Any, float]] = []
        for answer in reply.answers:
            job, index, status, seconds = answer[:4]
            result = self._result(answer, buffers)
            self.record.tasks_done += 1
            self.record.busy_seconds += seconds
            if status != "faltered":
                results.append((JobId(job), index, result, seconds))
                continue
            if results:
                events.append(TasksFinished(self.id, results))
                results = []
            events.append(TaskFaltered(self.id, JobId(job), index, result, seconds))
        if results:
            events.append(TasksFinished(self.id, results))
        # What it did not start is given back by `recall`, or at its end.
        call.count -= len(reply.answers)
        call.answered += len(reply.answers)

    def _result(self, answer: Answer, buffers: Any) -> Any:
        _, _, status, seconds, text, payload, count = answer
        wired: parcels.Wired = (payload, (), -1) if isinstance(payload, bytes) else payload
        stream, inline, place = wired
        nbytes = len(stream or b"") + sum(map(len, inline))
        self.record.piped_nbytes += nbytes
        shared = self.shared
        ref = buffers if place >= 0 else None
        result = RayResult(status != "value", wired, count, ref, nbytes, seconds, text, shared.codec, shared.memory,
                           shared.ray.get)  # fmt: skip
        if ref is not None:
            shared.results.add(result)
        return result

    def _hear_recalled(self, value: tuple[int, int], events: list[Event]) -> None:
        begun, left = value
        count = left
        if left:
            self._settle(self.calls[begun], left)
        for call in [each for each in self.calls.values() if each.number > begun]:
            count += call.count
            self._settle(call, call.count)
        events.append(TasksRecalled(self.id, count))
        if count:
            events.append(RecallSettled(self.id))

    def _settle(self, call: SentCall, count: int) -> None:
        """So many of a call's tasks are no longer the member's."""
        call.count -= count
        if not call.count and not call.open:
            del self.calls[call.number]

    def _hear_retired(self, story: str | None) -> None:
        if story is not None:
            logger.warning("worker_exit of %s, pid %s, raised:\n%s", self, self.pid, story)
        self.exitcode = 0
        self.kill()

    def settle_estate(self, journal: Journal | None, events: list[Event]) -> int:
        """Of one that is gone: deliver what it had done and could not say any more.

        Returns:
            How many of the tasks that it held were never started; none where that is not known, as no task may be
            started twice.
        """
        if self.leaving or journal is None or not self.keeps_journal:
            return self.held if self.leaving else 0
        last, unstarted, complete = journal.call, 0, True
        for call in [each for each in self.calls.values() if each.count]:
            if call.number > last:
                unstarted += call.count
                continue
            page = journal.read(call.number)
            if page is None:
                complete = False
                continue
            if complete:  # else tasks are lost that come before these
                self._inherit(call, page.records[call.answered :], events)
            complete = complete and not call.count
            if call.number == last:
                unstarted += max(0, call.count - max(0, page.started - call.answered))
        return unstarted

    def _inherit(self, call: SentCall, records: list[Record], events: list[Event]) -> None:
        answers: list[Answer] = [
            (job, index, "value", seconds, "", stream, 0) for job, index, seconds, stream in records
        ]
        if answers:
            self._hear_answers(Reply(answers), None, call, events)

    def bury(self) -> WorkerLoss:
        """It is gone; returns why."""
        loss = WorkerLoss(str(self), self.pid, self.exitcode, self.ready, self.story)
        self.record.note_end(loss)
        logger.info("%s ended, pid %s: %s", self, self.pid, self.story or f"exit code {self.exitcode}")
        return loss


def _story_of(error: BaseException, ray: Any) -> str:
    """What Ray says of an end, as the rest of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("class_name:", "actor_id:", "namespace:", "pid:", "ip:"))]
    text = " ".join(line for line in told if line != ray.exceptions.ActorDiedError.BASE_ERROR_MSG)
    text = text.partition("Worker exit detail: ")[2] or text
    text = text.partition(" Some common causes include")[0]
    return f"was lost (Ray says: {text[:MAX_TEXT] or type(error).__name__})"
