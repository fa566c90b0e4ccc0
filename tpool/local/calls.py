"""How a job's function meets a task's payload, in a worker."""

from __future__ import annotations

from time import monotonic
from typing import Any

from tpool.local.wire import Mode
from tpool.tensors.payload import Received
from tpool.tensors.pickler import Codec


class Marks:
    """When the parts of the present task ended, in seconds of the machine's monotonic clock.

    Attributes:
        decoded: its function and arguments were there.
        ran: the function had returned or raised.
    """

    __slots__ = ("decoded", "ran")

    def __init__(self) -> None:
        self.decoded = self.ran = 0.0

    def fail(self, started: float) -> None:
        """The task has raised: what it had not reached since ``started`` ends now."""
        now = monotonic()
        self.decoded = now if self.decoded == started else self.decoded
        self.ran = now if self.ran == started else self.ran


def apply_call(codec: Codec, received: Received | bytes, marks: Marks) -> Any:
    """Make the call of an ``apply``, which brings its function along."""
    call: Any = codec.loads(received)
    marks.decoded = monotonic()
    (args, kwds), function = call
    return function(*args, **kwds)


class JobCalls:
    """The calls of one job: its function, and how it is called.

    Args:
        mode: how.
        payload: the function, decoded when the first task runs, so that a failure is that task's error.
    """

    __slots__ = ("_error", "_function", "_mode", "_payload")

    def __init__(self, mode: Mode, payload: Received) -> None:
        self._mode = mode
        self._payload: Received | None = payload
        self._function: Any = None
        self._error: BaseException | None = None

    def call(self, codec: Codec, received: Received | bytes, marks: Marks) -> Any:
        """Run one task.

        Args:
            codec: unpickles.
            received: the item, or the chunk of items.
            marks: is told when that was decoded.

        Raises:
            DecodeError: the function or the argument could not be unpickled.
            BaseException: what the function raised; of a chunk, what the first call to fail raised.
        """
        function = self.ready_function(codec)
        argument: Any = codec.loads(received)
        marks.decoded = monotonic()
        if self._mode == Mode.CALL:
            return function(argument)
        return self._call_chunk(function, argument)

    def ready_function(self, codec: Codec) -> Any:
        """The function.

        Raises:
            DecodeError: it could not be unpickled; again and again.
        """
        if self._payload is not None:
            self._decode(codec)
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self._function

    def _decode(self, codec: Codec) -> None:
        received, self._payload = self._payload, None
        assert received is not None
        try:
            self._function = codec.loads(received)
        except BaseException as error:
            self._error = error

    @staticmethod
    def _call_chunk(function: Any, chunk: list[Any]) -> list[Any]:
        """Every item runs, whatever the others do; the first error speaks for the chunk."""
        values: list[Any] = []
        first_error: BaseException | None = None
        chunk.reverse()
        while chunk:
            item = chunk.pop()  # each item's memory is free as soon as it was used
            try:
                values.append(function(item))
            except BaseException as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        return values
