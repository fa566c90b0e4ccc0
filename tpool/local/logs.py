"""Workers' log records, handled in the caller's process.

    worker: root logger ─► LogSender ── one packet per record ──► LogReceiver (a thread) ─► the caller's loggers

Records have a socket of their own: any thread of a worker may write to it, in the middle of a task, and one packet is
written whole or not at all. Nothing is unpickled; what travels is text and numbers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import traceback
from typing import Any

__all__ = ["LogReceiver", "install_sender"]

# The kernel's default for a packet is 208 KB (net.core.wmem_default); a longer text is cut to this many characters.
MAX_TEXT = 30_000
_RECEIVE_NBYTES = 1 << 20

_FIELDS = ("name", "levelno", "levelname", "pathname", "filename", "module", "lineno", "funcName", "created", "msecs",
           "relativeCreated", "thread", "threadName", "process", "processName", "taskName")  # fmt: skip


class LogSender(logging.Handler):
    """In a worker: sends each record to the caller.

    Args:
        sock: to the caller; owned.
        worker: the number of this worker.
    """

    def __init__(self, sock: socket.socket, worker: int) -> None:
        super().__init__()
        self._sock = sock
        self._worker = worker
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``; waits where the caller is slow."""
        try:
            fields: dict[str, Any] = {name: getattr(record, name, None) for name in _FIELDS}
            fields["msg"] = record.getMessage()[:MAX_TEXT]
            fields["worker"] = self._worker
            if record.exc_info:
                fields["exc_text"] = self._formatter.formatException(record.exc_info)[-MAX_TEXT:]
            with contextlib.suppress(BrokenPipeError, ConnectionError):  # the pool has ended
                self._sock.send(json.dumps(fields).encode())
        except Exception:
            self.handleError(record)


def install_sender(fd: int, level: int, worker: int) -> None:
    """In a worker: what reaches the root logger goes to the caller, and to no handler that a fork inherited."""
    root = logging.getLogger()
    root.handlers[:] = [LogSender(socket.socket(fileno=fd), worker)]
    root.setLevel(level)


class LogReceiver:
    """In the caller: hands the records of the workers of one pool to its own loggers, in a thread.

    Args:
        level: of the least records that workers send.

    Attributes:
        fd: of the end that is sent to workers.
    """

    def __init__(self, level: int) -> None:
        self.level = level
        self._sock, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fd = self._theirs.fileno()
        self._thread = threading.Thread(target=self._run, name="tpool-logs", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with self._sock as sock:
            while packet := sock.recv(_RECEIVE_NBYTES):
                try:
                    record = logging.makeLogRecord(json.loads(packet))
                    logger = logging.getLogger(record.name)
                    if logger.isEnabledFor(record.levelno):
                        logger.handle(record)
                except Exception:  # of a filter, perhaps; the others' records are to be seen
                    if logging.raiseExceptions:
                        traceback.print_exc()

    def close(self) -> None:
        """Take no more records; those that were sent are still handled. Allowed twice."""
        with contextlib.suppress(OSError):  # closed before
            self._sock.shutdown(socket.SHUT_RD)
        self._theirs.close()

    def join(self, timeout: float | None) -> None:
        """Wait until all were handled."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
