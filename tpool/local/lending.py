"""The handler's side of lending workers to callers; see ``loans.py``."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from tpool.engine import WorkerLoss
from tpool.local.channel import Frame
from tpool.local.loans import Borrowed, Loan, Loans, Stage
from tpool.local.member import Member
from tpool.local.poller import Poller
from tpool.messages import Event, LoanWanted, TasksFinished, WorkerReturned
from tpool.task import JobId, WorkerId

__all__ = ["Lending"]

_CALLING = {Stage.SENDING, Stage.WAITING, Stage.READING, Stage.HANDED_OVER}

CALM_SECONDS = 0.005
"""Nothing is lent for so long after workers were needed back. Longer: after a map it takes longer until an apply is
fast again. Shorter: callers who compete for workers have them lent and taken back for each call, which costs more than
the way through the handler."""


class Lending:
    """Who is lent, and what became of it. Belongs to the handler's thread.

    A lent worker's channel is not watched; its process is.

    Args:
        poller: watches channels.
        wake: has the handler look.
        watch: watches a member's channel again.
        understand: turns a member's frames into events.
        flush: writes to a member what waits to be written.

    Attributes:
        loans: the callers' side.
    """

    def __init__(
        self,
        poller: Poller,
        wake: Callable[[], None],
        watch: Callable[[Member], None],
        understand: Callable[[Member, list[Frame], list[Event]], bool],
        flush: Callable[[Member], None],
    ) -> None:
        self.loans = Loans(wake)
        self._poller = poller
        self._watch = watch
        self._understand = understand
        self._flush = flush
        self._lent: dict[WorkerId, Loan] = {}
        self._due: dict[WorkerId, Loan] = {}  # handed over; their answers are on the way
        self._pressed_at = 0.0

    def job_of(self, worker: WorkerId) -> JobId | None:
        """The call that a borrower makes in this worker now. Any thread may ask; it may be over a moment later."""
        loan = self._lent.get(worker)
        return loan.job if loan is not None and loan.stage in _CALLING else None

    def lend(self, member: Member) -> None:
        """Let callers talk to this worker."""
        self._poller.unwatch(member.channel.fileno())
        member.lent = True
        loan = self._lent[member.id] = Loan(member, self.loans)
        self.loans.give_back(Borrowed(loan))

    def before_waiting(self, pressing: bool, can_lend: bool) -> list[Event]:
        """What there is to say before the handler sleeps.

        Args:
            pressing: all workers are needed back.
            can_lend: some worker is idle.
        """
        loans = self.loans
        events: list[Event] = []
        loans.pressing = pressing  # first; see Loans
        if pressing:
            self._pressed_at = monotonic()
            while (borrowed := loans.take_any()) is not None:
                self._take_back(borrowed.loan, events)
        elif loans.wanted and can_lend and monotonic() > self._pressed_at + CALM_SECONDS:
            loans.wanted = False
            events.append(LoanWanted())
        return events

    def _take_back(self, loan: Loan, events: list[Event]) -> None:
        if loan.ended:
            loan.close_if_orphaned()
            return
        self._end(loan)
        self._watch(loan.member)
        events.append(WorkerReturned(loan.member.id))

    def _end(self, loan: Loan) -> None:
        loan.ended = True
        loan.member.lent = False
        del self._lent[loan.member.id]

    def take_handed_over(self, events: list[Event]) -> None:
        """Bring to an end what borrowers could not."""
        handed_over = self.loans.handed_over
        while handed_over:
            loan = handed_over.popleft()
            member = loan.member
            if loan.ended or loan.unused:
                self._take_back(loan, events)
                continue
            member.lent = False
            self._due[member.id] = loan
            self._watch(member)
            self._flush(member)
            frames, loan.frames = loan.frames, []
            self._understand(member, frames, events)
        if self._due:
            self._settle(events)

    def _settle(self, events: list[Event]) -> None:
        """Answers that came for borrowers are not the scheduler's: it is told that the worker is back."""
        for index, event in enumerate(events):
            if not isinstance(event, TasksFinished):
                continue
            loan = self._due.get(event.worker)
            if loan is not None:
                del self._due[event.worker]
                loan.settle(event.results[0][2])
                self._end(loan)
                events[index] = WorkerReturned(event.worker)

    def settle(self, events: list[Event]) -> None:
        """Tell borrowers the answers among these events."""
        if self._due:
            self._settle(events)

    def in_use(self, member: Member) -> bool:
        """Whether a borrower may be using this member's channel now; if not, nobody will from now on."""
        loan = self._lent.get(member.id)
        if loan is None or member.id in self._due:
            return False
        free = self.loans.take(loan)
        if free is None:
            return True
        loan.ended = True  # it was free; before ``free`` goes
        return False

    def bury(self, member: Member, unstarted: int, loss: WorkerLoss, in_use: bool) -> bool:
        """The worker is gone; returns whether it was lent."""
        loan = self._lent.get(member.id)
        if loan is None:
            return False
        self._due.pop(member.id, None)
        loan.orphaned = in_use  # first, as the answer: who sees that the loan has ended looks at these
        loan.settle(None if unstarted else loss)
        self._end(loan)
        return True

    def touch(self, member: Member, action: Callable[[], None]) -> None:
        """Do something with a lent member's channel, if nobody has borrowed it."""
        loan = self._lent.get(member.id)
        borrowed = None if loan is None else self.loans.take(loan)
        if borrowed is not None:
            action()
            self.loans.give_back(borrowed)
