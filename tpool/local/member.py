"""One worker process as its supervisor sees it: what it was told, what it says, how it is killed.

The supervisor decides when to read, flush and reap; a member knows the frames.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import weakref
from dataclasses import dataclass
from typing import Any

from tpool.engine import WorkerLoss
from tpool.errors import DecodeError, ProtocolError, RemoteTraceback
from tpool.local import wire
from tpool.local.channel import Channel, Frame
from tpool.local.setup import PoolMemory
from tpool.local.wire import Kind, Status
from tpool.messages import (
    Event,
    InitializerFailed,
    JobId,
    RecallSettled,
    Task,
    TasksFinished,
    WorkerBecameReady,
    WorkerId,
)
from tpool.tensors.payload import GroupId, Payload, Received
from tpool.tensors.pickler import Codec

logger = logging.getLogger("tpool")

PIDFD_SIGNAL_PROCESS_GROUP = 4  # Linux 6.9, pidfd_send_signal(2)

# Plain numbers: an enum's attribute costs as much as the comparison, and these are looked at once per result.
_RESULT = int(Kind.RESULT)
_ERROR = int(Status.ERROR)

Jobs = dict[JobId, tuple[int, Payload]]


class LocalResult:
    """What a local worker answered; see ``tpool.engine.Result``."""

    __slots__ = ("__weakref__", "codec", "failed", "received", "seconds", "traceback")

    def __init__(self, failed: bool, received: Received, traceback: str, seconds: float, codec: Codec) -> None:
        self.failed = failed
        self.received = received
        self.traceback = traceback
        self.seconds = seconds
        self.codec = codec
        if received.fds:
            # Blocks give themselves back when nobody wants the result; descriptors do not.
            weakref.finalize(self, received.discard).atexit = False

    def take(self) -> Any:
        """See Result."""
        try:
            value: Any = self.codec.loads(self.received)
        except Exception as error:
            if not self.failed:
                raise
            # The exception's own text is in the traceback; better that than only "could not be unpickled".
            raise DecodeError(
                f"the task raised an exception that could not be unpickled here ({error}); "
                "the traceback above, from the worker, tells what it was"
            ) from RemoteTraceback(_quote(self.traceback))
        if self.failed:
            value.__cause__ = RemoteTraceback(_quote(self.traceback))
        return value

    def discard(self) -> None:
        """See Result."""
        self.received.discard()


def _quote(text: str) -> str:
    return f'\n"""\n{text}"""'


@dataclass(slots=True)
class Traffic:
    """Bytes to and from all workers, by handle and through pipes; written by the handler's thread."""

    moved_nbytes: int = 0
    piped_nbytes: int = 0


