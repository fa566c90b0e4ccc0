"""The boundary between deciding and doing: what the handler needs of whatever runs the workers.

An engine carries out the scheduler's actions for workers and reports what happens to them as events. Payloads and
results are its own: it makes them in ``encode`` and hands them back in events, and nobody between opens them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tpool.local.crew import SlotRecord
from tpool.local.logs import LogReceiver
from tpool.messages import (
    Event,
    KillWorker,
    LendWorker,
    RecallTasks,
    RetireWorker,
    SendTasks,
    StartWorker,
    VacateSlot,
)
from tpool.outstanding import Piece
from tpool.task import JobId, WorkerId
from tpool.tensors.held import Reference

WorkerAction = StartWorker | SendTasks | LendWorker | RecallTasks | RetireWorker | KillWorker | VacateSlot


@dataclass(slots=True, eq=False)
class WorkerLoss:
    """Why a worker is gone; the ``cause`` of ``WorkerExited``.

    Attributes:
        worker: a name for messages, such as ``worker 3 (slot 1)``.
        pid: its process, or None if it never had one.
        exitcode: negative for a signal; None where unknown.
        ready: whether it had become ready; a loss before that is a failure to start.
        story: what happened, as the rest of a sentence that begins with the worker's name.
    """

    worker: str
    pid: int | None
    exitcode: int | None
    ready: bool
    story: str


# An object ready to be sent, in the engine's own form; lives until nobody may have to send it again.
Encoded = Any


class Result(Protocol):
    """What a worker answered: leased on arrival, decoded once, by whoever waits for it."""

    @property
    def failed(self) -> bool:
        """Whether it is an exception."""

    @property
    def seconds(self) -> float:
        """How long the task ran, its decoding and encoding included."""

    @property
    def nbytes(self) -> int:
        """How much memory it takes until it is decoded and let go. Asked before ``take``."""

    def take(self) -> Any:
        """The value, or the exception object; user code runs here. Called at most once.

        Raises:
            DecodeError: it could not be unpickled.
        """

    def discard(self) -> None:
        """Give back what it holds without decoding it."""


class Look(Protocol):
    """What an engine tells of its workers, for people; from any thread, as it is at the moment."""

    slots: list[SlotRecord]

    @property
    def tasks_done(self) -> int:
        """How many tasks were answered."""

    def memory_nbytes(self, slot: int | None) -> tuple[int, int]:
        """Shared memory that a slot has (the caller for None), and the most that it ever had."""

    def direct_job(self, worker: WorkerId) -> JobId | None:
        """The call that a caller makes in this worker directly."""

    def stack(self, slot: int) -> str | None:
        """Where the slot's worker is; None if it does not say."""


class Engine(Protocol):
    """Runs workers.

    ``encode``, ``open_job``, ``look``, ``make_room`` and ``wake`` may be called from any thread; all else from the
    handler's.

    Attributes:
        may_give_back: set by the handler: whether a caller may yet take results that hold memory. Where nobody may,
            waiting for memory is hopeless once no worker runs anything.
        awaits_earlier: set by the handler: whether results of a stream are held back only until an earlier one comes.
            Its worker must not wait for the memory that they hold.
        tell_waiting: set by the pool: told, in the handler's thread, what workers wait for before they can start; with
            an empty text once they do not.
        pressing: set by the handler before ``wait``: lent workers are needed back.
        can_lend: likewise: some worker is idle and might be lent.
    """

    may_give_back: Callable[[], bool]
    awaits_earlier: Callable[[], bool]
    tell_waiting: Callable[[str], object]
    pressing: bool
    can_lend: bool

    @property
    def sharing(self) -> str:
        """What sending a tensor means: ``share`` or ``copy``."""

    @property
    def shares_memory(self) -> bool:
        """Whether a worker can write where the caller reads, if that is asked for."""

    @property
    def logs(self) -> LogReceiver | None:
        """Hands on what workers log; None if nothing does."""

    def encode(self, obj: Any, patient: Callable[[], bool] | None = None) -> Encoded:
        """Make an object ready to be sent, in the caller's thread; may wait for memory.

        Args:
            obj: what to send.
            patient: asked while this waits: whether to wait also for memory that only the consumer of results can
                give back. A feeder may, since it is not the consumer, unless that waits for results itself.

        Raises:
            SharedMemoryExhausted: there is not enough shared memory.
            Exception: whatever pickling raises.
        """

    @property
    def packs_items(self) -> bool:
        """Whether it takes spans: tasks of several items."""

    def encode_items(self, items: tuple[Any, ...]) -> Encoded:
        """The payload of a span of light items; in the handler's thread. Where ``packs_items``."""

    def encode_call(self, function: Any, args: tuple[Any, ...], kwds: dict[str, Any]) -> Encoded:
        """Make a whole call ready to be sent, as ``encode`` does."""

    def call_now(self, job: JobId, payload: Encoded) -> Result | WorkerLoss | None:
        """Make a call in a lent worker, in the caller's thread, and wait for its answer.

        Args:
            job: names the call.
            payload: from ``encode_call``.

        Returns:
            The result; why the worker was lost that ran it; or None: it did not run, and is to be submitted.
        """

    def weigh(self, encoded: Encoded) -> tuple[int, Sequence[Piece]]:
        """How much memory an encoded object takes while it waits to be sent and used.

        Returns:
            How many bytes of its own; and the pieces of shared memory that it refers to, as others may.
        """

    def put(self, obj: object, share: bool = False) -> Reference:
        """Have the workers keep an object; encoded at once, sent when a worker first needs it.

        Args:
            obj: which.
            share: its tensors are to be shared with the workers, even in a pool where they are copied.
        """

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in shared memory, whose values are whatever was there before; may wait for memory."""

    def make_room(self, processes: int) -> None:
        """There may be workers in slots below this number from now on; called before the scheduler hears of it.

        By one thread at a time. Where nothing has to be made ready, there is nothing to do.

        Raises:
            PlatformError: there is no room for them, and nothing has changed.
            ValueError: there never can be for so many.
        """

    def look(self) -> Look:
        """What is known of the workers."""

    def open_job(self, job: JobId, mode: int, function: Encoded | None) -> None:
        """Keep what all tasks of a job have in common; sent once to each worker that gets one of them."""

    def forget_job(self, job: JobId) -> None:
        """No task of this job will be sent any more."""

    def perform(self, action: WorkerAction) -> list[Event]:
        """Carry out an action; returns what is known of it at once."""

    def wait(self, timeout: float | None) -> list[Event]:
        """What happened; blocks until something has, ``wake`` was called, or ``timeout`` seconds have passed."""

    def wake(self) -> None:
        """Have ``wait`` return soon. Takes no lock, so finalizers may call it."""

    def close(self) -> None:
        """Let go of everything; no worker is left."""
