"""The errors of tpool.

Each derives from :class:`TpoolError` and from the built-in that a user of the standard library would catch::

    TpoolError
     ├── WorkerLostError (RuntimeError)             the worker that ran the task is gone
     ├── TaskTimeoutError (TimeoutError)            the task ran for longer than it may; its worker was killed
     ├── TaskCancelledError (CancelledError)        the task was cancelled
     ├── WorkerStartError (RuntimeError)            workers cannot start; the pool has ended
     ├── PoolEndedError (ValueError)                the pool was closed, terminated or forked away
     │    └── PoolTerminatedError                   terminated before this task was finished
     ├── SharedMemoryExhausted (MemoryError)        the pool's budget of shared memory is spent
     ├── TransportError (ValueError)                this object cannot travel; says which and what to do
     │    └── UnsupportedTensorError (TypeError)    this kind of tensor cannot travel
     ├── DecodeError (ValueError)                   bytes arrived, but could not be unpickled
     ├── MaybeEncodingError (ValueError)            a result (or exception) could not be pickled
     ├── ProtocolError (RuntimeError)               a peer sent something that is not a frame of ours
     └── PlatformError (RuntimeError)               this system, Python or torch cannot run tpool

``RemoteTraceback`` is no error of its own: it is the cause (``__cause__``) of an exception that came from a
worker and carries that worker's traceback as text.
"""

from __future__ import annotations

from concurrent.futures import CancelledError

__all__ = [
    "DecodeError",
    "MaybeEncodingError",
    "PlatformError",
    "PoolEndedError",
    "PoolTerminatedError",
    "ProtocolError",
    "RemoteTraceback",
    "SharedMemoryExhausted",
    "TaskCancelledError",
    "TaskTimeoutError",
    "TpoolError",
    "TransportError",
    "UnsupportedTensorError",
    "WorkerLostError",
    "WorkerStartError",
]


class TpoolError(Exception):
    """The root of all errors that tpool itself raises."""


class WorkerLostError(TpoolError, RuntimeError):
    """The worker that ran this task went away before the task had an outcome.

    Args:
        message: what happened, to which worker and task, and what to do about it.
        pid: process id of the worker, or None if it never had one.
        exitcode: its exit status; negative for the signal that killed it (as ``multiprocessing`` counts), None
            where the status could not be had (the zygote died with it).
    """

    def __init__(self, message: str, pid: int | None = None, exitcode: int | None = None) -> None:
        super().__init__(message, pid, exitcode)
        self.pid = pid
        self.exitcode = exitcode

    def __str__(self) -> str:
        return str(self.args[0])


class TaskTimeoutError(TpoolError, TimeoutError):
    """The task ran for longer than its ``timeout``, so its worker was killed. Other tasks are untouched."""


class TaskCancelledError(TpoolError, CancelledError):
    """The task was cancelled before it had an outcome; a ``concurrent.futures.CancelledError``, too."""


class WorkerStartError(TpoolError, RuntimeError):
    """Workers could not be started, so the pool has ended; the message tells the last reason."""


class PoolEndedError(TpoolError, ValueError):
    """The pool takes no more work: it was closed, terminated, or belongs to another process."""


class PoolTerminatedError(PoolEndedError):
    """The pool was terminated before this task was finished."""


class SharedMemoryExhausted(TpoolError, MemoryError):
    """The pool's budget of shared memory is spent and nothing that could be waited for would give some back."""


class TransportError(TpoolError, ValueError):
    """An object cannot be sent to another process; the message names its kind and the cure."""


class UnsupportedTensorError(TransportError, TypeError):
    """A kind of tensor that cannot be sent; the message names the kind and the cure."""


class DecodeError(TpoolError, ValueError):
    """An argument, function, result or exception arrived but could not be unpickled; the cause tells why."""


class MaybeEncodingError(TpoolError, ValueError):
    """A result (or an exception) of a task could not be pickled in the worker.

    The twin of ``multiprocessing.pool.MaybeEncodingError``, with the same two arguments.

    Args:
        exc: ``repr`` of the error that pickling raised.
        value: ``repr`` of the object that could not be pickled.
    """

    def __init__(self, exc: object, value: object) -> None:
        self.exc = exc if isinstance(exc, str) else repr(exc)
        self.value = value if isinstance(value, str) else repr(value)
        super().__init__(self.exc, self.value)

    def __str__(self) -> str:
        return f"Error sending result: {self.value!r}. Reason: {self.exc!r}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self}>"


class ProtocolError(TpoolError, RuntimeError):
    """Bytes on a channel are not a frame of ours; the peer that sent them is given up."""


class PlatformError(TpoolError, RuntimeError):
    """This system, Python or torch cannot run tpool; the message says what is missing."""


class RemoteTraceback(Exception):
    """The traceback of an exception in a worker, as text; printed as the exception's cause.

    The twin of ``multiprocessing.pool.RemoteTraceback``.

    Args:
        tb: the formatted traceback.
    """

    def __init__(self, tb: str) -> None:
        super().__init__(tb)
        self.tb = tb

    def __str__(self) -> str:
        return self.tb
