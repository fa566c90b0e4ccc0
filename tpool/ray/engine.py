"""The engine boundary over Ray: one actor for each worker, and Ray's own retries and restarts switched off.

::

    actions ─► perform ─► Member ─► calls of the actor ─────────────────────────────┐
                                                                                    ▼ (another process, another node)
    events  ◄─ wait ◄── inbox ◄── callbacks, in a thread of Ray's ◄── a call ended: its value, or Ray's error

Nothing polls: Ray calls back when a call has ended, one way or the other, and the handler's thread is woken.
All state but what ``encode``, ``open_job`` and Ray's callbacks touch belongs to the handler's thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tpool.engine import WorkerAction
from tpool.local.crew import SlotRecord
from tpool.messages import (
    Event,
    KillWorker,
    LendWorker,
    RecallTasks,
    RetireWorker,
    SendTasks,
    StartWorker,
    VacateSlot,
    WorkerExited,
)
from tpool.outstanding import Piece
from tpool.ray.cluster import Cluster
from tpool.ray.codec import RayCodec
from tpool.ray.journal import Journals
from tpool.ray.looks import RayLook
from tpool.ray.member import Member, SentCall, Shared
from tpool.ray.orders import Orders
from tpool.ray.parcels import Parcel, pack
from tpool.ray.private import PrivateMemory
from tpool.ray.settings import RaySettings
from tpool.ray.starting import Starting
from tpool.task import JobId
from tpool.tensors.definitions import Definitions
from tpool.tensors.held import Holder, Reference
from tpool.tensors.payload import HeldObject, Payload
from tpool.tensors.plain import dumps_plain

__all__ = ["ActorEngine"]

Encoded = Parcel | bytes

STORE_SHARE = 4
"""What part of a node's object store each process may hold mapped by tensors that are in use: what is held cannot be
spilled. Less: large tensors are copied sooner. More: a caller who keeps results leaves no room for others."""


class ActorEngine:
    """Runs workers as actors; see ``tpool.engine.Engine``.

    Args:
        settings: what the user asked for.
        cluster: the connection; let go of in ``close``.
        processes: how many workers there are.
    """

    sharing = "copy"
    shares_memory = False
    packs_items = False  # a call of Ray's carries several tasks anyway
    logs = None

    def __init__(self, settings: RaySettings, cluster: Cluster, processes: int) -> None:
        self._cluster = cluster
        self._ray = cluster.ray
        self.may_give_back: Callable[[], bool] = lambda: False
        self.awaits_earlier: Callable[[], bool] = lambda: False
        self.tell_waiting: Callable[[str], object] = str
        self.pressing = self.can_lend = False
        self._slots = [SlotRecord() for _ in range(processes)]
        store_nbytes = cluster.store_nbytes() // STORE_SHARE
        self._memory = PrivateMemory(store_nbytes)
        definitions = Definitions()
        self._codec = RayCodec(definitions)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._journals = Journals()
        try:
            self._holder = Holder(self._codec.memory, self.wake)
            self._orders = Orders(definitions, self._ray.put, self._slots)
            initializer = pack(self._codec.dumps((settings.initializer, settings.initargs)), self._ray.put)
        except BaseException:
            os.close(self._wake_fd)
            raise
        self._results: weakref.WeakSet[Any] = weakref.WeakSet()
        self._shared = Shared(self._ray, self._post, self._codec, self._memory, self._results)
        self._starting = Starting(settings, cluster, self._slots, store_nbytes, initializer, self._orders,
                                  self._journals, lambda text: self.tell_waiting(text))  # fmt: skip
        self._members: dict[int, Member] = {}
        # Appended to by Ray's threads.
        self._inbox: deque[tuple[Member, str, SentCall | None, Any]] = deque()
        self._poll = select.poll()
        self._poll.register(self._wake_fd, select.POLLIN)

    # Any thread -----------------------------------------------------------------------------------------------------

    def encode(self, obj: Any, patient: Callable[[], bool] | None = None) -> Encoded:
        """See Engine; a snapshot. Never waits for memory: Ray spills what its store cannot hold."""
        stream = dumps_plain(obj)
        return self._pack(self._codec.dumps(obj)) if stream is None else stream

    def encode_items(self, items: tuple[Any, ...]) -> Encoded:
        """See Engine."""
        raise AssertionError("tasks on Ray have one item each")

    def encode_call(self, function: Any, args: tuple[Any, ...], kwds: dict[str, Any]) -> Encoded:
        """See Engine."""
        payload = self._codec.dumps_call(function, args, kwds)
        return payload if isinstance(payload, bytes) else self._pack(payload)

    def _pack(self, payload: Payload) -> Parcel:
        return pack(payload, self._ray.put)

    def weigh(self, encoded: Encoded) -> tuple[int, Sequence[Piece]]:
        """See Engine: whatever is sent again is stored again."""
        return (len(encoded) if isinstance(encoded, bytes) else encoded.nbytes), ()

    def call_now(self, job: JobId, payload: Encoded) -> None:
        """See Engine: an actor is never lent, as a call of it costs more than the way through the handler."""

    def put(self, obj: object, share: bool = False) -> Reference:
        """See Engine: stored once for the whole cluster. What ``share`` asks for is not to be had."""
        return Reference(self._hold, obj)

    def _hold(self, obj: object) -> HeldObject:
        return self._holder.hold(self._pack(self._codec.dumps(obj)))  # type: ignore[arg-type]

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See Engine: an ordinary tensor, as there is no memory that all nodes share."""
        return torch.empty(size, dtype=dtype, device="cpu")

    def open_job(self, job: JobId, mode: int, function: Encoded | None) -> None:
        """See Engine."""
        if function is not None:
            self._orders.jobs[job] = mode, function

    def make_room(self, processes: int) -> None:
        """See Engine."""
        self._slots.extend(SlotRecord() for _ in range(processes - len(self._slots)))

    def wake(self) -> None:
        """See Engine."""
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile: nobody is left to wake
            os.eventfd_write(self._wake_fd, 1)

    def look(self) -> RayLook:
        """What is known of the workers."""
        return RayLook(self._slots, self._ray, self._members)

    def _post(self, member: Member, kind: str, call: SentCall | None, value: Any) -> None:
        self._inbox.append((member, kind, call, value))
        self.wake()

    # Actions --------------------------------------------------------------------------------------------------------

    def forget_job(self, job: JobId) -> None:
        """See Engine."""
        if self._orders.jobs.pop(job, None) is not None:
            for member in self._members.values():
                self._orders.forget_job(member, job)

    def perform(self, action: WorkerAction) -> list[Event]:
        """See Engine."""
        if isinstance(action, StartWorker):
            self._members[action.worker] = self._starting.start(action, self._shared, self._slots[action.slot])
            return []
        if isinstance(action, VacateSlot):
            self._slots[action.slot].vacant = True
            return []
        member = self._members.get(action.worker)
        if member is None:
            return []  # it is gone, and the scheduler is about to hear of it
        if isinstance(action, SendTasks):
            self._orders.send_tasks(member, action.tasks)
        elif isinstance(action, RecallTasks):
            member.recall()
        elif isinstance(action, RetireWorker):
            member.retire()
        elif isinstance(action, KillWorker):
            member.kill()
        else:
            assert not isinstance(action, LendWorker), "nobody asked for a loan"
        return []

    # Events ---------------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None) -> list[Event]:
        """See Engine."""
        events: list[Event] = []
        self._drop_objects()
        if not self._inbox:
            self._block(self._starting.until_due(timeout))
        while self._inbox:
            member, kind, call, value = self._inbox.popleft()
            if member.id in self._members:
                self._hear(member, kind, call, value, events)
        self._starting.check(self._members)
        return events

    def _hear(self, member: Member, kind: str, call: SentCall | None, value: Any, events: list[Event]) -> None:
        member.hear(kind, call, value, events)
        self._starting.hear(member, kind, value)
        if member.gone:
            del self._members[member.id]
            unstarted = member.settle_estate(self._journals.get(member.slot), events)
            events.append(WorkerExited(member.id, unstarted, member.sent, member.bury()))

    def _block(self, timeout: float | None) -> None:
        if self._poll.poll(None if timeout is None else timeout * 1000):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)

    def _drop_objects(self) -> None:
        dropped = self._holder.take_dropped()
        if dropped:
            for member in self._members.values():
                self._orders.drop_objects(member, dropped)

    # The end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See Engine."""
        for member in self._members.values():
            with contextlib.suppress(Exception):  # Ray itself may be gone
                member.kill()
        self._members.clear()
        self._inbox.clear()
        self._orders.jobs.clear()
        self._starting.close()
        if self._cluster.ends_with_us:
            self._keep_results()
        self._cluster.release()
        self._memory.close()
        self._journals.close()
        wake_fd, self._wake_fd = self._wake_fd, -1
        os.close(wake_fd)

    def _keep_results(self) -> None:
        """Results outlive their pool, but not the object store, which ends now."""
        for result in list(self._results):
            with contextlib.suppress(Exception):  # it is lost, which will be told to whoever asks for it
                result.keep()
