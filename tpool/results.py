"""What callers hold: the result of one call, or of a map. Streams have a module of their own.

    handler ─► resolve, abandon ─► sink ─► get() in the caller's thread
                                     └───► callback thread, where callbacks were given

A *sink* takes a job's outcomes from the handler's thread and must never run user code there: results are kept as they
came and decoded by whoever waits, or by the callback thread.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

from tpool.engine import Result

T = TypeVar("T")

logger = logging.getLogger("tpool")


class Failure:
    """An exception of our own, or of a failed start, in the place of a worker's result."""

    __slots__ = ("_error",)
    failed = True
    seconds = 0.0

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

    def prepare(self) -> None:
        """Start the thread; called by whoever submits a call that has callbacks."""
        with self._lock:
            if self._thread is None and not self._ended:
                self._thread = threading.Thread(target=self._run, name=f"{self._name}-callbacks", daemon=True)
                self._thread.start()

    def post(self, call: Callable[[], None]) -> None:
        """Have the thread make this call; from any thread, never blocks."""
        self._queue.put(call)

    def end(self) -> None:
        """No more calls will be posted."""
        with self._lock:
            self._ended = True
        self._queue.put(None)

    def join(self, timeout: float | None) -> bool:
        """Wait until all posted calls were made; returns whether they were."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except BaseException:  # this thread serves the pool's other callbacks too
                logger.exception("a callback of %s raised", self._name)
            del call  # it holds the result


def decode(result: Result) -> tuple[bool, Any]:
    """(succeeded, value or exception) of a result, decoded now."""
    try:
        value = result.take()
    except BaseException as error:  # unpickling runs user code; its failure is this task's outcome
        return False, error
    return not result.failed, value


class AsyncResult(Generic[T]):
    """The result of ``apply_async``: one call, running somewhere.

    All methods may be called from any thread.
    """

    def __init__(
        self,
        keep: object,
        story: str,
        callbacks: Callbacks,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> None:
        # The pool, so that it is not collected while a result is due.
        self._keep: object = keep
        self.story = story
        self._callbacks = callbacks
        self._callback = callback
        self._error_callback = error_callback
        self._event = threading.Event()
        # Written once by whoever completes; guarded by the lock: two threads may get() at once.
        self._lock = threading.Lock()
        self._complete = False
        self._failed = False
        self._decoded: tuple[bool, Any] | None = None
        self._result: Result | None = None
        if callback is not None or error_callback is not None:
            callbacks.prepare()

    # The caller's side ----------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the call has finished."""
        return self._event.is_set()

    def successful(self) -> bool:
        """Whether the call finished without raising.

        Raises:
            ValueError: it has not finished.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return not self._failed

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the call has finished, or ``timeout`` seconds have passed."""
        self._event.wait(timeout)

    def get(self, timeout: float | None = None) -> T:
        """The value that the call returned; decoded in the first thread that asks.

        Args:
            timeout: seconds to wait; None waits for as long as it takes.

        Raises:
            multiprocessing.TimeoutError: it has not finished in time.
            Exception: what the call raised, with the remote traceback as its cause; ``WorkerLostError`` if its worker
                died; ``PoolTerminatedError`` if the pool was terminated first.
        """
        if not self._event.wait(timeout):
            raise multiprocessing.TimeoutError
        succeeded, value = self._decode()
        if not succeeded:
            raise value
        result: T = value
        return result

    def _decode(self) -> tuple[bool, Any]:
        with self._lock:
            if self._decoded is None:
                self._decoded = self._decode_once()
                if not self._decoded[0]:
                    self._failed = True
            return self._decoded

    def _decode_once(self) -> tuple[bool, Any]:
        assert self._result is not None
        result, self._result = self._result, None
        return decode(result)

    # The handler's side ---------------------------------------------------------------------------------------------

    def resolve(self, index: int, result: Result) -> None:
        """See Sink."""
        with self._lock:
            if self._complete:
                return
            self._complete = True
            self._result = result
            self._failed = result.failed
        self._announce()

    def finish(self) -> None:
        """See Sink."""

    def has_consumable(self) -> bool:
        """See Sink: these hold what they have until it is all there."""
        return False

    def awaits_earlier(self) -> bool:
        """See Sink."""
        return False

    def lift_back_pressure(self) -> None:
        """See Sink: there is none."""

    def abandon(self, failure: Failure | SharedFailure) -> None:
        """See Sink."""
        self.resolve(0, failure)

    def _announce(self) -> None:
        """Callbacks come before ``get`` returns, as in the standard library."""
        if self._callback is None and self._error_callback is None:
            self._done()
        else:
            self._callbacks.post(self._run_callback)

    def _done(self) -> None:
        self._keep = None
        self._event.set()

    def _run_callback(self) -> None:
        try:
            succeeded, value = self._decode()
            callback = self._callback if succeeded else self._error_callback
            if callback is not None:
                callback(value)
        finally:
            self._callback = self._error_callback = None
            self._done()


class MapResult(AsyncResult[list[T]]):
    """The result of ``map_async`` and ``starmap_async``: a list, in the order of the input.

    The first failure to arrive is raised, once every chunk has its outcome.
    """

    def __init__(self, *args: Any, **kwds: Any) -> None:
        super().__init__(*args, **kwds)
        # By chunk; guarded by the lock, since a chunk that cannot be pickled is failed by the caller's thread.
        self._chunks: dict[int, Result] = {}
        self._first_failure: Result | None = None
        self._expected: int | None = None

    def expect(self, chunks: int) -> None:
        """Say how many chunks there are; called once, by the caller's thread, when all are submitted."""
        with self._lock:
            self._expected = chunks
        self._complete_if_full()

    def resolve(self, index: int, result: Result) -> None:
        """See Sink."""
        with self._lock:
            if self._complete or index in self._chunks:
                return
            self._chunks[index] = result
            if result.failed and self._first_failure is None:
                self._first_failure = result
        self._complete_if_full()

    def _complete_if_full(self) -> None:
        with self._lock:
            if self._complete or self._expected is None or len(self._chunks) < self._expected:
                return
            self._complete = True
            self._failed = self._first_failure is not None
        self._announce()

    def abandon(self, failure: Failure | SharedFailure) -> None:
        """See Sink."""
        with self._lock:
            if self._complete:
                return
            self._complete = True
            self._failed = True
            self._first_failure = self._first_failure or failure
        self._announce()

    def _decode_once(self) -> tuple[bool, Any]:
        chunks, self._chunks = self._chunks, {}
        failure = self._first_failure
        if failure is not None:
            for result in chunks.values():
                if result is not failure:
                    result.discard()
            return decode(failure)
        values: list[Any] = []
        for index in range(len(chunks)):
            succeeded, value = decode(chunks.pop(index))
            if not succeeded:
                for result in chunks.values():
                    result.discard()
                return False, value
            values += value
        return True, values
