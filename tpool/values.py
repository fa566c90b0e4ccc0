"""Results that are plain values: numbers, truths, None. They need no decoding and travel in bulk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["PLAIN", "ValueResult", "Values"]

PLAIN = frozenset({int, float, bool, type(None)})
"""The types that values are of, exactly; no Result is of one of them."""


class ValueResult:
    """One of them; see ``tpool.engine.Result``."""

    __slots__ = ("_value", "seconds")
    failed = False
    nbytes = 8

    def __init__(self, value: Any, seconds: float) -> None:
        self._value = value
        self.seconds = seconds

    def take(self) -> Any:
        """See Result."""
        return self._value

    def discard(self) -> None:
        """See Result."""


class Values:
    """Those of tasks that stand behind each other; iterating gives each as a Result.

    Args:
        values: what the tasks returned.
        seconds: how long one of them ran, in the mean.
    """

    __slots__ = ("seconds", "values")

    def __init__(self, values: list[Any], seconds: float) -> None:
        self.values = values
        self.seconds = seconds

    def discard(self) -> None:
        """As of a Result: there is nothing to give back."""

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[ValueResult]:
        return (ValueResult(value, self.seconds) for value in self.values)
