"""Streams of results: the state of one ``imap``, and the iterator that its caller holds.

handler ─► resolve ─► Stream ─► take ─► IMapIterator.next in the caller's thread
feeder  ◄─ room ◄──────┘ (as results are consumed)
"""

from __future__ import annotations

import multiprocessing
import threading
from collections import deque
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from tpool.engine import Result
from tpool.loops import Bell
from tpool.results import Failure, Results, SharedFailure, check_may_wait
from tpool.values import PLAIN, ValueResult, Values
from tpool.waiting import Monitor

T = TypeVar("T")


class Stream:
    """The state of one ``imap``: outcomes as they come, and how far the consumer is.

    The handler and the feeder hold this, never the iterator, so that an iterator nobody wants is collected.

    Shared data: producers (the handler, and the feeder for items that cannot be sent) put what comes next into
    ``ready``, in order, under a lock that no consumer takes; a consumer takes it out in one atomic step, so that
    whoever is interrupted loses one result at most. ``_produced`` counts what was put there, afterwards. ``_news`` is
    for waiting: a consumer notes that before it looks again, a producer adds before it looks who waits.

    Args:
        story: what it is, for messages.
        ordered: whether outcomes are taken in the order of the input.
        weigh: whether to learn how large results are, for a budget in bytes.
    """

    def __init__(self, story: str, ordered: bool, weigh: bool = False) -> None:
        self.story = story
        self.server: threading.Thread | None = None  # brings the outcomes; set before anybody has the iterator
        self.result_nbytes: float | None = None if weigh else 0.0  # the mean of a result; None before the first
        self._weigh = weigh
        self._weighed = 0
        self.seconds = 0.0  # of the latest result: how long its task ran
        self.latest_nbytes = 0  # likewise: how large it is
        self.cancelled = False
        self.unbounded = False  # nobody may ever consume, and somebody waits for the end
        # Wakes the feeder; SimpleQueue.put may be called from a finalizer.
        self.room: SimpleQueue[None] = SimpleQueue()
        self.feeder_waits_below = -1
        self._ordered = ordered
        self.ready: deque[Any] = (
            deque()
        )  # Results and, as they are, values of PLAIN types; who takes one calls ``count``
        self._produced = 0
        self._producing = threading.Lock()
        self._early: dict[int, list[Any]] = {}  # of an ordered stream: by index, what comes after something else
        self._next = 0  # likewise: the index of what comes next
        self._length: int | None = None
        self._over = False  # its end was told
        self._end: Failure | SharedFailure | None = None
        self._news = Monitor()
        self._waiting: dict[object, None] = {}  # a token for each consumer; no call, so no interrupt, to add one
        self._bells: list[Bell] = []  # of consumers that are coroutines
        self._told = False  # they were woken and have not looked yet; one wake-up serves many results

    # The consumer's side --------------------------------------------------------------------------------------------

    def take(self, timeout: float | None) -> Result:
        """The next outcome.

        Raises:
            StopIteration: there are no more.
            multiprocessing.TimeoutError: none came in time.
            RuntimeError: without a timeout, in the thread that brings the outcomes.
        """
        result = self._pop() or self._last()
        if result is None:
            result = self._wait(timeout)
        self.count()
        return result

    async def take_in_loop(self) -> Result:
        """As ``take``, in a coroutine; if the waiting is cancelled nothing is taken.

        Raises:
            StopAsyncIteration: there are no more.
        """
        result = self._pop()
        while result is None:
            bell = Bell()
            with self._news:
                self._bells.append(bell)
                self._waiting[bell] = None
                self._told = False  # before looking, as in _wait
            try:
                result = self._pop() or self._last()
                if result is None:
                    await bell
                    result = self._pop()
            except StopIteration:
                raise StopAsyncIteration from None
            finally:
                self._forget_bell(bell)
        self.count()
        return result

    def _forget_bell(self, bell: Bell) -> None:
        with self._news:
            self._waiting.pop(bell, None)
            if bell in self._bells:
                self._bells.remove(bell)

    @property
    def consumed(self) -> int:
        """How many outcomes were taken; from any thread, and never too many."""
        produced = self._produced  # first: it is counted after it was made ready
        return produced - len(self.ready)

    def count(self) -> None:
        """Something was taken: tell whoever waits for that."""
        if self._waiting and self.consumed == self._length:
            self._notify()  # another consumer may have looked after we took the last and before we said so
        if self.feeder_waits_below >= 0 and self.consumed >= self.feeder_waits_below:
            self.feeder_waits_below = -1
            self.room.put(None)

    def _pop(self) -> Result | None:
        try:
            item = self.ready.popleft()
        except IndexError:
            return None
        return ValueResult(item, self.seconds) if type(item) in PLAIN else item

    def _wait(self, timeout: float | None) -> Result:
        if timeout is None:
            check_may_wait(self.server, self.story)
        token = object()
        try:
            self._waiting[token] = None
            result = self._news.wait_for(self._look, timeout)
        finally:
            self._waiting.pop(token, None)
        if result is None:
            raise multiprocessing.TimeoutError
        return result

    def _look(self) -> Result | None:
        self._told = False  # before looking: what arrives after the look is told of again
        return self._pop() or self._last()

    def _last(self) -> Result | None:
        """What is to be said when there is no outcome to take: None that there will be one.

        Raises:
            StopIteration: there are no more.
        """
        if self._over or (self._length is not None and self.consumed >= self._length):
            raise StopIteration
        if self._end is None:
            return None
        self._over = True  # the pool ended: say so once, then the stream is over
        return self._end

    # The producer's side --------------------------------------------------------------------------------------------

    def resolve(self, index: int, result: Result) -> None:
        """See Sink."""
        if self.cancelled:
            result.discard()
            return
        self.seconds = result.seconds or self.seconds
        self.latest_nbytes = nbytes = result.nbytes
        if self._weigh:
            self._weighed += 1
            mean = self.result_nbytes or 0.0
            self.result_nbytes = mean + (nbytes - mean) / self._weighed
        self._make_ready(index, [result])

    def resolve_run(self, index: int, results: Results) -> None:
        """See Sink."""
        if self.cancelled or self._weigh:
            for offset, result in enumerate(results):
                self.resolve(index + offset, result)
            return
        if isinstance(results, Values):
            self.seconds = results.seconds or self.seconds
            self.latest_nbytes = ValueResult.nbytes
            self._make_ready(index, results.values)
        else:
            self.seconds = results[-1].seconds or self.seconds
            self.latest_nbytes = results[-1].nbytes
            self._make_ready(index, results)

    def _make_ready(self, index: int, items: list[Any]) -> None:
        with self._producing:
            if not self._ordered:
                self.ready.extend(items)
                self._produced += len(items)
            else:
                self._early[index] = items
                while (found := self._early.pop(self._next, None)) is not None:
                    self._next += len(found)
                    self.ready.extend(found)
                    self._produced += len(found)
        if self._waiting and not self._told:
            self._notify()

    def set_length(self, length: int) -> None:
        """The input has ended after so many items."""
        self._length = length
        self._notify()

    def drop(self, index: int) -> None:
        """See Sink: whoever cancelled wants no more."""

    def finish(self) -> None:
        """See Sink."""

    def has_consumable(self) -> bool:
        """See Sink."""
        return bool(self.ready)

    def may_take(self) -> bool:
        """Whether the consumer is busy, with results perhaps that it will drop, and not waiting for the next one."""
        return not self._waiting

    def awaits_earlier(self) -> bool:
        """See Sink."""
        return bool(self._early) and not self.ready

    def lift_back_pressure(self) -> None:
        """See Sink."""
        self.unbounded = True
        self.room.put(None)

    def abandon(self, failure: Failure | SharedFailure) -> None:
        """See Sink."""
        self._end = failure
        self.cancel()
        self._notify()

    def cancel(self) -> None:
        """Draw no more input. Takes no lock: finalizers call it."""
        self.cancelled = True
        self.room.put(None)

    def discard(self) -> None:
        """Give back what nobody took."""
        while (result := self._pop()) is not None:
            result.discard()
        while self._early:
            for item in self._early.popitem()[1]:
                if type(item) not in PLAIN:
                    item.discard()

    def _notify(self) -> None:
        self._told = True
        with self._news:
            self._news.notify_all()
            while self._bells:
                self._bells.pop().ring()


