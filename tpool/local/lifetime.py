"""What runs at the two ends of a worker's life, where it is more than an initializer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tpool.local.story import format_remote


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Travels in the initializer's place.

    Attributes:
        initializer: called with ``initargs`` before the first task; None for nothing.
        worker_exit: called without arguments after the last one.
    """

    initializer: Callable[..., object] | None
    worker_exit: Callable[[], object]

    def end(self) -> bytes | None:
        """Call ``worker_exit``; what it raised, as a traceback, or None."""
        try:
            self.worker_exit()
        except BaseException as error:
            return format_remote(error).encode(errors="backslashreplace")
        return None
