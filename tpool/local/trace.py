"""A worker's trace: when its latest tasks began and ended, in shared memory. Only where a timeline is asked for.

The worker writes, and overwrites the oldest; nobody is told, and the parent reads only when a timeline is made. So a
record costs the worker a few stores and the parent nothing, and what a killed worker did stays readable, up to the
task that it was killed in::

    | count u64 | ... up to 64 bytes | capacity x record of 64 bytes |

The first half of a record is written when a task begins, with no end; the rest when it ends, and then the count.

One trace for each slot, whose workers write one after the other. All times are seconds of CLOCK_MONOTONIC, which is
one clock for all processes of a machine.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from tpool.tensors.memfd import PAGE_NBYTES, create_memfd, map_memfd, memfd_nbytes

__all__ = ["DEFINITIONS", "Record", "Trace"]

DEFINITIONS = 0
"""Stands for a job where a worker read what functions of the caller's script need; jobs count from 1."""

# job, index, began, ended; then decoded, ran, nbytes that came, nbytes sent. The end is written with both.
_HEAD = struct.Struct("<QQdd")
_REST = struct.Struct("<dddQQ")
_REST_AT = 24
_RECORD = struct.Struct("<QQddddQQ")
_HEADER_NBYTES = 64


class Record(NamedTuple):
    """Task number ``task`` of a job: when its parts ended, and the bytes that it was given and gave."""

    job: int
    task: int
    began: float
    ended: float
    decoded: float
    ran: float
    came_nbytes: int
    sent_nbytes: int


class Trace:
    """The trace of one slot, mapped.

    Attributes:
        fd: the memfd, to be sent to workers; owned.
        capacity: how many records it keeps.
    """

    __slots__ = ("_at", "_count", "_view", "_words", "capacity", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        try:
            nbytes = memfd_nbytes(fd)
            self._view = map_memfd(fd, nbytes)[0]
        except BaseException:
            os.close(fd)
            raise
        self.capacity = (nbytes - _HEADER_NBYTES) // _RECORD.size
        self._words = self._view[:8].cast("Q")
        self._count: int = self._words[0]
        self._at = self._place(self._count)

    def _place(self, number: int) -> int:
        return _HEADER_NBYTES + number % self.capacity * _RECORD.size

    @classmethod
    def create(cls, capacity: int) -> Trace:
        """A trace that keeps at least so many records; memory is used as they come."""
        nbytes = _HEADER_NBYTES + capacity * _RECORD.size
        return cls(create_memfd("tpool-trace", -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES))

    @classmethod
    def attach(cls, fd: int) -> Trace:
        """In a worker: go on where the slot's earlier worker ended; the descriptor is taken over."""
        trace = cls(fd)
        trace.close()
        return trace

    def close(self) -> None:
        """Close the descriptor; the records stay readable."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # The worker -----------------------------------------------------------------------------------------------------

    def begin(self, job: int, index: int, now: float) -> None:
        """A task begins."""
        _HEAD.pack_into(self._view, self._at, job, index, now, 0.0)

    def end(self, now: float, decoded: float, ran: float, came_nbytes: int, sent_nbytes: int) -> None:
        """The task that was begun has ended; see Record."""
        _REST.pack_into(self._view, self._at + _REST_AT, now, decoded, ran, came_nbytes, sent_nbytes)
        self._count = count = self._count + 1
        self._at = _HEADER_NBYTES + count % self.capacity * 64
        self._words[0] = count

    def note_definitions(self, began: float, ended: float, nbytes: int) -> None:
        """Definitions were read. What is read while a task waits for memory is a part of that task."""
        if self.running() is None:
            self.begin(DEFINITIONS, 0, began)
            self.end(ended, ended, ended, nbytes, 0)

    # The parent -----------------------------------------------------------------------------------------------------

    def read(self) -> tuple[list[Record], int]:
        """What is kept, oldest first; and how many older records are gone. The worker may go on writing meanwhile."""
        first = max(0, self._words[0] - self.capacity)
        copy = bytes(self._view[_HEADER_NBYTES:])
        last = self._words[0]
        # What was overwritten while we copied, and what may just now be.
        first = max(first, last + 1 - self.capacity) if last >= self.capacity else first
        records = []
        for number in range(first, last):
            record = Record._make(_RECORD.unpack_from(copy, self._place(number) - _HEADER_NBYTES))
            # Stores may be seen out of order on some processors; a record that was not all there is left out.
            if 0.0 < record.began <= record.decoded <= record.ran <= record.ended:
                records.append(record)
        return records, first

    def running(self) -> tuple[int, int, float] | None:
        """The (job, index, when it began) of the task that was begun and has not ended; None if there is none."""
        job, index, began, ended = _HEAD.unpack_from(self._view, self._place(self._words[0]))
        return (job, index, began) if began and not ended else None

    def take_running(self) -> tuple[int, int, float] | None:
        """The same of a worker that is gone; the next one does not run it."""
        running = self.running()
        _HEAD.pack_into(self._view, self._place(self._words[0]), 0, 0, 0.0, 0.0)
        return running
