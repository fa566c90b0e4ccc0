"""What the handler's thread waits for: descriptors, and results in the outboxes of workers that were sent ahead."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable

from tpool.errors import ProtocolError
from tpool.local.member import Member
from tpool.messages import Event
from tpool.task import WorkerId

__all__ = ["Poller", "Ready", "Source"]

LOOK_SECONDS = 0.0005
"""While workers go through tasks of microseconds, their outboxes are looked into so often. Longer: more results at a
time, which is cheaper, but a stream's consumer waits longer for the first. A worker that runs out of tasks says so.
``epoll`` waits for whole milliseconds, so it is every 1.1 ms in truth; 0.2 and 0.1 ms gained nothing."""

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

    def forget(self, member: Member) -> None:
        """Wait neither for this member's channel nor for its outbox."""
        self.unwatch(member.channel.fileno())
        self.ahead.pop(member.id, None)

    def watches(self, fd: int) -> bool:
        """Whether it is waited for."""
        return fd in self._sources

    def flush(self, member: Member) -> None:
        """Write to a member what the socket takes; it is waited for where that is not all."""
        try:
            done = member.channel.flush()
        except OSError:
            return  # the worker is gone; its exit is on the way
        fd = member.channel.fileno()
        if done is member.watching_write and fd in self._sources:
            member.watching_write = not done
            self._epoll.modify(fd, select.EPOLLIN if done else select.EPOLLIN | select.EPOLLOUT)

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

    def take_outboxes(self, events: list[Event], give_up: Callable[[Member, ProtocolError], None]) -> None:
        """Add what workers that were sent ahead left in their outboxes.

        Args:
            events: is added to.
            give_up: called for one that left something that cannot be.
        """
        for member in list(self.ahead.values()):
            try:
                member.take_outbox(events)
            except ProtocolError as error:
                give_up(member, error)
            if not member.held:
                self.ahead.pop(member.id, None)

    def close(self) -> None:
        """Wait for nothing any more."""
        self._epoll.close()
        self._sources.clear()
