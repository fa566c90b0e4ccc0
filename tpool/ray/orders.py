"""What a worker on Ray must hear before it is given tasks: definitions, functions, objects; each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tpool.local.crew import SlotRecord
from tpool.ray.member import Member
from tpool.ray.parcels import Parcel, pack
from tpool.ray.tasks import Call
from tpool.task import JobId, Task
from tpool.tensors.definitions import Definitions
from tpool.tensors.payload import GroupId, HeldObject

__all__ = ["Orders"]


class Orders:
    """Puts together the calls of one pool's workers; the handler's thread's, but for ``jobs``, to which callers add.

    Args:
        definitions: of the pool.
        put: ``ray.put``.
        slots: what each slot has done.

    Attributes:
        jobs: (mode, function) of each open job that has one.
    """

    def __init__(self, definitions: Definitions, put: Callable[[Any], Any], slots: list[SlotRecord]) -> None:
        self.jobs: dict[JobId, tuple[int, Parcel | bytes]] = {}
        self._definitions = definitions
        self._put = put
        self._slots = slots
        self._groups: dict[GroupId, Parcel] = {}  # stored once for the whole cluster

    def send_tasks(self, member: Member, tasks: list[Task]) -> None:
        """Give a worker tasks, in one call."""
        call, refs = Call(0), []  # type: tuple[Call, list[Any]]
        for task in tasks:
            if task.job not in member.sent_jobs:
                self._add_job(member, task.job, call, refs)
            call.tasks.append((task.job, task.index, self.wire(member, task.payload, call, refs)))
        member.send(call, refs)

    def wire(self, member: Member, parcel: Parcel | bytes, call: Call, refs: list[Any]) -> Any:
        """What stands for a parcel in a call; what it needs is added to the news."""
        record = self._slots[member.slot]
        if isinstance(parcel, bytes):
            record.piped_nbytes += len(parcel)
            return parcel
        if parcel.ref is None:
            record.piped_nbytes += parcel.nbytes
        else:
            record.moved_nbytes += parcel.nbytes
        for gid, payload in self._definitions.missing(parcel.groups, member.sent_groups):
            group = self._groups.get(gid)
            if group is None:
                group = self._groups[gid] = pack(payload, self._put)
            self._add_objects(member, payload.held, call, refs)
            call.news.append(("group", gid, group.wire(refs)))
        self._add_objects(member, parcel.held, call, refs)
        return parcel.wire(refs)

    def _add_job(self, member: Member, job: JobId, call: Call, refs: list[Any]) -> None:
        known = self.jobs.get(job)
        if known is None:
            return  # an apply: the task brings its function along
        member.sent_jobs.add(job)
        mode, function = known
        wired = self.wire(member, function, call, refs)
        call.news.append(("job", job, (mode, wired)))

    def _add_objects(self, member: Member, objects: Iterable[HeldObject], call: Call, refs: list[Any]) -> None:
        for held in objects:
            if held.id not in member.sent_objects:
                member.sent_objects.add(held.id)
                parcel: Any = held.payload
                call.news.append(("object", held.id, self.wire(member, parcel, call, refs)))

    def begin(self, member: Member, hello: Any, initializer: Parcel) -> None:
        """Have a worker run its initializer."""
        call, refs = Call(0), []  # type: tuple[Call, list[Any]]
        call.tasks.append((0, 0, self.wire(member, initializer, call, refs)))
        member.begin(hello, call, refs)

    def forget_job(self, member: Member, job: JobId) -> None:
        """It need not keep this job's function; it is told with its next call."""
        if job in member.sent_jobs:
            member.sent_jobs.discard(job)
            member.news.append(("forget", job, None))

    def drop_objects(self, member: Member, objects: list[int]) -> None:
        """It need not keep these objects; it is told at once, as they may be large."""
        dropped = member.sent_objects.intersection(objects)
        if dropped:
            member.sent_objects -= dropped
            member.news += [("drop", id, None) for id in dropped]
            member.send(Call(0), [])
