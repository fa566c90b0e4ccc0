"""Waiting for another thread, safely under signal handlers that raise, Ctrl-C's above all.

``with threading.Condition()`` runs Python code between taking its lock and the body, and between the body and giving
the lock back. A signal handler that raises just there leaves the lock taken for ever; the next to want it, our
handler's thread, would hang, and all with it (seen: one interrupt of some thousands). ``threading.Event`` is made of
one. With a lock of C there is no such moment: CPython 3.10 to 3.13 looks for signals where a function begins, after
calls and at the end of a loop, but not between taking the lock and the body. So these two are built on such a lock;
and nobody holds it who waits, or looks for what is waited for.

What is left is the standard library's: ``concurrent.futures.wait`` may be interrupted while it takes the locks of its
futures, and ``threading.Thread.start`` while it waits for the thread to begin.
"""

from __future__ import annotations

import contextlib
import threading
from _thread import LockType, RLock, allocate_lock
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


class Monitor(RLock):  # type: ignore[misc]  # the type stub says final; it is not, in CPython 3.10 to 3.13
    """A lock for those who change something, and waiting for it to change.

    ``with monitor:`` takes and gives back; reentrant, so that a signal handler may use what its thread was using. In
    place of a ``threading.Condition`` for ``concurrent.futures.wait`` and ``as_completed``, which only take it.

    Shared data: ``_sleepers`` is changed in atomic steps. Who waits stands in it before looking, and who changes
    something does so before going through it: one of the two always notices.
    """

    __slots__ = ("_sleepers",)

    def __init__(self) -> None:
        self._sleepers: list[LockType] = []  # each taken, and released by who wakes its owner

    def notify_all(self) -> None:
        """Have all who wait look again; after the change. The lock is held."""
        for sleeper in list(self._sleepers):
            with contextlib.suppress(RuntimeError):  # released before, and its owner has not gone yet
                sleeper.release()

    def wait_for(self, look: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until ``look()`` is true or the time is over. The lock must not be held.

        Args:
            look: what to wait for; the lock is not held for it. What it raises ends the waiting.
            timeout: seconds; None waits for as long as it takes.

        Returns:
            What ``look`` returned last.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            sleeper = allocate_lock()
            sleeper.acquire()
            try:
                self._sleepers.append(sleeper)
                found = look()
                if found:
                    return found
                remaining = -1.0 if deadline is None else max(0.0, deadline - monotonic())
                if not sleeper.acquire(True, remaining):
                    return look()
            finally:
                self._forget(sleeper)

    def wait(self, timeout: float) -> None:
        """Wait for the next ``notify_all``, so many seconds at most. The lock must not be held."""
        sleeper = allocate_lock()
        sleeper.acquire()
        try:
            self._sleepers.append(sleeper)
            sleeper.acquire(True, timeout)
        finally:
            self._forget(sleeper)

    def _forget(self, sleeper: LockType) -> None:
        with contextlib.suppress(ValueError):  # interrupted before it stood there
            self._sleepers.remove(sleeper)


def uninterrupted(call: Callable[[], T], drop: Callable[[T], object]) -> T:
    """Make a call that no signal handler may leave half done: in a thread of its own, as handlers run in the main one.

    An interrupt ends the waiting; the call, once begun, is made to its end.

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
