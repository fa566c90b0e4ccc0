"""Run a function in a forked child of the test's own process."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable

__all__ = ["fork", "run_in_fork"]


def fork(child: Callable[[], object]) -> int:
    """Fork; the child runs the function and ends with status 1 if it raised. Returns the child's id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, from Python 3.12 on
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        child()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run_in_fork(child: Callable[[], object]) -> int:
    """Fork, wait, and give the child's exit status."""
    _, status = os.waitpid(fork(child), 0)
    return os.waitstatus_to_exitcode(status)
