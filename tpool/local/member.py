"""One worker process as its supervisor sees it: what it was told, what it says, how it is killed.

The supervisor decides when to read, flush and reap; a member knows the frames.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
from typing import Any

from tpool.engine import WorkerLoss
from tpool.errors import ProtocolError
from tpool.local import wire
from tpool.local.answers import LocalResult, PlainResult
from tpool.local.channel import Channel, Frame
from tpool.local.crew import Crew
from tpool.local.orders import Orders
from tpool.local.outbox import Form
from tpool.local.setup import PoolMemory
from tpool.local.wire import Kind, Status
from tpool.messages import (
    Event,
    InitializerFailed,
    RecallSettled,
    RunFinished,
    TaskFaltered,
    TasksFinished,
    WorkerBecameReady,
)
from tpool.task import JobId, WorkerId
from tpool.tensors.payload import Received
from tpool.values import Values

logger = logging.getLogger("tpool")

PIDFD_SIGNAL_PROCESS_GROUP = 4  # Linux 6.9, pidfd_send_signal(2)

# Plain numbers: an enum's attribute costs as much as the comparison, and these are looked at once per result.
_RESULT = int(Kind.RESULT)
_ERROR = int(Status.ERROR)

Results = list[tuple[JobId, int, Any, float]]


class Member(Orders):
    """One worker process.

    Args:
        id: the scheduler's name for it.
        slot: its place.
        channel: to it; owned.
        claims_fd: its semaphore of claims; owned.
        memory: the pool's.
        crew: see there.
    """

    def __init__(
        self, id: WorkerId, slot: int, channel: Channel, claims_fd: int, memory: PoolMemory, crew: Crew
    ) -> None:
        super().__init__(slot, channel, claims_fd, memory, crew)
        self.id = id
        self.slot = slot
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.ended = False  # the pidfd says that the process has ended
        self.reaped = False
        self.exitcode: int | None = None
        self.story = ""  # why we gave it up, where it was us
        self.watching_write = False
        self.lent = False  # to a caller: hands off its channel
        self.outbox = memory.outbox(slot)
        self.token: tuple[int, int] | None = None  # it has retired, but for CUDA memory; see lingering
        self._codec = memory.codec
        self._unsettled = 0
        self.ready = False
        self._left = False
        self._reason = ""  # why it leaves by itself
        self._doomed = False  # to be killed as soon as it has a process

    def __str__(self) -> str:
        return f"worker {self.id} (slot {self.slot})"

    # Tasks -----------------------------------------------------------------------------------------------------------

    @property
    def may_finish(self) -> bool:
        """Whether it starts up or runs a task, and does not wait for memory: it may give some back soon."""
        return not self.ended and not self.starving and (not self.ready or self.held > 0)

    def recall(self) -> int:
        """Take back what it has not started; returns how many tasks that are."""
        count = self.drain_claims()
        self._unsettled += count
        self.held -= count
        return count

    def drain_claims(self) -> int:
        """How many tasks it was sent and has not started; they are ours from now on."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                os.eventfd_read(self.claims_fd)
                count += 1
        return count

    # From the worker ------------------------------------------------------------------------------------------------

    def understand(self, frames: list[Frame], events: list[Event]) -> None:
        """Turn frames into events, taking the leases of their blocks.

        Raises:
            ProtocolError: it said something that cannot be.
        """
        results: Results = []
        for frame in frames:
            if frame.kind == _RESULT:
                results = self._add_result(frame, results, events)
                continue
            if results:
                events.append(TasksFinished(self.id, results))
                results = []
            self._understand_other(frame, events)
        if results:
            events.append(TasksFinished(self.id, results))

    def take_outbox(self, events: list[Event]) -> bool:
        """Turn what it left in its outbox into events; returns whether there was anything.

        Raises:
            ProtocolError: it left something that cannot be.
        """
        before = self.held
        self._add_left(None, events)
        return self.held < before

    def plain_answer(self, frames: list[Frame]) -> Any:
        """The result in the answer to ``put_call``; None, and nothing is changed, where there is more to it."""
        frame = frames[0]
        if len(frames) > 1 or frame.kind != _RESULT or frame.fds or not wire.is_plain_result(frame.body):
            return None
        return self._add_result(frame, [], [])[0][2]

    def _add_left(self, until: int | None, events: list[Event]) -> None:
        single: Results = []  # results that nothing stands beside: one event for many
        for job, index, results, times, form in self.outbox.take(until):
            count, seconds = len(times), sum(times)
            if form is Form.VALUE:
                found: Any = Values(results, seconds / count)
            elif form is Form.STREAM:
                found = list(map(PlainResult, results, times))
            else:
                found = list(map(self._receive_left, results, times))
            if count == 1:
                single.append((JobId(job), index, next(iter(found)), seconds))
            else:
                self._tell_results(single, events)
                single = []
                events.append(RunFinished(self.id, JobId(job), index, found, seconds))
            self.held -= count
            self._record.tasks_done += count
            self._record.busy_seconds += seconds
        self._tell_results(single, events)

    def _tell_results(self, results: Results, events: list[Event]) -> None:
        if results:
            events.append(TasksFinished(self.id, results))

    def _add_result(self, frame: Frame, results: Results, events: list[Event]) -> Results:
        """Add one to results of which nobody was told; gives what is not told, as others may have come before it."""
        body = frame.body
        job, index, seconds, status, text_nbytes, left_before = wire.unpack_head(wire.RESULT, body)
        if left_before != self.outbox.entries:
            self._tell_results(results, events)
            results = []
            self._add_left(left_before, events)
        self.outbox.replies = self.outbox.replies + 1 & 0xFFFFFFFF
        if self.starving:
            self._stop_starving()
        self.held -= 1
        start = wire.RESULT.size + text_nbytes
        text = body[wire.RESULT.size : start].decode(errors="replace") if text_nbytes else ""
        received = self._receive(body, start, frame.fds)
        self._memory.release_foreign(self.slot)
        record = self._record
        record.tasks_done += 1
        record.busy_seconds += seconds
        record.piped_nbytes += len(body)
        result = LocalResult(status == _ERROR, received, text, seconds, self._codec)
        results.append((JobId(job), index, result, seconds))
        return results

    def _receive_left(self, body: bytes, seconds: float) -> LocalResult:
        return LocalResult(False, self._receive(body, 0, []), "", seconds, self._codec)

    def _receive(self, body: bytes, start: int, fds: list[int]) -> Received:
        received = wire.unpack_payload(body, start, fds, self._receive_block)[0]
        if received.blocks or type(received.data) is not bytes:
            self._record.moved_nbytes += wire.moved_nbytes(received)
        return received

    def _unpack(self, frame: Frame, position: int) -> Received:
        return wire.unpack_payload(frame.body, position, frame.fds, self._receive_block)[0]

    def _receive_block(self, arena_id: int, offset: int, nbytes: int) -> Any:
        return self._memory.table.receive(arena_id, offset, nbytes, self._peer)

    def _understand_other(self, frame: Frame, events: list[Event]) -> None:
        kind = frame.kind
        if kind == Kind.GIVE_BACKS:
            self._memory.table.given_back(self._peer, wire.unpack_give_backs(frame.body))
        elif kind == Kind.SETTLED:
            self._unsettled -= wire.unpack_count(frame.body)
            if self._unsettled < 0:
                raise ProtocolError("it settled more tasks than were taken back")
            if self._unsettled == 0:
                events.append(RecallSettled(self.id))
        elif kind == Kind.READY:
            self.ready = True
            self._record.note_ready()
            logger.info("%s is ready, pid %s", self, self.pid)
            events.append(WorkerBecameReady(self.id))
        elif kind == Kind.STARVING:
            self.starving, self.wait = True, wire.unpack_count(frame.body)
            self._crew.starving[self] = None
        elif kind == Kind.TRIMMED:
            self.trimming = False
        elif kind == Kind.FALTERED:
            self._falter(frame, events)
        elif kind == Kind.OVERWEIGHT:
            self._reason = f"left, as {frame.body.decode(errors='replace')}"
        elif kind == Kind.LINGERING:
            self.token = wire.unpack_place(frame.body)
        elif kind == Kind.EXIT_FAILED:
            logger.warning(
                "worker_exit of %s, pid %s, raised:\n%s", self, self.pid, frame.body.decode(errors="replace")
            )
        elif kind == Kind.ARENA:
            self._memory.attach(wire.unpack_id(frame.body), frame.fds, self.slot)
        elif kind == Kind.INITIALIZER_FAILED:
            start = wire.COUNT_NBYTES + wire.unpack_count(frame.body)
            text = frame.body[wire.COUNT_NBYTES : start].decode(errors="replace")
            received = self._unpack(frame, start)
            events.append(InitializerFailed(self.id, LocalResult(True, received, text, 0.0, self._codec)))
        elif kind != Kind.BELL:  # whoever reads a bell looks into the outbox next
            raise ProtocolError(f"a frame of unknown kind {kind}")

    def _falter(self, frame: Frame, events: list[Event]) -> None:
        ((job, index, result, seconds),) = self._add_result(frame, [], events)
        events.append(TaskFaltered(self.id, job, index, result, seconds))

    # Its end --------------------------------------------------------------------------------------------------------

    def launched(self, pid: int, pidfd: int) -> None:
        """It has a process now; the pidfd is owned."""
        self.pid, self.pidfd = pid, pidfd
        self._record.note_process(pid)
        logger.info("%s started, pid %d", self, pid)
        if self._doomed:
            self.kill()

    def kill(self) -> None:
        """Kill it and the processes of its group, now or as soon as it has a process."""
        if self.pidfd is None:
            self._doomed = True
            return
        if self.ended:
            return
        assert self.pid is not None
        # The group first: the children of its tasks. The worker itself may not have made its group yet.
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL, None, PIDFD_SIGNAL_PROCESS_GROUP)
        except OSError as error:
            if error.errno == errno.EINVAL:
                # Before Linux 6.9. The process has not been reaped, or we would know, so the number is still its own.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def give_up(self, story: str) -> None:
        """Kill it because it cannot be talked to any more."""
        self.story = self.story or story
        self.kill()

    def _let_go(self) -> None:
        self._stop_starving()
        self._crew.forgetful.pop(self, None)
        self._memory.release_foreign(self.slot)
        self._memory.table.forget(self._peer)

    def leave(self) -> WorkerLoss:
        """Its slot gets another worker; returns what to say of this one."""
        self._let_go()
        loss = WorkerLoss(str(self), self.pid, self.exitcode, self.ready, self.story or self._reason)
        if not self._left:
            self._left = True
            self._record.note_end(loss)
        return loss

    def bury(self, *, leave_open: bool = False) -> WorkerLoss:
        """Let go of everything it held, but for the channel where somebody uses that; returns why it is gone."""
        loss = self.leave()
        if not leave_open:
            self.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
        logger.info("%s ended, pid %s, exit code %s", self, self.pid, self.exitcode)
        return loss

    def close(self) -> None:
        """Close the channel and the semaphore."""
        self.channel.close()
        os.close(self.claims_fd)
