"""How a worker goes through a span: items of microsecond tasks, which travel together.

    span ─► claim, call, value into the outbox ─► claim, call, value ─► … one for each item

All that is done for any other task is done for an item too, in a loop of its own at a fraction of the cost. What is
not a plain value (see ``Outbox.put_value``), and every error, is answered as any other task is.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from time import monotonic
from typing import Any

from tpool.local import wire
from tpool.local.forkmark import ForkMark
from tpool.local.replies import Replies

__all__ = ["Span", "SpanWork"]


class Span:
    """What is left of a span of items.

    Args:
        body: of the frame that brought it.

    Attributes:
        left: how many items.
    """

    __slots__ = ("_at", "_body", "_items", "_shift", "job", "left")

    def __init__(self, body: bytes) -> None:
        self.job, index, self._at, self.left = wire.unpack_head(wire.SPAN, body)
        self._shift = index - self._at
        self._body = body
        self._items: tuple[Any, ...] = ()

    def next(self) -> tuple[int, Any]:
        """The index of the next item, and the item."""
        if not self._items:
            self._items = pickle.loads(memoryview(self._body)[wire.SPAN.size :])
        at = self._at
        self._at = at + 1
        self.left -= 1
        return at + self._shift, self._items[at]


class SpanWork:
    """Goes through spans, in the worker's main thread.

    Args:
        claims_fd: the semaphore of claims.
        replies: takes the values.
        settle: called for what is not a plain value: with job, index, when the task was started, a list that the value
            is to be taken from, and the error, if there is one instead.
        finish_span: called when the last item of a span was begun.
        singly: whether to come back after each item, so that something else can be looked at.
    """

    def __init__(
        self,
        claims_fd: int,
        replies: Replies,
        settle: Callable[[int, int, float, list[Any], BaseException | None], None],
        finish_span: Callable[[], bool],
        singly: bool,
    ) -> None:
        self._claims_fd = claims_fd
        self._leave = replies.leave_value
        self._settle = settle
        self._finish_span = finish_span
        self._singly = singly
        self._mark = ForkMark().page

    def go_through(self, span: Span, function_of: Callable[[], Any]) -> bool:
        """Run the items of a span, each with a claim of its own.

        Args:
            span: which.
            function_of: gives what is called on them, or raises what each of them then fails with.

        Returns:
            False if there was no claim: the parent has taken back what is left.
        """
        job, next_item, claims_fd, leave = span.job, span.next, self._claims_fd, self._leave
        function, mark, more = None, self._mark, True
        while more:
            try:
                os.eventfd_read(claims_fd)
            except BlockingIOError:
                return False
            index, item = next_item()
            more = span.left > 0
            # A result that nothing comes after goes by socket, and wakes the parent.
            last = not more and not self._finish_span()
            started = monotonic()
            try:
                if function is None:
                    function = function_of()
                value = function(item)
            except BaseException as error:
                self._settle(job, index, started, [], error)
            else:
                if not mark[0]:
                    os._exit(1)  # the task forked and its child returned here; the reply is its parent's to give
                if last or not leave(job, index, monotonic() - started, value):
                    holder = [value]
                    value = None  # what is large must be gone before the answer
                    self._settle(job, index, started, holder, None)
            if self._singly:
                break
        return True
