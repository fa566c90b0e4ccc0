"""Workers lent to callers: an ``apply`` that need not pass through the handler's thread, twice.

To hand a call to the handler's thread and its result back costs two switches of threads, more than all the rest of a
short call. So the handler lends idle workers, and a caller who finds one talks to it directly::

    handler ── lend ──► free ── borrow ──► caller: send, wait, read ── give_back ──► free
       ▲                 │                    │
       └── take back ◄───┘                    └── hand_over: it is not a plain result, or the worker is gone, or the
       └── handed_over ◄───────────────────────── caller was interrupted; the handler brings the call to its end

Who holds a loan owns its worker's channel and claims: nobody else reads or writes there.

Ctrl-C. A signal handler may raise in the main thread after any call (of a function, in C too), and what that call
returned is lost then. So a loan knows its stage. While it waits an interruption is harmless; while it sends or reads,
the worker is killed, for nobody knows what it was told or has said. A loan that was lost on its way from one hand to
the other comes back by the finalizer of ``Borrowed``.
"""

from __future__ import annotations

import enum
import os
from collections import deque
from collections.abc import Callable

from tpool.engine import Result, WorkerLoss
from tpool.local.channel import Frame
from tpool.local.member import Member
from tpool.local.patience import Patience
from tpool.task import JobId
from tpool.tensors.payload import Payload
from tpool.waiting import Flag

__all__ = ["Borrowed", "Loan", "Loans", "Stage"]

Answer = Result | WorkerLoss | None
"""What became of a call; None: the worker never started it."""


class Stage(enum.Enum):
    """Where a loan is."""

    FREE = enum.auto()  # among the free ones, for anybody to borrow
    HELD = enum.auto()  # borrowed, nothing was sent yet
    SENDING = enum.auto()
    WAITING = enum.auto()
    READING = enum.auto()
    HANDED_OVER = enum.auto()  # to the handler


class Loan:
    """The right to talk to one worker. Made by the handler's thread; used by one thread at a time.

    Attributes:
        member: the worker.
        stage: see there; written by whoever holds the loan.
        ended: it is worth nothing any more: it was taken back, or its worker is gone. Written by the handler.
        orphaned: the worker went while a caller held the loan, who must close the member.
        unused: it was handed over only because it is needed back.
        job: names the latest call.
        frames: read by the caller and handed over with the loan.
        answer: what the handler found to be the answer, once it has ``told``.
    """

    def __init__(self, member: Member, loans: Loans) -> None:
        self.member = member
        self.stage = Stage.HELD
        self.ended = False
        self.orphaned = False
        self.unused = False
        self.job = JobId(0)
        self.frames: list[Frame] = []
        self.answer: Answer = None
        self._told: Flag | None = None
        self._abandoned = False
        self._loans = loans
        self._patience = Patience(member.channel.fileno())

    # The borrower ---------------------------------------------------------------------------------------------------

    def call(self, job: JobId, payload: Payload | bytes, borrowed: Borrowed) -> Answer:
        """Make a call and wait for its answer; the loan is given back, or handed over."""
        try:
            return self._call(job, payload, borrowed)
        except BaseException:
            self.abandon(borrowed)
            raise

    def _call(self, job: JobId, payload: Payload | bytes, borrowed: Borrowed) -> Answer:
        member = self.member
        self.job = job
        frames: list[Frame] = []
        self.stage = Stage.SENDING
        try:
            member.put_call(job, payload)
            while not frames:
                self.stage = Stage.WAITING
                self._patience.wait()
                self.stage = Stage.READING
                frames = member.channel.receive()
        except (EOFError, OSError):
            frames = []  # the worker is gone or on its way; the handler finds out how
        answer: Answer = member.plain_answer(frames) if frames else None
        if answer is not None:
            self._loans.give_back(borrowed)
            return answer
        self.frames = frames
        self._told = Flag()
        self._loans.hand_over(self)
        if not self.ended:
            self._told.wait()
        self.close_if_orphaned()
        return self.answer

    def abandon(self, borrowed: Borrowed) -> None:
        """The borrower was interrupted; the answer is nobody's."""
        if self.stage is Stage.HELD:
            self._loans.give_back(borrowed)
            return
        self._abandoned = self.stage is not Stage.FREE
        if self.stage in (Stage.SENDING, Stage.READING):
            self.member.give_up("was killed, as its caller was interrupted in the middle of a message")
        if self.stage not in (Stage.FREE, Stage.HANDED_OVER):
            self._loans.hand_over(self)

    def close_if_orphaned(self) -> None:
        """Close what the handler left to the borrower; once."""
        if self.orphaned:
            self.orphaned = False
            self.member.close()

    @property
    def is_foreign(self) -> bool:
        """Whether it belongs to the process that forked this one."""
        return os.getpid() != self._loans.pid

    # The handler ----------------------------------------------------------------------------------------------------

    def settle(self, answer: Answer) -> None:
        """Tell the borrower the answer; the loan ends."""
        if self._abandoned and answer is not None and not isinstance(answer, WorkerLoss):
            answer.discard()
        self.answer = None if self._abandoned else answer
        self.ended = True  # before looking: a borrower sets _told before it looks at this
        if self._told is not None:
            self._told.set()


