"""A worker's outbox: results of short tasks, in shared memory.

To write a result to a socket and to wake the parent with it costs more than a task of microseconds. So a worker
that has more tasks waiting puts a small result here, where it survives the worker, and goes on. The parent looks when
it has nothing else to do, and only before it goes to sleep asks for a bell::

    worker                                           parent
    put: entry, written, count                       sleep: bell := 1, then looks at count
         then looks at bell; 1: a frame by socket    awake: take: entries up to count, then read := where they end

A result that lies in shared memory leaves its handles here. The last task's result, and any that is not small, goes
by socket; so does one that is no value, or has descriptors, or has give-backs to go with it. It says how many entries
come before it, and each entry how many such replies come before *it*, so the order is kept.

All outboxes of a pool lie in one memfd, one after the other::

    | count u64 | read u64 | bell u64 | transferred f64 | written u64 | ... to 64 bytes | ring | room for one header |

``count`` (of entries) and ``written`` (where the last of them ends) are the worker's, ``read`` is the parent's, and
the last two are in bytes since the beginning. The bell is set by the parent and cleared by the worker. What the worker
has spent on decoding and encoding so far stands in ``transferred``, in seconds; it does not travel with each result,
as that is all that is asked of it.

That stores are seen in the order in which they were made is true of x86; on ARM this has never been run.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from tpool.errors import ProtocolError
from tpool.tensors.memfd import PAGE_NBYTES, create_memfd, map_memfd, memfd_nbytes

__all__ = ["MAX_DATA_NBYTES", "Form", "Outbox", "Outboxes", "Run"]

RING_NBYTES = 15 * PAGE_NBYTES
"""Several messages' worth of small results. When it is full, results go by socket."""

MAX_DATA_NBYTES = 1024
"""A longer result goes by socket: copying it costs as much."""

_COUNT, _READ, _BELL, _, _WRITTEN = range(5)
_TRANSFERRED = slice(24, 32)
_HEADER_NBYTES = 64
_OUTBOX_NBYTES = 16 * PAGE_NBYTES
# job, index, seconds, replies by socket before it, nbytes of the data that follow; each begins at a multiple of eight.
_ENTRY = struct.Struct("<QQdII")
# The same where the result is a number, which follows, or one of _CONSTANTS; what stands for nbytes then says which.
_INT_ENTRY = struct.Struct("<QQdIIq")
_FLOAT_ENTRY = struct.Struct("<QQdIId")
_FLOAT = struct.Struct("<d")
_CODE = struct.Struct("<I")
_CODE_AT = 28
_INT_CODE, _FLOAT_CODE, _CONSTANT_CODE = (0xFFFFFFF0 + number for number in range(3))
_CODES = frozenset({_INT_CODE, _FLOAT_CODE, _CONSTANT_CODE})
# Added to nbytes: the data are a payload with handles, not a pickle.
_HANDLES = 1 << 31
_CONSTANTS = (None, False, True)
# An entry without data may be the last one; it is read as if it had a number.
_PADDING = _INT_ENTRY.size - _ENTRY.size
_MIN_INT, _MAX_INT = -(1 << 63), (1 << 63) - 1
# In the place of a job: the ring goes on at its beginning.
_SKIP = (1 << 64) - 1

assert _HEADER_NBYTES + RING_NBYTES + _ENTRY.size <= _OUTBOX_NBYTES


class Form(Enum):
    """What a result in an outbox is."""

    STREAM = auto()  # a plain pickle
    PAYLOAD = auto()  # see ``wire.pack_payload``
    VALUE = auto()  # itself


Run = tuple[int, int, list[Any], Sequence[float], Form]
"""Results of one form, of tasks of one job that stand behind each other: job, index of the first, the results, how
many seconds each task ran."""


