"""What the supervisor and the members of one pool write down together."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from tpool.messages import JobId
from tpool.tensors.payload import Payload

__all__ = ["Crew", "SlotRecord"]

Jobs = dict[JobId, tuple[int, Payload | bytes]]

LOSSES_KEPT = 8
"""How many stories of earlier workers a slot remembers."""


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

    def seconds_up(self) -> float:
        """How long the slot has had a worker that was ready."""
        since = self.up_since
        return self.up_seconds + (0.0 if since is None else monotonic() - since)

    def note_ready(self) -> None:
        """A worker became ready."""
        self.up_since = monotonic()

    def note_end(self, loss: object) -> None:
        """The worker is gone."""
        self.up_seconds = self.seconds_up()
        self.up_since = self.pid = None
        self.losses.append(loss)


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
