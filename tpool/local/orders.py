"""What a worker is told, in the order in which it has to hear it."""

from __future__ import annotations

import itertools
import os

from tpool.local import wire
from tpool.local.channel import Channel
from tpool.local.crew import Crew
from tpool.local.setup import PoolMemory
from tpool.local.wire import Items, Kind
from tpool.task import JobId, Task
from tpool.tensors.leases import Block
from tpool.tensors.payload import GroupId, HeldObject, Payload

__all__ = ["Orders"]


class Orders:
    """The parent's words to one worker. ``_sent_*`` say what it has been told once and need not be told again.

    Nothing is written but by ``put_call``; whoever puts something flushes the channel.

    Args:
        slot: the worker's place.
        channel: to it; owned.
        claims_fd: its semaphore of claims; owned.
        memory: the pool's.
        crew: see there.

    Attributes:
        held: how many tasks were sent and neither answered nor taken back.
        sent: how many tasks were sent that are the scheduler's.
        starving: it waits for memory.
        wait: names the latest time that it waited for memory.
        trimming: it was asked for the memory that it can spare, and has not answered.
    """

    def __init__(self, slot: int, channel: Channel, claims_fd: int, memory: PoolMemory, crew: Crew) -> None:
        self.channel = channel
        self.claims_fd = claims_fd
        self.held = self.sent = 0
        self.starving = self.trimming = False
        self.wait = 0
        self._memory = memory
        self._peer = memory.peers[slot]
        self._crew = crew
        self._record = crew.slots[slot]
        self._sent_arenas = {arena.id for arena in memory.worker_arenas(slot)}
        self._sent_groups: set[GroupId] = set()
        self._sent_jobs: set[JobId] = set()
        self._sent_objects: set[int] = set()
        self._forget_jobs: list[int] = []
        self._drop_objects: list[int] = []

    def put_initializer(self, payload: Payload) -> None:
        """Tell it what to run before its first task."""
        self._put_prerequisites(payload)
        self.channel.put(Kind.INITIALIZER, wire.pack_payload(payload), tuple(payload.fds))

    def put_tasks(self, tasks: list[Task]) -> None:
        """Give it tasks, with what it must know for them."""
        for job in dict.fromkeys([task.job for task in tasks]):
            if job not in self._sent_jobs:
                self._put_job(job)
        if Items in {type(task.payload) for task in tasks}:
            frames = [
                frame
                for spans, group in itertools.groupby(tasks, lambda task: type(task.payload) is Items)
                for frame in (map(_pack_span, group) if spans else [self._pack(list(group))])
            ]
        else:
            frames = [self._pack(tasks)]
        count = sum([task.count for task in tasks])
        # Before the tasks: a worker that finds no claim believes that its tasks were taken back.
        os.eventfd_write(self.claims_fd, count)
        self.held += count
        self.sent += count
        for kind, body, fds in frames:
            self._record.piped_nbytes += len(body)
            self.channel.put(kind, body, fds)
        self.put_news()

    def _pack(self, tasks: list[Task]) -> tuple[Kind, bytes, tuple[int, ...]]:
        plain = [(task.job, task.index, task.payload) for task in tasks if type(task.payload) is bytes]
        if len(plain) == len(tasks):
            return Kind.PLAIN_TASKS, wire.pack_plain_tasks(plain), ()
        fds: list[int] = []
        body = self._pack_tasks(tasks, fds)
        return Kind.TASKS, body, tuple(fds)

    def put_call(self, job: JobId, payload: Payload | bytes) -> None:
        """Give a worker that holds nothing one call, and write it out. By whoever has borrowed the member.

        Raises:
            OSError: it is gone; or, as BlockingIOError, not everything could be written.
        """
        if isinstance(payload, bytes):
            kind, body = Kind.PLAIN_TASKS, wire.pack_plain_tasks([(job, 0, payload)])
        else:
            self._put_prerequisites(payload)
            kind, body = Kind.TASKS, wire.TASK.pack(job, 0) + wire.pack_payload(payload)
        os.eventfd_write(self.claims_fd, 1)
        self.held = 1
        self.channel.put(kind, body)
        if not self.channel.flush():
            raise BlockingIOError

    def _pack_tasks(self, tasks: list[Task], fds: list[int]) -> bytes:
        """The body of a message of tasks; their descriptors are added to ``fds``."""
        parts: list[bytes] = []
        blocks: list[Block] = []
        for task in tasks:
            payload: Payload | bytes = task.payload
            if not isinstance(payload, bytes):
                if payload.groups or payload.held:
                    self._put_definitions(payload)
                blocks += wire.all_blocks(payload)
                fds += payload.fds
            parts.append(wire.TASK.pack(task.job, task.index))
            parts.append(wire.pack_payload(payload))
        self._lend(blocks)
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
        """What the worker must know before this payload: definitions, objects, arenas; and its leases begin."""
        self._put_definitions(payload)
        self._lend(wire.all_blocks(payload))

    def _put_definitions(self, payload: Payload) -> None:
        if payload.groups:
            for group, definition in self._memory.definitions.missing(payload.groups, self._sent_groups):
                self._sent_groups.add(group)
                self._put_objects(definition.held)
                self._lend(wire.all_blocks(definition))
                body = wire.pack_id(group) + wire.pack_payload(definition)
                self.channel.put(Kind.GROUP, body, tuple(definition.fds))
        if payload.held:
            self._put_objects(payload.held)

    def _put_objects(self, objects: list[HeldObject]) -> None:
        for held in objects:
            if held.id not in self._sent_objects:
                self._sent_objects.add(held.id)
                payload = held.payload
                self._put_prerequisites(payload)
                self.channel.put(Kind.OBJECT, wire.pack_id(held.id) + wire.pack_payload(payload), tuple(payload.fds))

    def _lend(self, blocks: list[Block]) -> None:
        if not blocks:
            return
        for arena in {block.arena for block in blocks}:
            if arena.id not in self._sent_arenas:
                self._sent_arenas.add(arena.id)
                self.channel.put(Kind.ARENA, wire.pack_id(arena.id), (arena.fd,))
        self._memory.table.lend(blocks, self._peer)
        self._record.moved_nbytes += sum([block.nbytes for block in blocks])

    def forget_job(self, job: JobId) -> None:
        """It need not keep this job's function."""
        if job in self._sent_jobs:
            self._sent_jobs.discard(job)
            self._forget_jobs.append(job)
            self._crew.forgetful[self] = None

    def drop_objects(self, objects: list[int]) -> None:
        """It need not keep these objects."""
        dropped = self._sent_objects.intersection(objects)
        if dropped:
            self._sent_objects -= dropped
            self._drop_objects += dropped
            self._crew.forgetful[self] = None

    def put_news(self) -> bool:
        """What travels with the next message or before we block; returns whether there was any."""
        give_backs = self._memory.table.take_give_backs(self._peer)
        if give_backs:
            self.channel.put(Kind.GIVE_BACKS, wire.pack_give_backs(give_backs))
        if self not in self._crew.forgetful:
            return bool(give_backs)
        del self._crew.forgetful[self]
        if self._forget_jobs:
            self.channel.put(Kind.FORGET, wire.pack_ids(self._forget_jobs))
            self._forget_jobs = []
        if self._drop_objects:
            self.channel.put(Kind.DROP_OBJECTS, wire.pack_ids(self._drop_objects))
            self._drop_objects = []
        return True

    def put_hopeless(self) -> None:
        """Tell it that the memory it waits for will not come."""
        self._stop_starving()
        self.channel.put(Kind.HOPELESS, wire.pack_count(self.wait))

    def put_grant(self) -> None:
        """Let it have the memory that it waits for, though the budget is spent."""
        self._stop_starving()
        self.channel.put(Kind.GRANT, wire.pack_count(self.wait))

    def put_trim(self) -> None:
        """Ask it for the memory that it can spare: kept warm, or in its garbage."""
        self.trimming = True
        self.channel.put(Kind.TRIM, b"")

    def _stop_starving(self) -> None:
        self.starving = False
        self._crew.starving.pop(self, None)


def _pack_span(task: Task) -> tuple[Kind, bytes, tuple[int, ...]]:
    payload: Items = task.payload
    return Kind.SPAN, wire.SPAN.pack(task.job, task.index, task.start, task.count) + payload.stream, ()
