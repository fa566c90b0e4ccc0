"""Where outcomes go: sinks, failures of our own, and the thread that runs callbacks.

    handler ─► resolve, drop, abandon ─► sink ─► get() in the caller's thread
                                           └───► callback thread, where callbacks were given

A *sink* takes a job's outcomes from the handler's thread and must never run user code there: results are kept as they
came and decoded by whoever waits, or by the callback thread. The sinks that callers hold are in ``futures.py`` and
``streams.py``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from tpool.engine import Result
from tpool.tensors.leases import table
from tpool.values import Values

logger = logging.getLogger("tpool")


Results = list[Result] | Values
"""Of tasks of one job that stand behind each other."""


def check_may_wait(server: threading.Thread | None, story: str) -> None:
    """Refuse to wait without a limit where that would be for ever; a wait with a limit ends by itself.

    A finalizer that makes a call and waits for it runs in whatever thread the garbage collector comes by, a signal
    handler wherever the main thread is. In the thread by which the result comes it would wait for itself; and where it
    interrupts the bookkeeping of shared memory, for who wants that.

    Args:
        server: the thread by which the result comes; None if it is not known yet.
        story: what is waited for.

    Raises:
        RuntimeError: it is this one, or this one is in the midst of that bookkeeping.
    """
    here = "in the thread that brings its result" if server is threading.current_thread() else ""
    if not here and table().busy_here:
        here = "in the midst of the bookkeeping of shared memory"
    if here:
        raise RuntimeError(
            f"cannot wait for {story} {here}, where a finalizer was run by the garbage collector, perhaps, or a"
            " signal handler; make the call without waiting for it, give a timeout, or wait in another thread"
        )


class Failure:
    """An exception of our own, or of a failed start, in the place of a worker's result."""

    __slots__ = ("_error",)
    failed = True
    seconds = 0.0
    nbytes = 0

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def take(self) -> BaseException:
        """See Result; may be called by each of the tasks that failed for this reason."""
        return self._error

    def discard(self) -> None:
        """See Result."""


class SharedFailure:
    """One exception from a worker that is the outcome of many tasks: decoded once, for all of them."""

    __slots__ = ("_error", "_lock", "_result")
    failed = True
    seconds = 0.0
    nbytes = 0

    def __init__(self, result: Result) -> None:
        self._result = result
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def take(self) -> BaseException:
        """See Result."""
        with self._lock:
            if self._error is None:
                try:
                    self._error = self._result.take()
                except BaseException as error:
                    self._error = error
            assert self._error is not None
            return self._error

    def discard(self) -> None:
        """See Result."""


class Sink(Protocol):
    """Takes a job's outcomes; all methods are called by the handler's thread and return at once."""

    story: str

    def resolve(self, index: int, result: Result) -> None:
        """The task of this index has this outcome."""

    def resolve_run(self, index: int, results: Results) -> None:
        """The tasks from this index on have these outcomes."""

    def drop(self, index: int) -> None:
        """The task of this index was cancelled before it had an outcome, and will have none."""

    def finish(self) -> None:
        """Every task has its outcome."""

    def has_consumable(self) -> bool:
        """Whether it holds a result that its consumer can take one by one, and so give its memory back."""

    def awaits_earlier(self) -> bool:
        """Whether it holds results that its consumer can take only after one that has not come."""

    def lift_back_pressure(self) -> None:
        """Take results as they come, consumed or not."""

    def abandon(self, failure: Failure | SharedFailure) -> None:
        """The pool has ended: whatever has no outcome yet has this one. May come from any thread, and twice."""


class Callbacks:
    """The thread that runs callbacks, started with the first of them.

    A callback may be slow or raise; it then delays other callbacks, as in the standard library, but nothing else.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._ended = False
        # Whoever called prepare may be interrupted before the thread has begun: that one may never run.
        self._started = False
        # Nobody waits for calls any more. Set before a last look at the queue, read after adding to it: whatever is
        # added is seen by one of the two.
        self._gone = False

    def prepare(self) -> None:
        """Start the thread; called by whoever submits a call that has callbacks."""
        with self._lock:
            if not (self._ended or self._started):
                self._thread = threading.Thread(target=self._run, name=f"{self._name}-callbacks", daemon=True)
                self._thread.start()
                self._started = True

    def post(self, call: Callable[[], None]) -> None:
        """Have the thread make this call; from any thread, never blocks on another.

        After the end, when that thread is gone, the call is made here: a result that comes so late comes from a caller
        who was too late for the pool.
        """
        self._queue.put(call)
        if self._gone:
            self._drain()

    def end(self) -> None:
        """The thread ends when it has made the calls that were posted before."""
        with self._lock:
            self._ended = True
            self._gone = not self._started
        self._queue.put(None)

    def is_current(self) -> bool:
        """Whether this is the thread that runs callbacks."""
        return threading.current_thread() is self._thread

    def join(self, timeout: float | None) -> bool:
        """Wait until all posted calls were made; returns whether they were."""
        thread = self._thread
        if thread is None or not self._started or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _run(self) -> None:
        with self._lock:
            if not self.is_current():  # it was taken for one that would never begin
                return
            self._started = True
        while (call := self._queue.get()) is not None:
            self._make(call)
            del call  # it holds the result
        self._gone = True
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                call = self._queue.get_nowait()
                if call is not None:
                    self._make(call)

    def _make(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException:  # this thread serves the pool's other callbacks too
            logger.exception("a callback of %s raised", self._name)


def decode(result: Result) -> tuple[bool, Any]:
    """(succeeded, value or exception) of a result, decoded now."""
    try:
        value = result.take()
    except BaseException as error:  # unpickling runs user code; its failure is this task's outcome
        return False, error
    return not result.failed, value


def finish(result: Result) -> Any:
    """The value of a result, decoded now.

    Raises:
        BaseException: what it holds instead.
    """
    succeeded, value = decode(result)
    if not succeeded:
        raise value
    return value