class IMapIterator(Generic[T]):
    """The iterator of ``imap`` and ``imap_unordered``, also an asynchronous one; may be shared by threads.

    Input is drawn as results are consumed. Dropping the iterator gives up what was not consumed.
    """

    def __init__(self, stream: Stream, keep: object) -> None:
        self._stream = stream
        self._keep: object = keep  # the pool, so that it is not collected while we are consumed

    def __iter__(self) -> IMapIterator[T]:
        return self

    def __next__(self) -> T:
        stream = self._stream
        try:
            item = stream.ready.popleft()
        except IndexError:
            return self.next()
        stream.count()
        if type(item) in PLAIN:
            value: T = item
            return value
        return self._value(item)

    def next(self, timeout: float | None = None) -> T:
        """The next result.

        Args:
            timeout: seconds to wait for it; None waits for as long as it takes.

        Raises:
            StopIteration: there are no more.
            multiprocessing.TimeoutError: it did not come in time; it is still due.
            Exception: what the task, or the input's iterator, raised. The next call gives the next result.
        """
        try:
            result = self._stream.take(timeout)
        except StopIteration:
            self._keep = None
            raise StopIteration from None
        return self._value(result)

    def __aiter__(self) -> IMapIterator[T]:
        return self

    async def __anext__(self) -> T:
        """The next result, in a coroutine of any running ``asyncio`` loop; decoded in the loop's thread."""
        try:
            result = await self._stream.take_in_loop()
        except StopAsyncIteration:
            self._keep = None
            raise
        return self._value(result)

    @staticmethod
    def _value(result: Result) -> T:
        value = result.take()
        if result.failed:
            raise value
        item: T = value
        return item
