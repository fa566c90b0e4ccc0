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
from tpool.local.setup import PoolMemory
from tpool.local.wire import Kind, Status
from tpool.messages import (
    Event,
    InitializerFailed,
    JobId,
    RecallSettled,
    Task,
    TaskFaltered,
    TasksFinished,
    WorkerBecameReady,
    WorkerId,
)
from tpool.tensors.payload import GroupId, Payload, Received

logger = logging.getLogger("tpool")

PIDFD_SIGNAL_PROCESS_GROUP = 4  # Linux 6.9, pidfd_send_signal(2)

# Plain numbers: an enum's attribute costs as much as the comparison, and these are looked at once per result.
_RESULT = int(Kind.RESULT)
_ERROR = int(Status.ERROR)

Results = list[tuple[JobId, int, Any, float]]


class Member:
    """One worker process. ``_sent_*`` say what it has been told once and need not be told again.

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
        self.id = id
        self.slot = slot
        self.channel = channel
        self.claims_fd = claims_fd
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.starving = False
        self.ended = False  # the pidfd says that the process has ended
        self.reaped = False
        self.exitcode: int | None = None
        self.story = ""  # why we gave it up, where it was us
        self.watching_write = False
        self.held = 0  # tasks sent and neither answered nor taken back
        self.outbox = memory.outbox(slot)
        self.token: tuple[int, int] | None = None  # it has retired, but for CUDA memory; see lingering
        self._memory = memory
        self._codec = memory.codec
        self._peer = memory.peers[slot]
        self._crew = crew
        self._traffic = crew.traffic
        self._sent_arenas = {arena.id for arena in memory.worker_arenas(slot)}
        self._sent_groups: set[GroupId] = set()
        self._sent_jobs: set[JobId] = set()
        self._forget_jobs: list[int] = []
        self._unsettled = 0
        self._ready = False
        self._doomed = False  # to be killed as soon as it has a process

    def __str__(self) -> str:
        return f"worker {self.id} (slot {self.slot})"

    # To the worker --------------------------------------------------------------------------------------------------

    def put_initializer(self, payload: Payload) -> None:
        """Tell it what to run before its first task."""
        self._put_prerequisites(payload)
        self.channel.put(Kind.INITIALIZER, wire.pack_payload(payload), tuple(payload.fds))

    def put_tasks(self, tasks: list[Task]) -> None:
        """Give it tasks, with what it must know for them."""
        plain = [(task.job, task.index, task.payload) for task in tasks if type(task.payload) is bytes]
        for job in dict.fromkeys([task.job for task in tasks]):
            if job not in self._sent_jobs:
                self._put_job(job)
        fds: list[int] = []
        if len(plain) == len(tasks):
            kind, body = Kind.PLAIN_TASKS, wire.pack_plain_tasks(plain)
        else:
            kind, body = Kind.TASKS, self._pack_tasks(tasks, fds)
        self._traffic.piped_nbytes += len(body)
        # Before the tasks: a worker that finds no claim believes that its tasks were taken back.
        os.eventfd_write(self.claims_fd, len(tasks))
        self.held += len(tasks)
        self.channel.put(kind, body, tuple(fds))
        self.put_news()

    def _pack_tasks(self, tasks: list[Task], fds: list[int]) -> bytes:
        """The body of a message of tasks; their descriptors are added to ``fds``."""
        parts: list[bytes] = []
        for task in tasks:
            payload: Payload | bytes = task.payload
            if not isinstance(payload, bytes):
                self._put_prerequisites(payload)
                fds += payload.fds
            parts.append(wire.TASK.pack(task.job, task.index))
            parts.append(wire.pack_payload(payload))
        return b"".join(parts)

    def _put_job(self, job: JobId) -> None:
        known = self._crew.jobs.get(job)
        if known is None:
            return  # an apply: the task brings its function along
        self._sent_jobs.add(job)
        mode, payload = known
        fds: tuple[int, ...] = ()
        if not isinstance(payload, bytes):
            self._put_prerequisites(payload)
            fds = tuple(payload.fds)
        self.channel.put(Kind.JOB, wire.JOB.pack(job, mode) + wire.pack_payload(payload), fds)

    def _put_prerequisites(self, payload: Payload) -> None:
        """What the worker must know before this payload: definitions, arenas; and its leases begin."""
        if payload.groups:
            for group, definition in self._memory.definitions.missing(payload.groups, self._sent_groups):
                self._sent_groups.add(group)
                self._lend(definition)
                body = wire.pack_id(group) + wire.pack_payload(definition)
                self.channel.put(Kind.GROUP, body, tuple(definition.fds))
        self._lend(payload)

    def _lend(self, payload: Payload) -> None:
        blocks = wire.all_blocks(payload)
        if not blocks:
            return
        for block in blocks:
            arena = block.arena
            if arena.id not in self._sent_arenas:
                self._sent_arenas.add(arena.id)
                self.channel.put(Kind.ARENA, wire.pack_id(arena.id), (arena.fd,))
        self._memory.table.lend(blocks, self._peer)
        self._traffic.moved_nbytes += sum([block.nbytes for block in blocks])

    def forget_job(self, job: JobId) -> None:
        """It need not keep this job's function."""
        if job in self._sent_jobs:
            self._sent_jobs.discard(job)
            self._forget_jobs.append(job)
            self._crew.forgetful[self] = None

    def put_news(self) -> bool:
        """What travels with the next message or before we block; returns whether there was any."""
        give_backs = self._memory.table.take_give_backs(self._peer)
        if give_backs:
            self.channel.put(Kind.GIVE_BACKS, wire.pack_give_backs(give_backs))
        if self._forget_jobs:
            self.channel.put(Kind.FORGET, wire.pack_ids(self._forget_jobs))
            self._forget_jobs = []
            self._crew.forgetful.pop(self, None)
            return True
        return bool(give_backs)

    def put_hopeless(self) -> None:
        """Tell it that the memory it waits for will not come."""
        self._stop_starving()
        self.channel.put(Kind.HOPELESS, b"")

    def put_grant(self) -> None:
        """Let it have the memory that it waits for, though the budget is spent."""
        self._stop_starving()
        self.channel.put(Kind.GRANT, b"")

    def put_trim(self) -> None:
        """Ask it for the memory that it keeps warm and does not use."""
        self.channel.put(Kind.TRIM, b"")

    @property
    def may_finish(self) -> bool:
        """Whether it starts up or runs a task, and does not wait for memory: it may give some back soon."""
        return not self.ended and not self.starving and (not self._ready or self.held > 0)

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
                self._add_result(frame, results)
                continue
            if results:
                events.append(TasksFinished(self.id, results))
                results = []
            self._understand_other(frame, events)
        if results:
            events.append(TasksFinished(self.id, results))

    def take_outbox(self, events: list[Event]) -> bool:
        """Turn what it left in its outbox into an event; returns whether there was anything.

        Raises:
            ProtocolError: it left something that cannot be.
        """
        results: Results = []
        self._add_left(None, results)
        if results:
            events.append(TasksFinished(self.id, results))
        return bool(results)

    def _add_left(self, until: int | None, results: Results) -> None:
        codec = self._codec
        for job, index, seconds, stream in self.outbox.take(until):
            self.held -= 1
            results.append((JobId(job), index, PlainResult(stream, seconds, codec), seconds))

    def _add_result(self, frame: Frame, results: Results) -> None:
        body = frame.body
        job, index, seconds, status, text_nbytes, left_before = wire.unpack_head(wire.RESULT, body)
        if left_before != self.outbox.entries:
            self._add_left(left_before, results)
        self.outbox.replies = self.outbox.replies + 1 & 0xFFFFFFFF
        if self.starving:
            self._stop_starving()
        self.held -= 1
        start = wire.RESULT.size + text_nbytes
        text = body[wire.RESULT.size : start].decode(errors="replace") if text_nbytes else ""
        received = wire.unpack_payload(body, start, frame.fds, self._receive_block)[0]
        self._traffic.piped_nbytes += len(body)
        if received.blocks or type(received.data) is not bytes:
            self._traffic.moved_nbytes += wire.moved_nbytes(received)
            self._memory.release_foreign()
        result = LocalResult(status == _ERROR, received, text, seconds, self._codec)
        results.append((JobId(job), index, result, seconds))

    def _unpack(self, frame: Frame, position: int) -> Received:
        return wire.unpack_payload(frame.body, position, frame.fds, self._receive_block)[0]

    def _receive_block(self, arena_id: int, offset: int, nbytes: int) -> Any:
        return self._memory.table.receive(arena_id, offset, nbytes, self._peer)

    def _understand_other(self, frame: Frame, events: list[Event]) -> None:
        kind = frame.kind
        if kind == Kind.GIVE_BACKS:
            for arena_id, offset, count in wire.unpack_give_backs(frame.body):
                self._memory.table.given_back(self._peer, arena_id, offset, count)
        elif kind == Kind.SETTLED:
            self._unsettled -= wire.unpack_count(frame.body)
            if self._unsettled < 0:
                raise ProtocolError("it settled more tasks than were taken back")
            if self._unsettled == 0:
                events.append(RecallSettled(self.id))
        elif kind == Kind.READY:
            self._ready = True
            logger.info("%s is ready, pid %s", self, self.pid)
            events.append(WorkerBecameReady(self.id))
        elif kind == Kind.STARVING:
            self.starving = True
            self._crew.starving[self] = None
        elif kind == Kind.FALTERED:
            self._falter(frame, events)
        elif kind == Kind.LINGERING:
            self.token = wire.unpack_place(frame.body)
        elif kind == Kind.EXIT_FAILED:
            logger.warning(
                "worker_exit of %s, pid %s, raised:\n%s", self, self.pid, frame.body.decode(errors="replace")
            )
        elif kind == Kind.ARENA:
            self._memory.attach(wire.unpack_id(frame.body), frame.fds)
        elif kind == Kind.INITIALIZER_FAILED:
            start = wire.COUNT_NBYTES + wire.unpack_count(frame.body)
            text = frame.body[wire.COUNT_NBYTES : start].decode(errors="replace")
            received = self._unpack(frame, start)
            events.append(InitializerFailed(self.id, LocalResult(True, received, text, 0.0, self._codec)))
        elif kind != Kind.BELL:  # whoever reads a bell looks into the outbox next
            raise ProtocolError(f"a frame of unknown kind {kind}")

    def _falter(self, frame: Frame, events: list[Event]) -> None:
        results: Results = []
        self._add_result(frame, results)
        job, index, result, seconds = results.pop()
        if results:
            events.append(TasksFinished(self.id, results))
        events.append(TaskFaltered(self.id, job, index, result, seconds))

    def _stop_starving(self) -> None:
        self.starving = False
        self._crew.starving.pop(self, None)

    # Its end --------------------------------------------------------------------------------------------------------

    def launched(self, pid: int, pidfd: int) -> None:
        """It has a process now; the pidfd is owned."""
        self.pid, self.pidfd = pid, pidfd
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
        self._memory.table.forget(self._peer)

    def leave(self) -> WorkerLoss:
        """Its slot gets another worker; returns what to say of this one."""
        self._let_go()
        return WorkerLoss(str(self), self.pid, self.exitcode, self._ready, self.story)

    def bury(self) -> WorkerLoss:
        """Let go of everything it held; returns why it is gone."""
        self._let_go()
        self.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
        logger.info("%s ended, pid %s, exit code %s", self, self.pid, self.exitcode)
        return WorkerLoss(str(self), self.pid, self.exitcode, self._ready, self.story)

    def close(self) -> None:
        """Close the channel and the semaphore."""
        self.channel.close()
        os.close(self.claims_fd)
