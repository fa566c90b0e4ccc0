"""A worker's outbox: results of short tasks, in shared memory.

To write a result to a socket and to wake the parent with it costs more than a task of microseconds. So a worker
that has more tasks waiting puts a small result here, where it survives the worker, and goes on. The parent looks when
it has nothing else to do, and only before it goes to sleep asks for a bell::

    worker                                           parent
    put: entry, then count                           sleep: bell := 1, then looks at count
         then looks at bell; 1: a frame by socket    awake: take: entries up to count, then read := where they end

The last task's result, and any that is not small and plain, goes by socket. It says how many entries come before it,
and each entry how many such replies come before *it*, so the order is kept.

All outboxes of a pool lie in one memfd, one after the other::

    | count u64 | read u64 | bell u64 | transferred f64 | ... to 64 bytes | ring of RING_NBYTES | room for one header |

``count`` is written by the worker and ``read`` by the parent; the bell is set by the parent and cleared by the worker.
``transferred`` is the worker's, too: how many seconds it has spent on decoding and encoding so far. It stands here,
and does not travel with each result, as that is all that is asked of it.
"""

from __future__ import annotations

import os
import struct
import threading

from tpool.errors import ProtocolError
from tpool.tensors.memfd import PAGE_NBYTES, create_memfd, map_memfd, memfd_nbytes

__all__ = ["MAX_DATA_NBYTES", "Entry", "Outbox", "Outboxes"]

RING_NBYTES = 15 * PAGE_NBYTES
"""Several messages' worth of small results. When it is full, results go by socket."""

MAX_DATA_NBYTES = 1024
"""A longer result goes by socket: copying it costs as much."""

_COUNT, _READ, _BELL = range(3)
_TRANSFERRED = slice(24, 32)
_HEADER_NBYTES = 64
_OUTBOX_NBYTES = 16 * PAGE_NBYTES
# job, index, seconds, replies by socket before it, nbytes of the data that follow; each begins at a multiple of eight.
_ENTRY = struct.Struct("<QQdII")
# In the place of a job: the ring goes on at its beginning.
_SKIP = (1 << 64) - 1

assert _HEADER_NBYTES + RING_NBYTES + _ENTRY.size <= _OUTBOX_NBYTES

Entry = tuple[int, int, float, bytes]
"""job, index, seconds the task ran, pickled result."""


class Outbox:
    """One end of the outbox of one worker; made anew, by both sides, for each worker of a slot.

    Attributes:
        entries: how many this end has put or taken.
        replies: how many results this end has sent or received by socket, modulo 2**32; counted by the end's owner.
        transferred: one number, see above; written by the worker.
    """

    __slots__ = ("_at", "_fence", "_ring", "_words", "entries", "replies", "transferred")

    def __init__(self, region: memoryview) -> None:
        self._words = region[:_HEADER_NBYTES].cast("Q")
        self.transferred = region[_TRANSFERRED].cast("d")
        self._ring = region[_HEADER_NBYTES:]
        self._at = 0  # bytes since the beginning of time: where the next entry goes, or comes from
        # Taking a lock is a full memory barrier, which a store is not: without one both sides could look too early.
        self._fence = threading.Lock()
        self.entries = 0
        self.replies = 0

    def clear(self) -> None:
        """Begin anew; by the parent, before the worker is started."""
        self._words[_COUNT] = self._words[_READ] = self._words[_BELL] = 0
        self.transferred[0] = 0.0

    # The worker's end -----------------------------------------------------------------------------------------------

    def put(self, job: int, index: int, seconds: float, data: bytes) -> bool:
        """Add a result; False if there is no room for it."""
        nbytes = len(data)
        if nbytes > MAX_DATA_NBYTES:
            return False
        at = self._at
        size = _ENTRY.size + nbytes + 7 & ~7
        start = at % RING_NBYTES
        skipped = RING_NBYTES - start if start + size > RING_NBYTES else 0
        if at + skipped + size > self._words[_READ] + RING_NBYTES:
            return False
        ring = self._ring
        if skipped:
            ring[start : start + 8] = b"\xff" * 8
            at += skipped
            start = 0
        _ENTRY.pack_into(ring, start, job, index, seconds, self.replies, nbytes)
        start += _ENTRY.size
        ring[start : start + nbytes] = data
        self._at = at + size
        self.entries += 1
        self._words[_COUNT] = self.entries  # published: from here on the result survives us
        return True

    def take_bell(self) -> bool:
        """Whether the parent sleeps and wants to hear of what was put; true once."""
        self._pass_fence()
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

    def take(self, until: int | None = None) -> list[Entry]:
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
        ring, at, replies = self._ring, self._at, self.replies
        found: list[Entry] = []
        for _ in range(count - self.entries):
            start = at % RING_NBYTES
            job, index, seconds, replies_before, nbytes = _ENTRY.unpack_from(ring, start)
            if job == _SKIP:
                at += RING_NBYTES - start
                start = 0
                job, index, seconds, replies_before, nbytes = _ENTRY.unpack_from(ring, 0)
            if replies_before != replies:
                break
            start += _ENTRY.size
            end = start + nbytes
            if end > RING_NBYTES:
                raise ProtocolError("the entries of its outbox overlap")
            found.append((job, index, seconds, bytes(ring[start:end])))
            at += _ENTRY.size + nbytes + 7 & ~7
        self._at = at
        self.entries += len(found)
        self._words[_READ] = at
        return found

    def _pass_fence(self) -> None:
        self._fence.acquire()
        self._fence.release()


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
