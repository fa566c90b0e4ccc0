"""Whether a pool takes work, and why not."""

from __future__ import annotations

import os
import threading

from tpool.errors import PoolEndedError, PoolTerminatedError, WorkerStartError
from tpool.handler import Handler


class Gate:
    """The state of a pool as its callers see it. Apart from the pool, so that nothing but callers keeps that alive.

    Args:
        handler: knows whether the pool has come to its end.
        processes: how many workers there are at first.

    Attributes:
        processes: how many workers there are to be now; written under the lock.
        state: RUN, CLOSE or TERMINATE.
        lock: orders the pool's end against calls of other threads: nothing is opened after it. A signal handler may
            end the pool, too.
    """

    def __init__(self, handler: Handler, processes: int) -> None:
        self.processes = processes
        self.state = "RUN"
        self.lock = threading.RLock()
        self._handler = handler
        self._pid = os.getpid()

    def check_process(self) -> None:
        """Raise PoolEndedError in a forked child: the workers are its parent's."""
        if os.getpid() != self._pid:
            raise PoolEndedError(
                f"this pool belongs to process {self._pid}, and this is process {os.getpid()}, forked from it; "
                "make a pool of its own here"
            )

    def check_running(self) -> None:
        """Raise PoolEndedError or WorkerStartError if the pool takes no more work."""
        self.check_process()
        error = self._handler.error
        if error is not None:
            raise WorkerStartError("Pool not running: its workers could not start") from error.take()
        if self.state != "RUN":
            how = "closed" if self.state == "CLOSE" else "terminated, which the end of its with block does, too"
            raise PoolEndedError(f"Pool not running: it was {how}; make the call before that, or make another pool")
        if self._handler.ended:
            raise PoolTerminatedError("Pool not running: it was terminated; make another pool")
