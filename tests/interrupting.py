"""A signal handler that raises, at a moment of one's choice."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

__all__ = ["AlarmError", "interrupt"]


class AlarmError(Exception):
    """What the signal handler raises."""


def alarm() -> None:
    """A signal handler that raises."""
    raise AlarmError


def interrupt(operation: Callable[[], object], moment: int, handler: Callable[[], object] = alarm) -> str | None:
    """Run this and call the signal handler when it has come so far; returns where that was, None if it ended before.

    Signals are handled where a function of Python begins, where one of C has returned and at the end of a loop; a
    profile function is told of the first two, in this thread only, and may raise.
    """
    place: str | None = None
    seen = 0

    def profile(frame, event, arg):
        nonlocal place, seen
        if event == "c_call" or begins_a_thread(frame):
            return
        seen += 1
        if seen == moment:
            sys.setprofile(None)
            place = f"moment {moment}, {event} in {frame.f_code.co_name}, line {frame.f_lineno}"
            handler()

    sys.setprofile(profile)
    try:
        operation()
    except AlarmError:
        pass
    except Exception as error:
        if not isinstance(error.__cause__, AlarmError):  # that of a result which was being unpickled
            raise
    finally:
        sys.setprofile(None)
    return place


def begins_a_thread(frame) -> bool:
    """Whether the standard library starts a thread, which may hang if that is interrupted; nobody waits for it."""
    while frame is not None:
        if frame.f_code is threading.Thread.start.__code__:
            return True
        frame = frame.f_back
    return False
