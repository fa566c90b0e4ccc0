"""How a job's function meets a task's payload, in a worker."""

from __future__ import annotations

import contextlib
from time import monotonic
from typing import Any

import torch

from tpool.errors import TpoolError
from tpool.local.wire import Mode
from tpool.tensors.leases import Block, Memory
from tpool.tensors.payload import Received
from tpool.tensors.pickler import Codec
from tpool.tensors.placed import Placed, place_last
from tpool.tensors.reducers_content import is_plain
from tpool.tensors.storages import Outgoing

EARLY_NBYTES = 64 << 10
"""A tensor of so many bytes that a call of a chunk returned goes into shared memory before the next call is made.

So the memory that it lay in is free, and in the processor's cache, when the next one needs some, and a chunk's results
do not lie in private memory all at once. By turns, five rounds of ``map``: 150 KB results 0.82 of the time that it
takes to move them when the last one is there, 1 MB 0.90, 16 MB 0.87; 20 KB 1.08. Tensors of so many bytes that nobody
else knows are copied, whether of a chunk or not; see ``tensors.placed``.
"""


class Marks:
    """When the parts of the present task ended, in seconds of the machine's monotonic clock.

    Attributes:
        decoded: its function and arguments were there.
        ran: the function had returned or raised.
        early: not when, but how long it took to move results while the function ran; ``ended`` takes account of it.
    """

    __slots__ = ("decoded", "early", "ran")

    def __init__(self) -> None:
        self.decoded = self.early = self.ran = 0.0

    def ended(self) -> None:
        """The function has returned for the last time."""
        self.ran = monotonic() - self.early
        self.early = 0.0

    def fail(self, started: float) -> None:
        """The task has raised: what it had not reached since ``started`` ends now."""
        now = monotonic()
        self.early = 0.0
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
        return self._call_chunk(function, argument, codec, marks)

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
    def _call_chunk(function: Any, chunk: list[Any], codec: Codec, marks: Marks) -> list[Any]:
        """Every item runs, whatever the others do; the first error speaks for the chunk."""
        values: list[Any] = []
        first_error: BaseException | None = None
        early: _EarlyMoves | None = None
        if codec.sharing == "share" and codec.can_swap:
            early = _EarlyMoves(codec, marks)
        chunk.reverse()
        while chunk:
            item = chunk.pop()  # each item's memory is free as soon as it was used
            try:
                values.append(function(item))
            except BaseException as error:
                first_error = first_error or error
            else:
                # Until the first that does not move: to look at each result costs a third of a no-op.
                if early is not None and not early.move(values, bool(chunk)):
                    early = None
        if first_error is not None:
            raise first_error
        return values


def leave_early(values: list[Any], codec: Codec) -> bool:
    """Put what stands for it in place of the last value, if that is a large tensor that only this list knows.

    Args:
        values: not empty; known to the caller alone.
        codec: will send it.

    Returns:
        Whether it did.
    """
    if type(values[-1]) is torch.Tensor and codec.sharing == "share" and codec.can_swap:
        with contextlib.suppress(TpoolError):  # it is met again, waited for or told, when it is sent
            place_last(values, codec.memory, EARLY_NBYTES)
    return type(values[-1]) is Placed


class _EarlyMoves:
    """Has results of one chunk leave for shared memory.

    Args:
        codec: which will send them, and will move them if nobody has.
        marks: is told how long it took.
    """

    def __init__(self, codec: Codec, marks: Marks) -> None:
        self._codec = codec
        self._outgoing: Outgoing | None = None  # few need one
        self._marks = marks

    def move(self, values: list[Any], more: bool) -> bool:
        """Have the last value leave, if it is a large tensor.

        Args:
            values: what the chunk's calls have returned.
            more: whether there are more to come; the last one moves with its chunk, unless it can be copied.

        Returns:
            Whether it lies in shared memory now.
        """
        if type(values[-1]) is not torch.Tensor:
            return False
        began = monotonic()
        moved = False
        with contextlib.suppress(Exception):  # it is met again, waited for or told, when the chunk is sent
            moved = leave_early(values, self._codec) or (more and self._move(values[-1]))
        self._marks.early += monotonic() - began
        return moved

    def _move(self, value: torch.Tensor) -> bool:
        if not is_plain(value) or value.nbytes < EARLY_NBYTES:
            return False
        outgoing = self._outgoing
        if outgoing is None:
            outgoing = self._outgoing = Outgoing(_AtOnce(self._codec.memory))  # type: ignore[arg-type]
        return outgoing.place(value.untyped_storage(), value) is not None


class _AtOnce:
    """A memory that nobody waits for: while a function runs, its pool must not believe that it waits."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def exchange(self, nbytes: int) -> Block:
        """As of ``Memory``, but for the waiting."""
        return self._memory.exchange(nbytes, at_once=True)
