"""What callers may ask for the tasks of a call: a time limit, and which failures are tried again."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any, Final

from tpool.errors import TaskTimeoutError, WorkerLostError
from tpool.task import Rules

__all__ = ["POOL", "Limits", "PoolDefault", "RetryOn"]

RetryOn = type[BaseException] | Iterable[type[BaseException]]


class PoolDefault(enum.Enum):
    """The value of an argument that was left out: what the pool was made with."""

    POOL = enum.auto()

    def __repr__(self) -> str:
        return "POOL"


POOL: Final = PoolDefault.POOL


class Limits:
    """A time limit and retries, checked.

    Args:
        timeout: how many seconds a task may run; None for any time.
        retries: how often a task is tried again.
        retry_on: after which exceptions: a class or several.

    Attributes:
        rules: what the scheduler has to know; None if there is nothing to know.
        caught: the exceptions of tasks that are tried again; empty for none.

    Raises:
        TypeError: a value is of the wrong kind.
        ValueError: a number is out of range.
    """

    __slots__ = ("_retries", "_retry_on", "_timeout", "caught", "rules")

    def __init__(self, timeout: float | None = None, retries: int = 0, retry_on: RetryOn = WorkerLostError) -> None:
        self._timeout = check_timeout(timeout)
        self._retries = check_retries(retries)
        self._retry_on = check_retry_on(retry_on)
        self.rules: Rules | None = None
        self.caught: tuple[type[BaseException], ...] = ()
        if retries:
            # What the scheduler finds out by itself does not have to be looked for in the worker.
            self.caught = tuple(kind for kind in self._retry_on if kind not in (WorkerLostError, TaskTimeoutError))
        if retries or self._timeout is not None:
            lost, timed_out = (issubclass(kind, self._retry_on) for kind in (WorkerLostError, TaskTimeoutError))
            self.rules = Rules(self._timeout, retries, retries > 0 and lost, retries > 0 and timed_out)

    def override(
        self,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> Limits:
        """These limits, but for what is given here."""
        if timeout is POOL and retries is POOL and retry_on is POOL:
            return self
        return Limits(
            self._timeout if isinstance(timeout, PoolDefault) else timeout,
            self._retries if isinstance(retries, PoolDefault) else retries,
            self._retry_on if isinstance(retry_on, PoolDefault) else retry_on,
        )


def check_timeout(timeout: Any) -> float | None:
    """Seconds, or None for any time."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds, or None for no limit, not {timeout!r}")
    return float(timeout)


def check_retries(retries: Any) -> int:
    """A count."""
    if isinstance(retries, bool) or not isinstance(retries, int):
        raise TypeError(f"retries must be a count, such as 3, not {retries!r}; which exceptions: retry_on=")
    if retries < 0:
        raise ValueError(f"retries must be 0 or more, not {retries}")
    return retries


def check_retry_on(retry_on: Any) -> tuple[type[BaseException], ...]:
    """A class of exceptions, or several."""
    kinds = (retry_on,) if isinstance(retry_on, type) else retry_on
    if isinstance(kinds, Iterable):
        kinds = tuple(kinds)
        if all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds):
            return kinds
    raise TypeError(f"retry_on must be a class of exceptions or several in a tuple, not {retry_on!r}")
