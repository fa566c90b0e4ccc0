"""Waiting for another thread, safely under signal handlers that raise, Ctrl-C's above all.

``with threading.Condition()`` runs Python code between taking its lock and the body, and between the body and giving
the lock back. A signal handler that raises just there leaves the lock taken for ever; the next to want it, our
handler's thread, would hang, and all with it (seen: one interrupt of some thousands). ``threading.Event`` is made of
one. A lock of C has no such moment: the interpreter looks for signals between calls of Python code, and ``with`` makes
none. So these two are built on such a lock, which is never held by who sleeps.
"""

from __future__ import annotations

import contextlib
import threading
from _thread import LockType, RLock, allocate_lock
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


class Monitor(RLock):  # type: ignore[misc]  # the type stub says final; it is not, in CPython 3.10 to 3.14
    """A lock, and waiting for what it guards to change.

    ``with monitor:`` takes and gives back; reentrant, so that a signal handler may use what its thread was using. In
    place of a ``threading.Condition`` for ``concurrent.futures.wait`` and ``as_completed``, which only take it.
    """

    __slots__ = ("_sleepers",)

    def __init__(self) -> None:
        self._sleepers: list[LockType] = []  # each taken, and released by who wakes its owner

    def notify_all(self) -> None:
        """Have all who wait look again. The lock is held."""
        sleepers = self._sleepers
        while sleepers:
            sleepers.pop().release()

    def wait_for(self, look: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until ``look()`` is true or the time is over. The lock must not be held; it is while ``look`` runs.

        Args:
            look: what to wait for; what it raises ends the waiting.
            timeout: seconds; None waits for as long as it takes.

        Returns:
            What ``look`` returned last.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            with self:
                found = look()
                if found:
                    return found
                sleeper = self._add_sleeper()
            remaining = None if deadline is None else max(0.0, deadline - monotonic())
            if not self._sleep(sleeper, remaining):
                with self:
                    return look()

    def wait(self, timeout: float) -> None:
        """Wait for the next ``notify_all``, so many seconds at most. The lock must not be held."""
        with self:
            sleeper = self._add_sleeper()
        self._sleep(sleeper, timeout)

    def _add_sleeper(self) -> LockType:
        sleeper = allocate_lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        return sleeper

    def _sleep(self, sleeper: LockType, timeout: float | None) -> bool:
        if sleeper.acquire(True, -1 if timeout is None else timeout):
            return True
        with self:
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)
        return False


def uninterrupted(call: Callable[[], T], drop: Callable[[T], object]) -> T:
    """Make a call that no signal handler may leave half done: in a thread of its own, as handlers run in the main one.

    An interrupt ends the waiting; the call is made to its end.

    Args:
        call: what to do.
        drop: what to do with the value, in some thread, if there was an interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    values: list[T] = []
    errors: list[BaseException] = []
    over = Flag()
    abandoned: list[bool] = []

    def drop_abandoned() -> None:
        with contextlib.suppress(IndexError):  # there is none, or the other thread was faster
            drop(values.pop())

    def run() -> None:
        try:
            values.append(call())
        except BaseException as error:
            errors.append(error)
        over.set()
        if abandoned:
            drop_abandoned()

    try:
        threading.Thread(target=run, name="tpool-uninterrupted", daemon=True).start()
        over.wait()
    except BaseException:
        abandoned.append(True)
        drop_abandoned()
        raise
    if errors:
        raise errors.pop()
    return values.pop()


class Flag:
    """Set once, waited for by any number of threads; as ``threading.Event``."""

    __slots__ = ("_monitor", "_set")

    def __init__(self) -> None:
        self._monitor = Monitor()
        self._set = False

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._set

    def set(self) -> None:
        """Wake all who wait; who comes later does not wait."""
        with self._monitor:
            self._set = True
            self._monitor.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, or ``timeout`` seconds have passed; returns whether it is."""
        return self._set or self._monitor.wait_for(self.is_set, timeout)
