"""Who waits for shared memory, and whether there is hope.

A thread of the caller that encodes, or a worker that answers, waits while memory may come back: from a task that runs,
from a result that its consumer has yet to take. When nothing can, one of those who wait is told, its task fails with
``SharedMemoryExhausted``, and what it held may help the others.

Only where the later results of an ordered stream hold the budget, and the earlier one that would let them go waits for
memory itself, that one goes beyond the budget.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from time import monotonic
from typing import Protocol

from tpool.local.member import Member
from tpool.waiting import Monitor

# How often somebody looks for memory that died without a message while somebody waits for some.
STARVING_SECONDS = 0.01
# Somebody who has waited within this time still does: a little more than the longest wait and the look between two.
RECENT_SECONDS = 0.05
# How long there must be no hope until one of those who wait is told. Give-backs that are on their way take
# milliseconds; a caller that is about to drop a result should be given a moment.
HOPELESS_SECONDS = 0.5
# How long workers may take to look through their garbage: it grows with their objects, and no task waits for it. One
# that takes longer is stopped, or hangs in a thread that a task left.
TRIM_SECONDS = 20
# The same where the hope is only in going beyond the budget: nobody's result is lost by that, so it may come soon.
GRANT_SECONDS = 0.02


class Consumers(Protocol):
    """What the handler knows of those who take results; see ``tpool.engine.Engine``."""

    may_give_back: Callable[[], bool]
    awaits_earlier: Callable[[], bool]


class Hunger:
    """The waiting for memory of one pool.

    ``wait`` and ``set_patience`` belong to the threads that encode, all else to the handler's.

    Args:
        wake: has the handler look.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._news = Monitor()
        self._patience = threading.local()
        # When somebody last waited; who waits does so many times in a row, with a look at the memory between.
        self._impatient_at = self._patient_at = -RECENT_SECONDS
        self._verdict_at = -RECENT_SECONDS  # when it was found that there is no hope; taken by one who waits
        self._asked_at: float | None = None  # when all workers were asked for what they can spare
        self._hopeless_since: float | None = None
        self._server: int | None = None  # the handler's thread, once it has looked

    def set_patience(self, patient: Callable[[], bool] | None) -> None:
        """What tells whether this thread may wait for the consumer of results too; None: it may not."""
        self._patience.value = patient

    def wait(self, seconds: float) -> bool:
        """In a thread that encodes: wait until some memory may have come back; see ``tensors.leases.Memory``.

        Returns:
            False when none can come back; or for this thread, as it is the handler's: here a finalizer encodes.
        """
        if threading.get_ident() == self._server:
            return False
        ask: Callable[[], bool] | None = getattr(self._patience, "value", None)
        patient = ask is not None and ask()
        if patient:
            self._patient_at = monotonic()
        else:
            self._impatient_at = monotonic()
        self._wake()
        # Memory that this process itself drops is only found by looking, hence the short wait.
        self._news.wait(min(seconds, STARVING_SECONDS))
        with self._news:
            if patient or monotonic() > self._verdict_at + RECENT_SECONDS:
                return True
            self._verdict_at = -RECENT_SECONDS
            return False

    def tell_news(self) -> None:
        """Memory may have come back."""
        if self._asked_at is not None or self._waits(self._impatient_at) or self._waits(self._patient_at):
            with self._news:
                self._news.notify_all()

    @staticmethod
    def _waits(at: float) -> bool:
        return monotonic() < at + RECENT_SECONDS

    def check(
        self,
        members: Collection[Member],
        starving: dict[Member, None],
        consumers: Consumers,
        flush: Callable[[Member], None],
        reclaim: Callable[[], None],
    ) -> bool:
        """Before the handler blocks: give up on somebody where there is no hope.

        Args:
            members: the workers. Those that are lent must come back while this returns True.
            starving: those that wait.
            consumers: of results.
            flush: writes to a worker what waits to be written.
            reclaim: finds what interrupts have left behind in this process.

        Returns:
            Whether anybody waits, so that the handler should look again soon.
        """
        self._server = threading.get_ident()
        impatient, patient = self._waits(self._impatient_at), self._waits(self._patient_at)
        if not (starving or impatient or patient):
            self._take_heart()
            return False
        working = any(member.may_finish for member in members)
        consumable = (starving or patient) and consumers.may_give_back()
        if working or (consumable and not impatient):
            self._take_heart()
        elif self._asked_at is None:
            # One that sleeps keeps its free memory until it is asked, and what is in its garbage.
            if not any(member.lent for member in members):
                self._asked_at = monotonic()
                reclaim()
                for member in members:
                    if not member.trimming:
                        member.put_trim()
                        flush(member)
        elif self._hopeless_since is None:
            answered = not any(member.trimming and not member.ended for member in members)
            if answered or monotonic() > self._asked_at + TRIM_SECONDS:
                self._hopeless_since = monotonic()
        else:
            self._decide(monotonic() - self._hopeless_since, next(iter(starving), None), consumers, flush)
        return True

    def _take_heart(self) -> None:
        self._asked_at = self._hopeless_since = None

    def _decide(
        self, seconds: float, starving: Member | None, consumers: Consumers, flush: Callable[[Member], None]
    ) -> None:
        """There has been no hope for so long."""
        if starving and seconds > GRANT_SECONDS and consumers.awaits_earlier():
            starving.put_grant()
            flush(starving)
        elif seconds > HOPELESS_SECONDS:
            if self._waits(self._impatient_at):
                with self._news:
                    self._verdict_at = monotonic()
            elif starving:
                starving.put_hopeless()
                flush(starving)
        else:
            return
        self._take_heart()
