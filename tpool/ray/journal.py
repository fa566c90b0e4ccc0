"""Which task a worker runs, and what the ones before it came to: readable when the worker is dead.

A call of many short tasks answers when all have run, so what it had done dies with its worker. Where worker and caller
are on one machine (a local Ray, or the caller's own node) the worker writes into memory of the caller's as it goes: a
count of what it has started, and the results, if they are small and plain. So a fault there fails the task that was
running and only that one, as with local workers. From another machine that cannot be had: a call that dies there is
lost as a whole; it holds tasks of less than about 2 ms in all, or one.

The memory is a file without a name; the worker opens it by the caller's ``/proc`` entry, and a token in it tells that
it is the right one. Calls take turns in its pages, since the answer to a call that has ended may still be on its way,
in the worker's own hands, while the next ones run; what no call has used takes no memory.

::

    token ║ page | page | …        page: call | started | end ║ record | record | …
                                   record: job, index, seconds, length, stream

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

__all__ = ["Address", "Journal", "Journals", "Page", "Record"]

NBYTES = 256 * 1024
"""Of one call. Results that do not fit are lost with their call; a call has at most 128 tasks."""

CALLS = 16
"""So many calls are remembered. A worker holds two, or a dozen of ever fewer tasks at the end of a job."""

_TOKEN_NBYTES = 16
_HEAD = struct.Struct("<QQQ")
_RECORD = struct.Struct("<QQdi")
_NOT_HERE = -1
_NUMBER = struct.Struct("<Q")

Record = tuple[int, int, float, bytes]


@dataclass(frozen=True, slots=True)
class Page:
    """What is written of one call.

    Attributes:
        started: how many of its tasks were.
        records: results from its first task on, up to the first that is not here.
    """

    started: int
    records: list[Record]


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
        self._map = mmap.mmap(fd, _TOKEN_NBYTES + CALLS * NBYTES)

    @classmethod
    def create(cls) -> tuple[Journal, int, bytes]:
        """A new one, in the caller: the journal, its descriptor (owned by whoever calls), its token."""
        fd = os.memfd_create("tpool-journal", os.MFD_CLOEXEC)
        os.ftruncate(fd, _TOKEN_NBYTES + CALLS * NBYTES)
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
        self._page = page = _page_of(call)
        self._started, self._end = 0, page + _HEAD.size
        # Of an earlier call, until the number changes; so that comes last.
        _NUMBER.pack_into(self._map, page + 8, 0)
        _NUMBER.pack_into(self._map, page + 16, self._end)
        _NUMBER.pack_into(self._map, page, call)

    def start(self) -> None:
        """A task begins."""
        self._started += 1
        _NUMBER.pack_into(self._map, self._page + 8, self._started)

    def finish(self, job: int, index: int, seconds: float, stream: bytes | None) -> None:
        """A task has ended; None for a result that is not plain."""
        at, length = self._end, 0 if stream is None else len(stream)
        end = at + _RECORD.size + length
        if end > self._page + NBYTES - _RECORD.size:
            stream, end = None, at + _RECORD.size
            if end > self._page + NBYTES:
                return
        _RECORD.pack_into(self._map, at, job, index, seconds, _NOT_HERE if stream is None else length)
        if stream is not None:
            self._map[at + _RECORD.size : end] = stream
        self._end = end
        _NUMBER.pack_into(self._map, self._page + 16, end)

    # In the caller --------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Another worker has the slot."""
        for call in range(CALLS):
            _HEAD.pack_into(self._map, _page_of(call), 0, 0, 0)

    @property
    def call(self) -> int:
        """The number of the call that was begun last; 0 if none was."""
        return max(int(_NUMBER.unpack_from(self._map, _page_of(call))[0]) for call in range(CALLS))

    def read(self, call: int) -> Page | None:
        """What is written of this call; None if it was not begun, or too many others were since."""
        page = _page_of(call)
        number, started, end = _HEAD.unpack_from(self._map, page)
        if number != call:
            return None
        return Page(started, list(self._records(page + _HEAD.size, min(end, page + NBYTES))))

    def _records(self, at: int, end: int) -> Iterator[Record]:
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


def _page_of(call: int) -> int:
    """Where a call's page begins."""
    return _TOKEN_NBYTES + call % CALLS * NBYTES


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
