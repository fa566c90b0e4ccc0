"""What the supervisor and the members of one pool write down together."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from tpool.local.outbox import Outbox
from tpool.local.trace import Trace
from tpool.task import JobId
from tpool.tensors.payload import Payload

__all__ = ["Crew", "Life", "SlotRecord"]

Jobs = dict[JobId, tuple[int, Payload | bytes]]

LOSSES_KEPT = 8
"""How many stories of earlier workers a slot remembers."""


LIVES_KEPT = 1000
"""How many earlier workers of a slot a timeline shows. Where each runs few tasks there are many."""


@dataclass(slots=True)
class Life:
    """When a worker was there, in seconds of the machine's monotonic clock; for a timeline.

    Attributes:
        began: it was asked for.
        pid: its process.
        ready: its initializer had run; None if it never did.
        ended: it was gone; None while it is not.
        loss: why, a ``WorkerLoss``.
        cut: the (job, index, began) of the task that ended with it; None if there was none.
    """

    began: float
    pid: int | None = None
    ready: float | None = None
    ended: float | None = None
    loss: Any = None
    cut: tuple[int, int, float] | None = None


@dataclass(slots=True)
class SlotRecord:
    """What the workers of one slot have done; written by the handler's thread, or by whoever has borrowed the worker.

    Attributes:
        tasks_done, busy_seconds, moved_nbytes, piped_nbytes: see ``WorkerStats``.
        workers: how many there were.
        pid: of the present one.
        up_since: when that became ready; None if it is not.
        up_seconds: how long the earlier ones were ready.
        losses: why the latest of them are gone, each a ``WorkerLoss``.
        outbox: of the present worker, who writes there how long it was decoding and encoding.
        transferred: how long the earlier ones were.
        trace: what they did; None if nobody wants to know.
        lives: when they were there, if there is a trace.
        vacant: the pool is smaller now, and the slot has no worker.
    """

    tasks_done: int = 0
    busy_seconds: float = 0.0
    moved_nbytes: int = 0
    piped_nbytes: int = 0
    workers: int = 0
    pid: int | None = None
    up_since: float | None = None
    up_seconds: float = 0.0
    losses: deque[Any] = field(default_factory=lambda: deque(maxlen=LOSSES_KEPT))
    outbox: Outbox | None = None
    transferred: float = 0.0
    trace: Trace | None = None
    lives: deque[Life] = field(default_factory=lambda: deque(maxlen=LIVES_KEPT))
    vacant: bool = False

    def seconds_up(self) -> float:
        """How long the slot has had a worker that was ready."""
        since = self.up_since
        return self.up_seconds + (0.0 if since is None else monotonic() - since)

    def seconds_transferring(self) -> float:
        """How long its workers have spent on decoding and encoding; a little ahead of the results that have come."""
        outbox = self.outbox
        return self.transferred + (0.0 if outbox is None else outbox.transferred[0])

    def note_start(self, outbox: Outbox) -> None:
        """A worker is to be started; its outbox is new."""
        self.workers += 1
        self.vacant = False
        self.outbox = outbox
        if self.trace is not None:
            self.lives.append(Life(monotonic()))

    def note_process(self, pid: int) -> None:
        """It has a process."""
        self.pid = pid
        if self.trace is not None:
            self.lives[-1].pid = pid

    def note_ready(self) -> None:
        """A worker became ready."""
        self.up_since = monotonic()
        if self.trace is not None:
            self.lives[-1].ready = self.up_since

    def note_end(self, loss: object) -> None:
        """The worker is gone."""
        self.up_seconds = self.seconds_up()
        self.up_since = self.pid = None
        self.transferred, self.outbox = self.seconds_transferring(), None
        self.losses.append(loss)
        if self.trace is not None:
            life = self.lives[-1]
            life.ended, life.loss, life.cut = monotonic(), loss, self.trace.take_running()


@dataclass(slots=True)
class Crew:
    """What the members of one pool share; the handler's thread's, but for ``jobs``, to which callers add.

    Attributes:
        slots: what each slot has done.
        jobs: what the tasks of each open job have in common.
        starving: members that wait for memory, in the order in which they began to.
        forgetful: members that have not been told of jobs and objects to be forgotten.
    """

    slots: list[SlotRecord]
    jobs: Jobs = field(default_factory=dict)
    starving: dict[Any, None] = field(default_factory=dict)
    forgetful: dict[Any, None] = field(default_factory=dict)
