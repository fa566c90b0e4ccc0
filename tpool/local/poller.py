"""What the handler's thread waits for: descriptors, and results in the outboxes of workers that were sent ahead."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable

from tpool.local.member import Member
from tpool.messages import Event, WorkerId

__all__ = ["Poller", "Ready", "Source"]

LOOK_SECONDS = 0.0005
"""While workers go through tasks of microseconds, their outboxes are looked into so often. Longer: more results at a
time, which is cheaper, but a stream's consumer waits longer for the first. A worker that runs out of tasks says so."""

BELL_SECONDS = 0.1
"""Once they were asked to ring for the next result, so often is enough; it should not be needed at all."""

Source = Callable[[int, list[Event]], None]
"""Called with what its descriptor is ready for; adds the events that this amounts to."""

Ready = list[tuple[int, int]]


class Poller:
    """Descriptors with their sources. Belongs to the handler's thread.

    Attributes:
        ahead: workers that were sent more than one task: they may leave results in their outboxes.
    """

    def __init__(self) -> None:
        self.ahead: dict[WorkerId, Member] = {}
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}

    def watch(self, fd: int, source: Source, flags: int = 0) -> None:
        """Wait for this descriptor to become readable, too."""
        self._sources[fd] = source
        self._epoll.register(fd, select.EPOLLIN | flags)

    def unwatch(self, fd: int) -> None:
        """Wait for it no longer; allowed for one that is not watched."""
        if self._sources.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # closed already, which unregisters
                self._epoll.unregister(fd)

    def watches(self, fd: int) -> bool:
        """Whether it is waited for."""
        return fd in self._sources

    def watch_writable(self, fd: int, wanted: bool) -> None:
        """Wait for it to become writable as well, or no longer."""
        self._epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT if wanted else select.EPOLLIN)

    def look(self) -> Ready:
        """What is ready now."""
        return self._epoll.poll(0)

    def block(self, timeout: float | None) -> Ready:
        """Wait for something to be ready; or for results in outboxes, which are looked for while workers are fast."""
        if not self.ahead:
            return self._epoll.poll(timeout)
        nap = LOOK_SECONDS if timeout is None else min(timeout, LOOK_SECONDS)
        ready = self._epoll.poll(nap)
        if ready or nap == timeout or self._any_entries():
            return ready
        # Nothing for a while: have them ring. First the bell, then one more look; they do it the other way round.
        for member in self.ahead.values():
            member.outbox.ask_for_bell()
        if self._any_entries():
            return []
        return self._epoll.poll(BELL_SECONDS if timeout is None else min(timeout, BELL_SECONDS))

    def _any_entries(self) -> bool:
        return any(member.outbox.has_entries for member in self.ahead.values())

    def read(self, ready: Ready, events: list[Event]) -> None:
        """Have the sources of ready descriptors add their events."""
        for fd, mask in ready:
            source = self._sources.get(fd)
            if source is not None:  # an earlier one of this round may have closed it
                source(mask, events)

    def close(self) -> None:
        """Wait for nothing any more."""
        self._epoll.close()
        self._sources.clear()
