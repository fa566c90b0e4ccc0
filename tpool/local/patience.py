"""Waiting for what is likely to come at once, without going to sleep first.

To put a process to sleep and to wake it takes longer than a short task: an ``apply`` of a no-op took 209 to 526 us
where both ends slept, 80 to 179 where one of them looked first, 42 to 60 where both did (two virtual cores), and half
of the processor time or less. So who has lately been answered soon looks for a moment before it sleeps, and lets
others run between two looks. Where that was in vain it looks ever more seldom; who waits long does not look at all.
"""

from __future__ import annotations

import os
import select
from time import monotonic

__all__ = ["LOOK_SECONDS", "Patience"]

LOOK_SECONDS = 100e-6
"""How long one looks before one sleeps: about what sleeping costs. Longer: more processor time in vain. Shorter:
answers that take as long as this are slept for."""

SOON_SECONDS = 1e-3
"""Who slept for less may look again: it slept because it slept."""

MAX_PASSES = 255
"""After many vain looks the next comes with so many short sleeps."""


class Patience:
    """Waits for one descriptor to become readable. Used by one thread at a time.

    Not in recvmsg: who sleeps there is also woken when the other end *reads* (the socket has room to write again),
    which costs a switch of processes per task. poll() is told what it waits for.

    Args:
        fd: the descriptor; not owned.
    """

    __slots__ = ("_pass", "_passes", "_poll")

    def __init__(self, fd: int) -> None:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        self._poll = poller.poll
        self._passes = 1  # how many short sleeps there are to be until the next look
        self._pass = 1  # how many of these are left

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for so long at most, or as long as it takes; returns whether there is something to read."""
        if not self._pass:
            if self._look():
                self._passes = 0
                return True
            self._pass = self._passes = min(MAX_PASSES, 2 * self._passes + 1)
        began = monotonic()
        ready = self._poll(None if seconds is None else seconds * 1000)
        if self._pass and monotonic() - began < SOON_SECONDS:
            self._pass -= 1
        return bool(ready)

    def wait_for(self, seconds: float) -> bool:
        """Wait for so long at most; returns whether there is something to read."""
        return bool(self._poll(seconds * 1000))

    def _look(self) -> bool:
        poll = self._poll
        until = monotonic() + LOOK_SECONDS
        while not poll(0):
            if monotonic() > until:
                return False
            os.sched_yield()
        return True