class Borrowed:
    """A loan in somebody's hand, or free to be taken. Where it is lost, the loan comes back."""

    __slots__ = ("loan",)

    def __init__(self, loan: Loan) -> None:
        self.loan = loan

    def __del__(self) -> None:
        loan = self.loan
        if loan.ended:
            loan.close_if_orphaned()
        elif loan.stage is not Stage.HANDED_OVER and not loan.is_foreign:
            # Interrupted between two hands, or by two signals at once.
            loan.stage = Stage.HELD if loan.stage is Stage.FREE else loan.stage
            loan.abandon(Borrowed(loan))


class Loans:
    """The loans of one pool that are free, and those that were handed over.

    Any thread may call; each change of shared data is one step. ``pressing`` is written by the handler before it looks
    for free loans, and read by borrowers after they have made theirs free: one of the two always notices.

    Args:
        wake: has the handler look.

    Attributes:
        pressing: the handler wants all workers back.
        wanted: somebody would have borrowed one.
        handed_over: for the handler.
        pid: the process that they belong to.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.pressing = False
        self.wanted = False
        self.handed_over: deque[Loan] = deque()
        self.pid = os.getpid()
        self._wake = wake
        # A dict, since an assignment into it, unlike a call, cannot be interrupted before the next statement.
        self._free: dict[int, Borrowed] = {}

    def borrow(self) -> Borrowed | None:
        """A free loan, now the caller's; None if there is none."""
        while self._free:
            try:
                _, borrowed = self._free.popitem()
                borrowed.loan.stage = Stage.HELD
            except KeyError:  # somebody was faster
                break
            if not borrowed.loan.ended:
                return borrowed
        self.wanted = True
        return None

    def give_back(self, borrowed: Borrowed) -> None:
        """The loan is free for anybody to borrow, or for the handler to take back."""
        loan = borrowed.loan
        key = id(loan)
        self._free[key] = borrowed
        loan.stage = Stage.FREE
        if (self.pressing or loan.ended) and self.take(loan) is borrowed:
            if loan.ended:
                loan.close_if_orphaned()
            else:
                loan.unused = True
                self.hand_over(loan)

    def take(self, loan: Loan) -> Borrowed | None:
        """Take this loan if it is free."""
        return self._free.pop(id(loan), None)

    def take_any(self) -> Borrowed | None:
        """Take a free loan."""
        try:
            return self._free.popitem()[1]
        except KeyError:
            return None

    def hand_over(self, loan: Loan) -> None:
        """The handler is to bring the loan to its end."""
        loan.stage = Stage.HANDED_OVER
        self.handed_over.append(loan)
        self._wake()

    def close(self) -> None:
        """The pool has ended."""
        while self._free:
            _, borrowed = self._free.popitem()
            borrowed.loan.ended = True