class Member:
    """One worker process. ``_sent_*`` say what it has been told once and need not be told again.

    Args:
        id: the scheduler's name for it.
        slot: its place.
        channel: to it; owned.
        claims_fd: its semaphore of claims; owned.
        memory: the pool's.
        jobs: what the tasks of each open job have in common.
        traffic: counts bytes.
    """

    def __init__(
        self,
        id: WorkerId,
        slot: int,
        channel: Channel,
        claims_fd: int,
        memory: PoolMemory,
        jobs: Jobs,
        traffic: Traffic,
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
        self.token: tuple[int, int] | None = None  # it has retired, but for CUDA memory; see lingering
        self._memory = memory
        self._codec = memory.codec
        self._peer = memory.peers[slot]
        self._jobs = jobs
        self._traffic = traffic
        self._sent_arenas = {arena.id for arena in memory.worker_arenas(slot)}
        self._sent_groups: set[GroupId] = set()
        self._sent_jobs: set[JobId] = set()
        self._forget_jobs: list[int] = []
        self._unsettled = 0
        self._held = 0  # tasks sent and neither answered nor taken back
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
        parts: list[bytes] = []
        fds: list[int] = []
        for task in tasks:
            payload: Payload = task.payload
            if task.job not in self._sent_jobs:
                self._put_job(task.job)
            if payload.blocks or payload.groups or payload.fds or type(payload.data) is not bytes:
                self._put_prerequisites(payload)
                fds += payload.fds
            parts.append(wire.TASK.pack(task.job, task.index))
            parts.append(wire.pack_payload(payload))
        body = b"".join(parts)
        self._traffic.piped_nbytes += len(body)
        # Before the tasks: a worker that finds no claim believes that its tasks were taken back.
        os.eventfd_write(self.claims_fd, len(tasks))
        self._held += len(tasks)
        self.channel.put(Kind.TASKS, body, tuple(fds))
        self.put_news()

    def _put_job(self, job: JobId) -> None:
        known = self._jobs.get(job)
        if known is None:
            return  # an apply: the task brings its function along
        self._sent_jobs.add(job)
        mode, payload = known
        self._put_prerequisites(payload)
        self.channel.put(Kind.JOB, wire.JOB.pack(job, mode) + wire.pack_payload(payload), tuple(payload.fds))

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

    @property
    def has_news(self) -> bool:
        """Whether ``put_news`` would say something, dead views that nobody noticed yet aside."""
        return bool(self._peer.pending or self._forget_jobs)

    def put_news(self) -> bool:
        """What travels with the next message or before we block; returns whether there was any."""
        give_backs = self._memory.table.take_give_backs(self._peer)
        if give_backs:
            self.channel.put(Kind.GIVE_BACKS, wire.pack_give_backs(give_backs))
        if self._forget_jobs:
            self.channel.put(Kind.FORGET, wire.pack_ids(self._forget_jobs))
            self._forget_jobs = []
            return True
        return bool(give_backs)

    def put_hopeless(self) -> None:
        """Tell it that the memory it waits for will not come."""
        self.starving = False
        self.channel.put(Kind.HOPELESS, b"")

    def put_trim(self) -> None:
        """Ask it for the memory that it keeps warm and does not use."""
        self.channel.put(Kind.TRIM, b"")

    @property
    def may_finish(self) -> bool:
        """Whether it starts up or runs a task, and does not wait for memory: it may give some back soon."""
        return not self.ended and not self.starving and (not self._ready or self._held > 0)

    def recall(self) -> int:
        """Take back what it has not started; returns how many tasks that are."""
        count = self.drain_claims()
        self._unsettled += count
        self._held -= count
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
        results: list[tuple[JobId, int, Any, float]] = []
        for frame in frames:
            if frame.kind == _RESULT:
                results.append(self._result(frame))
                continue
            if results:
                events.append(TasksFinished(self.id, results))
                results = []
            self._understand_other(frame, events)
        if results:
            events.append(TasksFinished(self.id, results))

    def _result(self, frame: Frame) -> tuple[JobId, int, Any, float]:
        self.starving = False
        self._held -= 1
        body = frame.body
        job, index, seconds, status, text_nbytes = wire.unpack_head(wire.RESULT, body)
        start = wire.RESULT.size + text_nbytes
        text = body[wire.RESULT.size : start].decode(errors="replace") if text_nbytes else ""
        received = wire.unpack_payload(body, start, frame.fds, self._receive_block)[0]
        self._traffic.piped_nbytes += len(body)
        if received.blocks or type(received.data) is not bytes:
            self._traffic.moved_nbytes += wire.moved_nbytes(received)
            self._memory.release_foreign()
        result = LocalResult(status == _ERROR, received, text, seconds, self._codec)
        return JobId(job), index, result, seconds

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
        elif kind == Kind.LINGERING:
            self.token = wire.unpack_place(frame.body)
        elif kind == Kind.ARENA:
            self._memory.attach(wire.unpack_id(frame.body), frame.fds)
        elif kind == Kind.INITIALIZER_FAILED:
            start = wire.COUNT_NBYTES + wire.unpack_count(frame.body)
            text = frame.body[wire.COUNT_NBYTES : start].decode(errors="replace")
            received = self._unpack(frame, start)
            events.append(InitializerFailed(self.id, LocalResult(True, received, text, 0.0, self._codec)))
        else:
            raise ProtocolError(f"a frame of unknown kind {kind}")

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

    def leave(self) -> WorkerLoss:
        """Its slot gets another worker; returns what to say of this one."""
        self._memory.table.forget(self._peer)
        return WorkerLoss(str(self), self.pid, self.exitcode, self._ready, self.story)

    def bury(self) -> WorkerLoss:
        """Let go of everything it held; returns why it is gone."""
        self._memory.table.forget(self._peer)
        self.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
        logger.info("%s ended, pid %s, exit code %s", self, self.pid, self.exitcode)
        return WorkerLoss(str(self), self.pid, self.exitcode, self._ready, self.story)

    def close(self) -> None:
        """Close the channel and the semaphore."""
        self.channel.close()
        os.close(self.claims_fd)
