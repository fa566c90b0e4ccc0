"""The worker supervisor: starts, watches, feeds, reaps and kills the worker processes of one pool.

    actions ─► perform ─► launcher (zygote, fork, spawn)
                     └──► channel of each member ─► frames
    events  ◄─ wait ◄──── epoll over channels, pidfds, launcher, wake

All state but what ``encode`` and ``open_job`` touch belongs to the handler's thread.

Invariants:

- A worker's exit is believed when its pidfd says so *and* its status was reaped (or its zygote died), and only after
  its channel was read dry; so a result that was written before the death is delivered before it.
- Claims are posted before the tasks are sent. What is left of them at the end are the tasks that never started.
- A slot's arena and peer outlive its workers; what the dead one had lent stays valid and is told to the next one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable
from time import monotonic

from tpool.engine import Result, WorkerAction, WorkerLoss
from tpool.errors import ProtocolError
from tpool.local.channel import Channel, Frame, connection
from tpool.local.crew import Crew, SlotRecord
from tpool.local.encoding import Encoder
from tpool.local.hunger import STARVING_SECONDS, Hunger
from tpool.local.launch import Launched, Launcher, LaunchEvent, LaunchFailed, Reaped
from tpool.local.lending import Lending
from tpool.local.lingering import Lingering
from tpool.local.logs import LogReceiver
from tpool.local.looks import Look
from tpool.local.member import Member
from tpool.local.poller import Poller
from tpool.local.setup import PoolMemory, Settings, make_launcher
from tpool.local.wire import Kind
from tpool.messages import (
    Event,
    KillWorker,
    LendWorker,
    RecallTasks,
    RetireWorker,
    SendTasks,
    StartWorker,
    TasksRecalled,
    VacateSlot,
    WorkerExited,
)
from tpool.task import JobId
from tpool.tensors.payload import Payload

# How long the exit status of an ended worker is waited for. The zygote answers within a millisecond, unless it was
# stopped or the machine is very busy; then only the status in a message is lost.
REAP_SECONDS = 0.25


class LocalEngine(Encoder):
    """Runs workers as processes of this machine; see ``tpool.engine.Engine``.

    Args:
        settings: what the user asked for.

    The caller's thread makes it; from the first ``perform`` on, the handler's thread owns it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._hunger = Hunger(self.wake)
        self._hungry = False  # somebody waits for memory: idle memory of ours is to be found and given up
        self.may_give_back: Callable[[], bool] = lambda: False
        self.awaits_earlier: Callable[[], bool] = lambda: False
        self.tell_waiting: Callable[[str], object] = str
        self.pressing = self.can_lend = False
        self._memory = PoolMemory(settings, self._hunger.wait)
        self.logs: LogReceiver | None = self._memory.logs
        self._crew = Crew([SlotRecord(trace=self._memory.trace(slot)) for slot in range(settings.processes)])
        super().__init__(self._memory, self._hunger, self._crew)
        self._initializer: Payload | None = None
        try:
            if settings.method != "fork":
                self._initializer = self._codec.dumps((settings.initializer, settings.initargs), spawning=True)
        except BaseException:
            os.close(self._wake_fd)
            self._memory.close()
            raise
        self._members: dict[int, Member] = {}
        self._lingering = Lingering()
        self._unreaped: dict[int, float] = {}  # ended workers whose status is due, until when
        self._launched = 0
        self._poller = Poller()
        self._lending = Lending(self._poller, self.wake, self._watch_channel, self._understand, self._poller.flush)
        # Edge-triggered, so that it need not be read: a system call less, in which another thread could take the
        # interpreter lock away from the handler.
        self._poller.watch(self._wake_fd, lambda mask, events: None, select.EPOLLET)
        self._launcher: Launcher = make_launcher(settings, self._memory.baseline, self._close_inherited)
        self._launcher_fd: int | None = None
        self._watch_launcher()

    # Any thread -----------------------------------------------------------------------------------------------------

    def call_now(self, job: JobId, payload: Payload | bytes) -> Result | WorkerLoss | None:
        """See Engine."""
        if not isinstance(payload, bytes) and not payload.goes_alone:
            return None  # the handler counts what moves
        borrowed = self._lending.loans.borrow()
        return None if borrowed is None else borrowed.loan.call(job, payload, borrowed)

    def look(self) -> Look:
        """What is known of the workers; from any thread."""
        return Look(self._crew, self._memory, self._lending)

    # Actions --------------------------------------------------------------------------------------------------------

    def forget_job(self, job: JobId) -> None:
        """See Engine."""
        if self._crew.jobs.pop(job, None) is not None:
            for member in self._members.values():
                member.forget_job(job)

    def perform(self, action: WorkerAction) -> list[Event]:
        """See Engine."""
        if isinstance(action, StartWorker):
            return self._start(action)
        if isinstance(action, VacateSlot):
            self._memory.vacate(int(action.slot))
            self._crew.slots[action.slot].vacant = True
            return []
        member = self._members.get(action.worker)
        if member is None:
            return []  # it is gone, and the scheduler is about to hear of it
        if isinstance(action, SendTasks):
            member.put_tasks(action.tasks)
            if member.held > 1:
                self._poller.ahead[member.id] = member
            self._poller.flush(member)
        elif isinstance(action, LendWorker):
            self._lending.lend(member)
        elif isinstance(action, RecallTasks):
            return [TasksRecalled(action.worker, member.recall())]
        elif isinstance(action, RetireWorker):
            self._retire(member)
        elif isinstance(action, KillWorker):
            return self._kill(member)
        return []

    def _retire(self, member: Member) -> None:
        member.put_news()
        member.channel.put(Kind.RETIRE, b"")
        self._poller.flush(member)

    def _kill(self, member: Member) -> list[Event]:
        if not member.ready:
            member.story = "was stopped while it started"
        if member.pidfd is not None:
            member.kill()
            return []
        # It has no process yet, and a zygote that hangs may never make one. A process that comes late finds nobody.
        events: list[Event] = []
        member.ended = member.reaped = True
        self._finish_if_gone(member, events)
        return events

    def _start(self, action: StartWorker) -> list[Event]:
        slot = int(action.slot)
        try:
            ours, theirs, claims_fd = connection()
        except OSError as error:  # at the limit of descriptors
            story = f"could not be started: {error}"
            loss = WorkerLoss(f"worker {action.worker} (slot {slot})", None, None, False, story)
            return [WorkerExited(action.worker, 0, 0, loss)]
        member = Member(action.worker, slot, Channel(ours), claims_fd, self._memory, self._crew)
        self._members[action.worker] = member
        self._launched += 1
        self._crew.slots[slot].note_start(member.outbox)
        hello, fds = self._memory.hello(slot, self._launched)
        member.channel.put(Kind.HELLO, hello, fds)
        if self._initializer is not None:
            member.put_initializer(self._initializer)
        self._watch_channel(member)
        self._poller.flush(member)
        events: list[Event] = []
        with theirs:
            self._take_launch_events(self._launcher.launch(action.worker, theirs.fileno(), claims_fd), events)
        return events

    # Events ---------------------------------------------------------------------------------------------------------

    def wait(self, timeout: float | None) -> list[Event]:
        """See Engine."""
        ready: list[tuple[int, int]] = []
        if self._lingering:
            self._lingering.dismiss(self._poller.flush)
        events = self._lending.before_waiting(self.pressing or self._hungry, self.can_lend)
        if events:
            return events
        timeout = self._memory.codec.memory.limit_wait(timeout)  # first: it may find what is to be given back
        if timeout == 0 or self._hungry or self._has_news():
            # News travels with the next message, if there is one to come at once.
            ready = self._poller.look()
            if not ready:
                self._tidy_up()
        if not ready and timeout != 0:
            members, starving, reclaim = self._members.values(), self._crew.starving, self._memory.table.reclaim
            self._hungry = self._hunger.check(members, starving, self, self._poller.flush, reclaim)
            if self._hungry:
                timeout = STARVING_SECONDS if timeout is None else min(timeout, STARVING_SECONDS)
            if self._unreaped:
                timeout = REAP_SECONDS if timeout is None else min(timeout, REAP_SECONDS)
            ready = self._poller.block(timeout)
        if self._unreaped:
            self._stop_waiting_for_status(events)
        self._poller.read(ready, events)
        self._poller.take_outboxes(events, self._give_up)
        self._lending.take_handed_over(events)
        self._hunger.tell_news()
        return events

    def _give_up(self, member: Member, error: ProtocolError) -> None:
        self._poller.forget(member)
        member.give_up(f"sent something that is no message of ours ({error})")

    def _has_news(self) -> bool:
        return bool(
            self._memory.table.may_collect or self._memory.owing or self._crew.forgetful or self._holder.dropped
        )

    def _tidy_up(self) -> None:
        """Before this thread blocks: give back what died, so that nobody waits for it."""
        self._memory.table.collect()
        self._memory.release_vacant()
        dropped = self._holder.take_dropped()
        for member in self._members.values():
            if dropped:
                member.drop_objects(dropped)
            if member.lent:
                self._lending.touch(member, lambda member=member: self._tell(member))  # type: ignore[misc]
            elif member.pidfd is not None and not member.ended:
                self._tell(member)

    def _tell(self, member: Member) -> None:
        if member.put_news():
            self._poller.flush(member)

    def _watch_channel(self, member: Member) -> None:
        self._poller.watch(member.channel.fileno(), lambda mask, events: self._on_channel(member, mask, events))

    def _on_channel(self, member: Member, mask: int, events: list[Event]) -> None:
        if mask & select.EPOLLOUT:
            self._poller.flush(member)
        if mask & ~select.EPOLLOUT:
            self._read(member, events)

    def _read(self, member: Member, events: list[Event]) -> bool:
        """Read once; returns whether more may come."""
        try:
            return self._understand(member, member.channel.receive(), events)
        except BlockingIOError:
            return False
        except ProtocolError as error:  # the bytes are no frames
            self._give_up(member, error)
            return False
        except (EOFError, OSError):
            # It is exiting, and a signal changes nothing any more; or it closed its descriptors and is of no use.
            self._poller.unwatch(member.channel.fileno())
            member.kill()
            return False

    def _understand(self, member: Member, frames: list[Frame], events: list[Event]) -> bool:
        """Add the events of its frames; returns whether more may come."""
        try:
            member.understand(frames, events)
            if member.token is not None and not member.ended:
                self._let_linger(member, member.token, events)
        except ProtocolError as error:
            self._give_up(member, error)
            return False
        return True

    def _let_linger(self, member: Member, token: tuple[int, int], events: list[Event]) -> None:
        """It would exit, but for the CUDA memory that it has sent: if that is in use, its slot gets another worker."""
        member.token = None
        member.take_outbox(events)  # what it left there may hold a lease on the token
        watch = self._memory.table.watch(*token, self.wake)
        if watch is None:
            self._retire(member)
            return
        self._poller.forget(member)
        del self._members[member.id]
        self._lingering.add(member, watch)
        events.append(WorkerExited(member.id, member.drain_claims(), member.sent, member.leave()))

    # Processes ------------------------------------------------------------------------------------------------------

    def _on_launcher(self, mask: int, events: list[Event]) -> None:
        self._take_launch_events(self._launcher.receive(), events)
        self._watch_launcher()

    def _watch_launcher(self) -> None:
        """The launcher may have a new descriptor after each call: a new zygote's."""
        if self._launcher_fd is not None:
            self._poller.unwatch(self._launcher_fd)
        self._launcher_fd = self._launcher.fileno()
        if self._launcher_fd is not None:
            self._poller.watch(self._launcher_fd, self._on_launcher)

    def _take_launch_events(self, launched: list[LaunchEvent], events: list[Event]) -> None:
        for event in launched:
            member = self._members.get(event.token)
            if member is None:
                if isinstance(event, Launched):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(event.pidfd, signal.SIGKILL)
                    os.close(event.pidfd)
                continue
            if isinstance(event, Launched):
                member.launched(event.pid, event.pidfd)
                self._watch_process(member, event.pidfd)
            elif isinstance(event, LaunchFailed):
                member.story = f"could not be started: {event.reason}"
                member.ended = member.reaped = True
            else:
                assert isinstance(event, Reaped)
                member.reaped, member.exitcode = True, event.exitcode
            self._finish_if_gone(member, events)

    def _watch_process(self, member: Member, pidfd: int) -> None:
        self._poller.watch(pidfd, lambda mask, events: self._on_pidfd(member, events))

    def _on_pidfd(self, member: Member, events: list[Event]) -> None:
        assert member.pidfd is not None
        member.ended = True
        self._poller.unwatch(member.pidfd)  # it stays readable
        self._take_launch_events(self._launcher.reap(int(member.id), member.pidfd), events)
        if member.id not in self._members:
            self._lingering.ended(member)
        elif member.reaped:
            self._finish_if_gone(member, events)
        else:
            self._unreaped[member.id] = monotonic() + REAP_SECONDS

    def _stop_waiting_for_status(self, events: list[Event]) -> None:
        """A worker has ended, but a zygote that hangs does not say how."""
        for worker, deadline in list(self._unreaped.items()):
            member = self._members.get(worker)
            if member is None:
                del self._unreaped[worker]
            elif monotonic() >= deadline:
                member.reaped = True
                self._finish_if_gone(member, events)

    def _finish_if_gone(self, member: Member, events: list[Event]) -> None:
        """Believe the death: but first hear what the dead one had still said."""
        if not (member.ended and member.reaped) or member.id not in self._members:
            return
        in_use = self._lending.in_use(member)
        while self._poller.watches(member.channel.fileno()) and self._read(member, events):
            pass
        self._lending.settle(events)
        if not member.story:
            with contextlib.suppress(ProtocolError):
                member.take_outbox(events)
        self._poller.forget(member)
        del self._members[member.id]
        unstarted = member.drain_claims()
        loss = member.bury(leave_open=in_use)
        if self._lending.bury(member, unstarted, loss, in_use):
            unstarted = 0  # not the scheduler's
        events.append(WorkerExited(member.id, unstarted, member.sent, loss))

    # The end -------------------------------------------------------------------------------------------------------

    def _close_inherited(self, sock_fd: int, claims_fd: int) -> None:
        """In a forked worker: close the parent's ends, so that no sibling's channel is held open by us."""
        self._launcher.close()
        for member in [*self._members.values(), *self._lingering.members()]:
            for fd in {member.channel.fileno(), member.claims_fd, member.pidfd} - {sock_fd, claims_fd}:
                if fd is not None:
                    os.close(fd)
        os.close(self._wake_fd)
        self._poller.close()

    def close(self) -> None:
        """See Engine."""
        for member in self._members.values():
            member.close()
        self._lingering.close(self._launcher)
        self._lending.loans.close()
        self._launcher.close()
        self._poller.close()
        wake_fd, self._wake_fd = self._wake_fd, -1
        os.close(wake_fd)
        # The caller's objects go now, not when the collector finds our cycles.
        self._crew.jobs.clear()
        self._initializer = None
        self._settings.initializer, self._settings.initargs = None, ()
        self._memory.close()
