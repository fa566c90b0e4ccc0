"""When the caller's threads encoded what they sent. Only where a timeline is asked for."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

__all__ = ["Encoding", "Encodings"]


class Encoding(NamedTuple):
    """One object: by which thread, when, and how many bytes it became."""

    thread: str
    began: float
    ended: float
    nbytes: int


class _Here(threading.local):
    """The present thread's name, as it was when it first encoded something."""

    def __init__(self) -> None:
        self.name = threading.current_thread().name


class Encodings:
    """The latest; any thread adds, in one step.

    Args:
        capacity: how many are kept.
    """

    def __init__(self, capacity: int) -> None:
        # Plain tuples, as of Encoding: that takes a third of the time to make one.
        self._kept: deque[tuple[str, float, float, int]] = deque(maxlen=capacity)
        self._here = _Here()
        self._count = 0  # may miss some where threads add at once; it only tells that there were more

    def note(self, began: float, ended: float, nbytes: int) -> None:
        """This thread has encoded something."""
        self._kept.append((self._here.name, began, ended, nbytes))
        self._count += 1

    def read(self) -> tuple[list[Encoding], int]:
        """What is kept, and how many older ones are gone."""
        kept = [Encoding._make(entry) for entry in self._kept.copy()]
        return kept, max(0, self._count - len(kept))
