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


class Encodings:
    """The latest; any thread adds, in one step.

    Args:
        capacity: how many are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._kept: deque[Encoding] = deque(maxlen=capacity)
        self._count = 0  # may miss some where threads add at once; it only tells that there were more

    def note(self, began: float, ended: float, nbytes: int) -> None:
        """This thread has encoded something."""
        self._kept.append(Encoding(threading.current_thread().name, began, ended, nbytes))
        self._count += 1

    def read(self) -> tuple[list[Encoding], int]:
        """What is kept, and how many older ones are gone."""
        kept = self._kept.copy()
        return list(kept), max(0, self._count - len(kept))
