"""Which task a worker runs, and what the ones before it came to: readable when the worker is dead.

A call of many short tasks answers when all have run, so what it had done dies with its worker. Where worker and caller
are on one machine (a local Ray, or the caller's own node) the worker writes into memory of the caller's as it goes: a
count of what it has started, and the results, if they are small and plain. So a fault there fails the task that was
running and only that one, as with local workers. From another machine that cannot be had: a call that dies there is
lost as a whole; it holds tasks of less than about 2 ms in all, or one.

The memory is a file without a name; the worker opens it by the caller's ``/proc`` entry, and a token in it tells that
it is the right one.

::

    token (16) | call | started | end ║ record | record | …        record: job, index, seconds, length, stream

``started`` is counted before a task begins, ``end`` moved after a record is whole, so that a death at any point leaves
what is true.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["Address", "Journal", "Journals", "Record"]

NBYTES = 256 * 1024
"""Of one slot. Results that do not fit are lost with their call; a call has at most 128 tasks."""

_TOKEN_NBYTES = 16
_HEAD = struct.Struct("<QQQ")
_RECORD = struct.Struct("<QQdi")
_NOT_HERE = -1
_FIRST = _TOKEN_NBYTES + _HEAD.size
_STARTED = struct.Struct("<Q")
_STARTED_AT = _TOKEN_NBYTES + 8
_END_AT = _TOKEN_NBYTES + 16

Record = tuple[int, int, float, bytes]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a worker finds the journal of its slot: a descriptor of the caller's, and what must be in it."""

    pid: int
    fd: int
    token: bytes


class Journal:
    """One slot's; written by its worker's thread, read by the caller when that is dead.

    Args:
        fd: of the memory; not needed any more once it is mapped.
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, NBYTES)

    @classmethod
    def create(cls) -> tuple[Journal, int, bytes]:
        """A new one, in the caller: the journal, its descriptor (owned by whoever calls), its token."""
        fd = os.memfd_create("tpool-journal", os.MFD_CLOEXEC)
        os.ftruncate(fd, NBYTES)
        journal, token = cls(fd), secrets.token_bytes(_TOKEN_NBYTES)
        journal._map[:_TOKEN_NBYTES] = token
        return journal, fd, token

    @classmethod
    def attach(cls, address: Address) -> Journal | None:
        """The one at this address, in a worker; None if it is not on this machine."""
        with suppress(OSError, ValueError):
            fd = os.open(f"/proc/{address.pid}/fd/{address.fd}", os.O_RDWR | os.O_CLOEXEC)
            try:
                journal = cls(fd)
            finally:
                os.close(fd)
            if journal._map[:_TOKEN_NBYTES] == address.token:
                return journal
        return None

    # In the worker --------------------------------------------------------------------------------------------------

    def begin(self, call: int) -> None:
        """A call begins."""
        self._started, self._end = 0, _FIRST
        # Of the call before, until the number changes; so that comes last.
        _STARTED.pack_into(self._map, _STARTED_AT, 0)
        _STARTED.pack_into(self._map, _END_AT, _FIRST)
        _STARTED.pack_into(self._map, _TOKEN_NBYTES, call)

    def start(self) -> None:
        """A task begins."""
        self._started += 1
        _STARTED.pack_into(self._map, _STARTED_AT, self._started)

    def finish(self, job: int, index: int, seconds: float, stream: bytes | None) -> None:
        """A task has ended; None for a result that is not plain."""
        at, length = self._end, 0 if stream is None else len(stream)
        end = at + _RECORD.size + length
        if end > NBYTES - _RECORD.size:
            stream, end = None, at + _RECORD.size
            if end > NBYTES:
                return
        _RECORD.pack_into(self._map, at, job, index, seconds, _NOT_HERE if stream is None else length)
        if stream is not None:
            self._map[at + _RECORD.size : end] = stream
        self._end = end
        _STARTED.pack_into(self._map, _END_AT, end)

    # In the caller --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Another worker has the slot."""
        _HEAD.pack_into(self._map, _TOKEN_NBYTES, 0, 0, _FIRST)

    @property
    def call(self) -> int:
        """The number of the call that was begun last; 0 if none was."""
        return int(_HEAD.unpack_from(self._map, _TOKEN_NBYTES)[0])

    @property
    def started(self) -> int:
        """How many tasks of that call were started."""
        return int(_HEAD.unpack_from(self._map, _TOKEN_NBYTES)[1])

    def records(self) -> Iterator[Record]:
        """Results of that call from its first task on, up to the first that is not here."""
        at, end = _FIRST, min(NBYTES, _HEAD.unpack_from(self._map, _TOKEN_NBYTES)[2])
        while at + _RECORD.size <= end:
            job, index, seconds, length = _RECORD.unpack_from(self._map, at)
            at += _RECORD.size
            if length < 0 or at + length > end:
                return
            yield job, index, seconds, self._map[at : at + length]
            at += length

    def close(self) -> None:
        """Unmap it."""
        self._map.close()


class Journals:
    """Those of the slots whose workers are on the caller's node, in the caller. The handler's thread's."""

    def __init__(self) -> None:
        self._all: dict[int, tuple[Journal, int, bytes]] = {}

    def get(self, slot: int) -> Journal | None:
        """The journal of a slot; None if it has none."""
        known = self._all.get(slot)
        return None if known is None else known[0]

    def hand_over(self, slot: int) -> Address | None:
        """For a new worker of a slot, on this node; None at the limit of descriptors."""
        if slot not in self._all:
            try:
                self._all[slot] = Journal.create()
            except OSError:
                return None
        journal, fd, token = self._all[slot]
        journal.clear()
        return Address(os.getpid(), fd, token)

    def close(self) -> None:
        """The pool has ended."""
        while self._all:
            _, (journal, fd, _) = self._all.popitem()
            journal.close()
            os.close(fd)