class Outbox:
    """One end of the outbox of one worker; made anew, by both sides, for each worker of a slot.

    Attributes:
        entries: how many this end has put or taken.
        replies: how many results this end has sent or received by socket, modulo 2**32; counted by the end's owner.
        transferred: one number, see above; written by the worker.
    """

    __slots__ = ("_at", "_fence", "_ring", "_room_until", "_start", "_words", "entries", "replies", "transferred")

    def __init__(self, region: memoryview) -> None:
        self._words = region[:_HEADER_NBYTES].cast("Q")
        self.transferred = region[_TRANSFERRED].cast("d")
        self._ring = region[_HEADER_NBYTES:]
        self._start = 0  # in the worker: where in the ring the next entry goes
        self._room_until = 0  # likewise: what was known of the room when it was last looked at
        self._at = 0  # bytes since the beginning of time: where the next entry goes, or comes from
        # Taking a lock is a full memory barrier, which a store is not: without one both sides could look too early.
        self._fence = threading.Lock()
        self.entries = 0
        self.replies = 0

    def clear(self) -> None:
        """Begin anew; by the parent, before the worker is started."""
        self._words[_COUNT] = self._words[_READ] = self._words[_BELL] = self._words[_WRITTEN] = 0
        self.transferred[0] = 0.0

    # The worker's end -----------------------------------------------------------------------------------------------

    def put(self, job: int, index: int, seconds: float, data: bytes, handles: bool = False) -> bool:
        """Add a result; False if there is no room for it.

        Args:
            job: of the task.
            index: likewise.
            seconds: how long it ran.
            data: the result, as a plain stream.
            handles: whether it is a payload instead, without descriptors.
        """
        nbytes = len(data)
        size = _ENTRY.size + nbytes + 7 & ~7
        if nbytes > MAX_DATA_NBYTES or not self._make_room(size):
            return False
        start = self._start
        _ENTRY.pack_into(self._ring, start, job, index, seconds, self.replies, nbytes | _HANDLES * handles)
        start += _ENTRY.size
        self._ring[start : start + nbytes] = data
        self._publish(size)
        return True

    def has_room(self, data: bytes) -> bool:
        """Whether ``put`` will have room for this."""
        nbytes = len(data)
        return nbytes <= MAX_DATA_NBYTES and self._make_room(_ENTRY.size + nbytes + 7 & ~7)

    def put_value(self, job: int, index: int, seconds: float, value: object) -> bool:
        """Add a result that is a number, a truth or None; False if it is none, or if there is no room for it."""
        kind = type(value)
        if kind is int and _MIN_INT <= value <= _MAX_INT:  # type: ignore[operator]
            pack, code = _INT_ENTRY.pack_into, _INT_CODE
        elif kind is float:
            pack, code = _FLOAT_ENTRY.pack_into, _FLOAT_CODE
        elif value is None or kind is bool:
            pack, code, value = _INT_ENTRY.pack_into, _CONSTANT_CODE, _CONSTANTS.index(value)
        else:
            return False
        size = _INT_ENTRY.size
        if (self._start + size > RING_NBYTES or self._at + size > self._room_until) and not self._make_room(size):
            return False
        pack(self._ring, self._start, job, index, seconds, self.replies, code, value)
        # As _publish does; a call costs a tenth of all this.
        self._start += size
        self._at = self._words[_WRITTEN] = self._at + size
        self.entries = self._words[_COUNT] = self.entries + 1
        return True

    def _make_room(self, nbytes: int) -> bool:
        """See to it that an entry can stand at ``_start``; False while there is no room."""
        if self._start + nbytes > RING_NBYTES and not self._skip_to_front(nbytes):
            return False
        if self._at + nbytes > self._room_until:
            self._room_until = self._words[_READ] + RING_NBYTES
            return self._at + nbytes <= self._room_until
        return True

    def _publish(self, nbytes: int) -> None:
        """From here on the result survives us."""
        self._start += nbytes
        self._at = self._words[_WRITTEN] = self._at + nbytes
        self.entries = self._words[_COUNT] = self.entries + 1

    def _skip_to_front(self, nbytes: int) -> bool:
        """Let the next entry stand at the ring's beginning; False while that is not free."""
        skipped = RING_NBYTES - self._start
        if self._at + skipped + nbytes > self._words[_READ] + RING_NBYTES:
            return False
        if skipped:
            self._ring[self._start : self._start + 8] = b"\xff" * 8
        self._at += skipped
        self._start = 0
        return True

    def take_bell(self) -> bool:
        """Whether the parent sleeps and wants to hear of what was put; true once."""
        self._fence.acquire()
        self._fence.release()
        if not self._words[_BELL]:
            return False
        self._words[_BELL] = 0
        return True

    # The parent's end -----------------------------------------------------------------------------------------------

    def ask_for_bell(self) -> None:
        """Ask to be told of the next entry; then look once more, as it may have come before this was seen."""
        self._words[_BELL] = 1
        self._pass_fence()

    @property
    def has_entries(self) -> bool:
        """Whether there is something to take, perhaps only after a reply on its way."""
        return bool(self._words[_COUNT] != self.entries)

    def take(self, until: int | None = None) -> list[Run]:
        """The entries that came, in order, as far as no reply belongs between them.

        Args:
            until: take no more than so many since the beginning, all of which must have come.

        Raises:
            ProtocolError: these are no entries.
        """
        count = self._words[_COUNT]
        if until is not None:
            if until > count:
                raise ProtocolError(f"it speaks of {until} results in its outbox, which has {count}")
            count = until
        if count <= self.entries:
            return []
        if count - self.entries > RING_NBYTES // _ENTRY.size:
            raise ProtocolError(f"it speaks of {count} results in its outbox, {self.entries} were taken")
        count -= self.entries
        try:
            data = self._copy()
            run = self._take_alike(count, data)
            return self._take(count, data) if run is None else [run]
        except struct.error as error:
            raise ProtocolError("the entries of its outbox are cut off") from error

    def _copy(self) -> bytes:
        """What was written and not taken: to cut a result out of bytes costs a third of cutting it out of the ring."""
        nbytes = self._words[_WRITTEN] - self._at
        if not 0 < nbytes <= RING_NBYTES:
            raise ProtocolError(f"it speaks of {nbytes} bytes in its outbox")
        start = self._at % RING_NBYTES
        data = bytes(self._ring[start : min(start + nbytes, RING_NBYTES)])
        return b"".join((data, self._ring[: nbytes - len(data)], bytes(_PADDING)))

    def _take_alike(self, count: int, data: bytes) -> Run | None:
        """Take them all at once, if they are values of one kind, of tasks that stand behind each other; else None.

        A value's entry has a fixed size: if the first one is a value, the second stands there where it is looked for.
        """
        nbytes = count * _INT_ENTRY.size
        (code,) = _CODE.unpack_from(data, _CODE_AT)
        if code not in _CODES or len(data) < nbytes + _PADDING:
            return None
        entry = _FLOAT_ENTRY if code == _FLOAT_CODE else _INT_ENTRY
        jobs, indices, times, before, codes, found = zip(*entry.iter_unpack(data[:nbytes]), strict=True)
        alike = jobs.count(jobs[0]) == before.count(self.replies) == codes.count(code) == count
        if not alike or jobs[0] == _SKIP or indices != tuple(range(indices[0], indices[0] + count)):
            return None
        values = [_other_value(code, value, data, 0) for value in found] if code == _CONSTANT_CODE else list(found)
        self._at += nbytes
        self.entries += count
        self._words[_READ] = self._at
        return jobs[0], indices[0], values, times, Form.VALUE

    def _take(self, count: int, data: bytes) -> list[Run]:
        unpack, replies = _INT_ENTRY.unpack_from, self.replies
        runs: list[Run] = []
        of_job = following = -1
        of_form = None
        position = taken = 0
        while taken < count:
            job, index, seconds, replies_before, nbytes, value = unpack(data, position)
            if job == _SKIP:
                position = RING_NBYTES - self._at % RING_NBYTES
                job, index, seconds, replies_before, nbytes, value = unpack(data, position)
            if replies_before != replies:
                break
            form = Form.VALUE if nbytes >= _INT_CODE else Form.PAYLOAD if nbytes & _HANDLES else Form.STREAM
            if index != following or job != of_job or form is not of_form:
                results: list[Any] = []
                times: list[float] = []
                of_job, of_form = job, form
                runs.append((job, index, results, times, form))
            if form is not Form.VALUE:
                nbytes &= ~_HANDLES
                position += _ENTRY.size
                end = position + nbytes
                if end > len(data) - _PADDING:
                    raise ProtocolError("the entries of its outbox overlap")
                results.append(data[position:end])
                position = end + 7 & ~7
            else:
                if nbytes != _INT_CODE:
                    value = _other_value(nbytes, value, data, position)
                results.append(value)
                position += _INT_ENTRY.size
            following = index + 1
            times.append(seconds)
            taken += 1
        self._at += position
        self.entries += taken
        self._words[_READ] = self._at
        return runs

    def _pass_fence(self) -> None:
        self._fence.acquire()
        self._fence.release()


def _other_value(code: int, number: int, data: bytes, position: int) -> object:
    if code == _FLOAT_CODE:
        return _FLOAT.unpack_from(data, position + _ENTRY.size)[0]
    if code != _CONSTANT_CODE or not 0 <= number < len(_CONSTANTS):
        raise ProtocolError(f"its outbox has an entry of kind {code - _INT_CODE} and value {number}")
    return _CONSTANTS[number]


class Outboxes:
    """The memory of all outboxes of a pool.

    Attributes:
        fd: the memfd, to be sent to workers; owned.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            self._view = map_memfd(fd, memfd_nbytes(fd))[0]
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(cls, count: int) -> Outboxes:
        """Memory for so many workers."""
        return cls(create_memfd("tpool-outboxes", count * _OUTBOX_NBYTES))

    def outbox(self, slot: int) -> Outbox:
        """A new end of a slot's outbox; it stays usable when this is closed."""
        return Outbox(self._view[slot * _OUTBOX_NBYTES : (slot + 1) * _OUTBOX_NBYTES])

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
