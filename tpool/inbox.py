"""What callers and feeders tell the handler, in order, and how it is woken for that."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic

from tpool.basket import Basket
from tpool.messages import Event
from tpool.task import Task

__all__ = ["Inbox", "Item"]

# A feeder of microsecond tasks would wake the handler for each one, which costs more than the task; so it lets them
# gather, this many, or for this long. Longer would be felt by a stream whose input is slower than its tasks. (As the
# time that ``epoll`` is to wait it becomes a whole millisecond.)
NAP_TASKS = 64
NAP_SECONDS = 0.0005

Item = Event | Task | Basket


class Inbox(deque[Item]):
    """The queue itself: read by the handler, written by any thread, in single atomic steps.

    ``_asleep`` is written by the handler and read by the others, who append before they look, while the handler sets
    it before it looks at the queue: one of the two always notices. ``_napping`` is written before it and read after.

    Args:
        wake: ends the handler's sleep.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self._wake = wake
        self._asleep = False
        self._napping = False  # something was put in "soon", so the handler sleeps for a moment only
        self._nap_until = 0.0

    def put(self, item: Item) -> None:
        """Add something; takes no lock: finalizers call it."""
        self.append(item)
        if self._asleep:
            self._wake()

    def put_soon(self, item: Task | Basket) -> None:
        """Add what belongs to tasks of microseconds: it is taken up with all that comes in ``NAP_SECONDS``."""
        self.append(item)
        self._nap_until = monotonic() + NAP_SECONDS
        if not self._napping or len(self) >= NAP_TASKS:
            self.hurry()

    def announce(self, basket: Basket, hurry: bool) -> None:
        """Have a basket taken up, soon or now; see there."""
        if hurry:
            self.hurry()
        else:
            self.put_soon(basket)

    def hurry(self) -> None:
        """End the handler's sleep; by a thread that no signal interrupts."""
        if self._asleep:
            self._asleep = False  # one wake-up will do; never in put: an interrupt between these two would lose it
            self._wake()

    def fall_asleep(self) -> float | None:
        """The handler is about to sleep; returns for how many seconds at most, None for any time."""
        self._napping = monotonic() < self._nap_until
        self._asleep = True
        if self:
            return 0.0
        return NAP_SECONDS if self._napping else None

    def wake_up(self) -> None:
        """The handler looks by itself again."""
        self._asleep = False
