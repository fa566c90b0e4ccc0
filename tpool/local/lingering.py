"""Workers that have left their slots but stay alive: CUDA memory dies with the process that made it.

::

    worker: retires, has sent CUDA memory ── LINGERING (its token) ──► parent: the token has no view here ── RETIRE ──►
                                                                       or: the slot gets a new worker; RETIRE follows
                                                                       when the last view dies, or the pool's end

What was sent before a worker lingers has been read, and its leases taken, by the time the parent looks at the token.
From then on the slot's arena, its peer and its place in the ledger belong to the next worker; the one that lingers
runs no task, sends nothing and allocates nothing.
"""

from __future__ import annotations

import logging
import os
import select
import weakref
from collections.abc import Callable

from tpool.local.launch import Launcher
from tpool.local.member import Member
from tpool.local.wire import Kind

logger = logging.getLogger("tpool")

# How long the end of a pool waits for one that it has killed: a process with a CUDA context takes some time to go.
KILLED_SECONDS = 5.0


class Lingering:
    """The workers of one pool that linger. Belongs to the handler's thread.

    They hold no slot, run no task, and are known to nobody else; how many there are is up to what the caller keeps.
    """

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self._watches: dict[int, weakref.ref[object]] = {}

    def __bool__(self) -> bool:
        return bool(self._members)

    def add(self, member: Member, watch: weakref.ref[object]) -> None:
        """It stays until ``watch`` is dead."""
        logger.info("%s, pid %s, stays for CUDA memory that is still in use", member, member.pid)
        self._members[member.id] = member
        self._watches[member.id] = watch

    def dismiss(self, flush: Callable[[Member], None]) -> None:
        """Let those go whose memory nobody uses any more."""
        for key, watch in list(self._watches.items()):
            if watch() is None:
                del self._watches[key]
                self._members[key].channel.put(Kind.RETIRE, b"")
                flush(self._members[key])

    def ended(self, member: Member) -> None:
        """Its process has ended, and was reaped if it was a child of ours."""
        if self._members.pop(member.id, None) is not None:
            self._watches.pop(member.id, None)
            _close(member)

    def members(self) -> list[Member]:
        """All of them."""
        return list(self._members.values())

    def close(self, launcher: Launcher) -> None:
        """The pool ends: nobody is waited for."""
        for member in self._members.values():
            member.kill()
        while self._members:
            _, member = self._members.popitem()
            assert member.pidfd is not None
            poll = select.poll()
            poll.register(member.pidfd, select.POLLIN)
            if poll.poll(KILLED_SECONDS * 1000):
                launcher.reap(int(member.id), member.pidfd)
            _close(member)
        self._watches.clear()


def _close(member: Member) -> None:
    member.close()
    assert member.pidfd is not None
    os.close(member.pidfd)
