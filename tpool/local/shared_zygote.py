"""The zygotes of this process: started at need, shared by its pools, started again when they have gone."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import socket
import sys
import threading

from tpool.local import zygote
from tpool.local.channel import Channel
from tpool.local.interpreter import CHILD_FD, spawn_interpreter

__all__ = ["SharedZygote", "shared_zygote", "zygote_traces"]


class SharedZygote:
    """The zygote of this process, started at need and started again when it has gone.

    May be used from any thread; a lock guards the hand-over of connections.
    """

    def __init__(self, preload: tuple[str, ...]) -> None:
        self._preload = preload
        self._lock = threading.Lock()
        self._control: Channel | None = None
        self.pid: int | None = None
        atexit.register(self._close_at_exit, os.getpid())  # else the socket would be collected open, with a warning

    def connect(self) -> socket.socket:
        """A new connection to a living zygote."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._lock, theirs:
            if not self._alive():
                self._start()
            try:
                self._send_connection(theirs)
            except (BrokenPipeError, ConnectionResetError):
                # It is on its way out, after its last pool or killed, but not gone; it takes no connections any more.
                self._bury()
                self._start()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._send_connection(theirs)
            # One that exits from now on is noticed by the end of file on ``ours``.
        return ours

    def _send_connection(self, theirs: socket.socket) -> None:
        assert self._control is not None
        self._control.put(zygote.CONNECT, b"", (theirs.fileno(),))
        self._control.flush()

    def _close_at_exit(self, pid: int) -> None:
        if self._control is not None and os.getpid() == pid:
            self._control.close()

    def _bury(self) -> None:
        """Have it gone, and its status taken."""
        assert self.pid is not None
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._forget()

    def trace(self) -> tuple[int, int] | None:
        """(process id, descriptor of the control socket) while it lives."""
        with self._lock:
            if not self._alive():
                return None
            assert self.pid is not None
            assert self._control is not None
            return self.pid, self._control.fileno()

    def _alive(self) -> bool:
        if self.pid is None:
            return False
        try:
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                return True
        except ChildProcessError:  # reaped by somebody else's wait(): gone as well
            pass
        self._forget()
        return False

    def _forget(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control = None
        self.pid = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            code = f"zygote_main({CHILD_FD}, {os.getpid()}, end_watch)"
            # OpenBLAS starts its threads when it is loaded; nothing else reads this later.
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            self.pid = spawn_interpreter("tpool.local.zygote", "zygote_main", code, theirs.fileno(), environment)
        self._control = Channel(ours)
        config = zygote.ZygoteConfig(list(sys.path), self._preload)
        self._control.put(1, pickle.dumps(config))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # noticed by whoever connects
            self._control.flush()


# The zygotes of this process by preload list. Shared by all pools, since each costs an import of torch; guarded by
# the lock; forgotten in a forked child, to which they do not belong.
_zygotes: dict[tuple[str, ...], SharedZygote] = {}
_zygotes_lock = threading.Lock()


def shared_zygote(preload: tuple[str, ...] = ()) -> SharedZygote:
    """This process's zygote for a list of modules to preload."""
    with _zygotes_lock:
        return _zygotes.setdefault(preload, SharedZygote(preload))


def zygote_traces() -> tuple[set[int], set[int]]:
    """(process ids, descriptors) of the zygotes that this process has started and not yet seen end.

    They outlive their last pool by ``zygote.LINGER_SECONDS``; whoever counts what a pool leaves behind subtracts them.
    """
    with _zygotes_lock:
        traces = [trace for known in _zygotes.values() if (trace := known.trace()) is not None]
    return {pid for pid, _ in traces}, {fd for _, fd in traces}


def _forget_zygotes() -> None:
    global _zygotes_lock
    _zygotes_lock = threading.Lock()
    for known in _zygotes.values():
        known._forget()
    _zygotes.clear()


os.register_at_fork(after_in_child=_forget_zygotes)
