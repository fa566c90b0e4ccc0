"""What callers hold of one call: a result that is also a ``Future`` and awaitable.

    handler ─► resolve, drop, abandon ─► AsyncResult ─┬─► get, result, exception in the caller's thread
                                                      ├─► await in the loop's thread
                                                      └─► callbacks in the callback thread

A result is kept as it came and decoded once, by whoever asks first: user code never runs in the handler's thread.

One object serves ``multiprocessing`` and ``concurrent.futures``: the condition of a Future guards our state, too. What
``concurrent.futures.wait`` and ``as_completed`` look at, ``_condition``, ``_state``, ``_waiters`` and
``_done_callbacks``, is as they expect it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from typing import Any, NoReturn, Protocol, TypeVar

from tpool.engine import Result
from tpool.errors import TaskCancelledError, TpoolError, TransportError
from tpool.loops import Bell
from tpool.results import Callbacks, Failure, Results, SharedFailure, check_may_wait, decode
from tpool.task import JobId
from tpool.waiting import Monitor

T = TypeVar("T")

_DONE = (FINISHED, CANCELLED_AND_NOTIFIED)


class Keeper(Protocol):
    """Whoever runs the call behind a result; a pool."""

    def _cancel_job(self, job: JobId, kill: bool, answer: Callable[[bool], None] | None) -> bool:
        """Cancel a job; ``answer`` is told, from any thread, whether its result was given up.

        Returns:
            Whether the answer may be waited for; else it will come too late for whoever asks.
        """

    def _has_started(self, job: JobId) -> bool:
        """Whether a worker holds a task of this job."""


class AsyncResult(Future[T]):
    """The result of ``apply_async`` or ``submit``: one call, running somewhere.

    A ``multiprocessing.pool.AsyncResult``, a ``concurrent.futures.Future`` and awaitable. All methods may be called
    from any thread.
    """

    # The job of this result, once it was submitted; written by the caller's thread before it has the result.
    _job: JobId | None = None
    # The thread that brings the outcome; likewise.
    _server: threading.Thread | None = None
    # What to call, in the handler's thread, when it is done; ours, for loops that await it. Guarded by the condition.
    _hooks: list[Callable[[], None]] | None = None

    def __init__(
        self,
        keep: Keeper,
        story: str,
        callbacks: Callbacks,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> None:
        # The pool, so that it is not collected while a result is due.
        self._keep: Keeper | None = keep
        self.story = story
        self._callbacks = callbacks
        self._callback = callback
        self._error_callback = error_callback
        self._has_callbacks = callback is not None or error_callback is not None
        # What Future.__init__ would make, less what is not used. The condition guards all but the decoding.
        self._condition = Monitor()  # type: ignore[assignment]
        self._state = PENDING
        self._waiters: list[Any] = []
        self._done_callbacks: list[Callable[[Future[T]], Any]] = []
        self._complete = False  # the outcome is here, if not told yet: callbacks come first
        self._failed = False
        self._outcome: Result | None = None
        # Two threads may ask at once. Not the condition: decoding runs user code, and the handler needs that one.
        self._decoding = threading.Lock()
        self._decoded: tuple[bool, Any] | None = None
        if self._has_callbacks:
            callbacks.prepare()

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else "finished" if self.done() else "pending"
        return f"<tpool.{type(self).__name__} of {self.story}: {state}>"

    def __reduce__(self) -> NoReturn:
        raise TransportError(f"{self!r} cannot leave its process: send the value, as in pool.submit(f, result.get())")

    # As in multiprocessing ------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether the call has finished, or was cancelled."""
        return self._state in _DONE

    def successful(self) -> bool:
        """Whether the call finished without raising.

        Raises:
            ValueError: it has not finished.
        """
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return not self._failed

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the call has finished, or ``timeout`` seconds have passed.

        Raises:
            RuntimeError: without a timeout, in the thread that brings the result (a finalizer may run there).
        """
        self._wait(timeout)

    def get(self, timeout: float | None = None) -> T:
        """The value that the call returned; decoded in the first thread that asks.

        Args:
            timeout: seconds to wait; None waits for as long as it takes.

        Raises:
            multiprocessing.TimeoutError: it has not finished in time.
            TaskCancelledError: it was cancelled; also a ``concurrent.futures.CancelledError``.
            Exception: what the call raised, with the remote traceback as its cause; ``WorkerLostError`` if its worker
                died; ``PoolTerminatedError`` if the pool was terminated first.
        """
        if not self._wait(timeout):
            raise multiprocessing.TimeoutError(self._late(timeout))
        return self._value()

    # As in concurrent.futures ---------------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> T:
        """As ``get``, but raises ``concurrent.futures.TimeoutError``."""
        if not self._wait(timeout):
            raise concurrent.futures.TimeoutError(self._late(timeout))
        return self._value()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call raised, or None if it returned; decoded in the first thread that asks.

        Args:
            timeout: seconds to wait; None waits for as long as it takes.

        Raises:
            concurrent.futures.TimeoutError: it has not finished in time.
            TaskCancelledError: it was cancelled.
        """
        if not self._wait(timeout):
            raise concurrent.futures.TimeoutError(self._late(timeout))
        if self._state == CANCELLED_AND_NOTIFIED:
            self._value()
        if self._condition._is_owned():  # type: ignore[attr-defined]
            # concurrent.futures.wait(return_when=FIRST_EXCEPTION), which holds the conditions of all its futures: were
            # we to decode, the handler would wait for user code. It only asks whether there is an exception.
            return TpoolError("not decoded yet") if self._failed else None
        succeeded, value = self._decode()
        return None if succeeded else value

    def done(self) -> bool:
        """Whether the call has finished, or was cancelled."""
        return self._state in _DONE

    def running(self) -> bool:
        """Whether a worker has (a part of) the call; a moment later that may have changed."""
        keep, job = self._keep, self._job
        return not self._complete and keep is not None and job is not None and keep._has_started(job)

    def cancel(self, *, kill: bool = False) -> bool:
        """Give the call up, if it does not run yet. Of a map, give up the whole if any part of it does not run yet.

        Args:
            kill: give it up also if it runs: its worker is killed and replaced. What else that worker was sent runs
                elsewhere. Without this, parts of a map that run already run to their end, and their values are thrown
                away.

        Returns:
            Whether it is cancelled now; False if it runs (and is not killed) or has finished.
        """
        answers: list[bool] = []

        def answer(cancelled: bool) -> None:
            with self._condition:
                answers.append(cancelled)
                self._condition.notify_all()

        if self._ask_to_cancel(kill, answer):
            self._condition.wait_for(lambda: answers or self.done())
        return self.cancelled()

    def _ask_to_cancel(self, kill: bool, answer: Callable[[bool], None] | None) -> bool:
        keep, job = self._keep, self._job
        return not self.done() and keep is not None and job is not None and keep._cancel_job(job, kill, answer)

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Have ``fn(self)`` called when the call has finished or was cancelled.

        It is called in the pool's callback thread, or here and now if the call has finished already.

        Args:
            fn: what to call; if it raises, that is logged.
        """
        if not self.done():
            self._callbacks.prepare()
        super().add_done_callback(fn)

    # As in asyncio --------------------------------------------------------------------------------------------------

    def __await__(self) -> Generator[Any, None, T]:
        """Wait for the value in a coroutine of any running ``asyncio`` loop; decoded in the loop's thread.

        If the waiting is cancelled, so is the call, as far as ``cancel`` can: it is dropped where it does not run yet.
        """
        if not self.done():
            yield from self._wait_in_loop().__await__()
        if self.cancelled():
            raise asyncio.CancelledError(str(self._decode()[1]))
        return self._value()

    async def _wait_in_loop(self) -> None:
        bell = Bell()
        with self._condition:
            if self.done():
                return
            if self._hooks is None:
                self._hooks = []
            self._hooks.append(bell.ring)
        try:
            await bell
        except asyncio.CancelledError:
            self._ask_to_cancel(False, None)
            raise

    # Waiting and decoding -------------------------------------------------------------------------------------------

    def _wait(self, timeout: float | None) -> bool:
        """Wait until it is done; returns whether it is."""
        if self._state in _DONE:
            return True
        if timeout is None:
            self.check_may_wait()
        # In the callback thread, which runs nothing else meanwhile, our own callbacks would be waited for for ever.
        in_callback = self._has_callbacks and self._callbacks.is_current()
        return self._condition.wait_for(lambda: self._state in _DONE or (in_callback and self._complete), timeout)

    def check_may_wait(self) -> None:
        """Refuse to wait for it here without a limit, if that would be for ever; see ``results.check_may_wait``.

        Raises:
            RuntimeError: it would.
        """
        check_may_wait(self._server, self.story)

    def _late(self, timeout: float | None) -> str:
        return f"{self.story} has not finished within {timeout} s, and goes on: ask again later, or cancel() it"

    def _value(self) -> T:
        succeeded, value = self._decode()
        if not succeeded:
            raise value
        result: T = value
        return result

    def _decode(self) -> tuple[bool, Any]:
        with self._decoding:
            if self._decoded is None:
                self._decoded = self._decode_once()
                if not self._decoded[0]:
                    self._failed = True
            return self._decoded

    def _decode_once(self) -> tuple[bool, Any]:
        result, self._outcome = self._outcome, None
        return self._lost() if result is None else decode(result)

    def _lost(self) -> tuple[bool, Any]:
        """What to say where an interrupt came between two steps of ``_decode_once`` before."""
        return False, TpoolError(f"the value of {self.story} was lost: who asked first was interrupted")

    # The handler's side ---------------------------------------------------------------------------------------------

    def resolve(self, index: int, result: Result) -> None:
        """See Sink."""
        with self._condition:
            if self._complete:
                return
            self._outcome = result
            self._announce(result.failed)

    def resolve_run(self, index: int, results: Results) -> None:
        """See Sink."""
        for offset, result in enumerate(results):
            self.resolve(index + offset, result)

    def drop(self, index: int) -> None:
        """See Sink."""
        with self._condition:
            if self._complete:
                return
            self._discard()
            self._outcome = Failure(TaskCancelledError(f"{self.story} was cancelled"))
            self._complete = self._failed = True
            # Whoever cancelled may be the callback thread, so this does not wait for it.
            self._publish(CANCELLED_AND_NOTIFIED)
        if self._error_callback is not None:
            self._callbacks.post(self._run_callback)

    def _discard(self) -> None:
        """Give back what came of a call that is given up."""

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

    def _announce(self, failed: bool) -> None:
        """The outcome is complete; callbacks come before ``get`` returns, as in the standard library."""
        self._complete = True
        self._failed = failed
        if self._callback is None and self._error_callback is None:
            self._publish(FINISHED)
        else:
            self._callbacks.post(self._run_callback)
            self._condition.notify_all()  # somebody may wait for it in another callback

    def _publish(self, state: str) -> None:
        """Let everybody know that it is done. The condition is held."""
        self._state = state
        self._keep = None
        self._condition.notify_all()
        for waiter in self._waiters:
            if state == CANCELLED_AND_NOTIFIED:
                waiter.add_cancelled(self)
            elif self._failed:
                waiter.add_exception(self)
            else:
                waiter.add_result(self)
        if self._hooks is not None:
            hooks, self._hooks = self._hooks, None
            for hook in hooks:
                hook()
        if self._done_callbacks:
            self._callbacks.post(self._invoke_callbacks)  # type: ignore[attr-defined]

    def _run_callback(self) -> None:
        try:
            succeeded, value = self._decode()
            callback = self._callback if succeeded else self._error_callback
            if callback is not None:
                callback(value)
        finally:
            self._callback = self._error_callback = None
            with self._condition:
                if not self.done():
                    self._publish(FINISHED)
