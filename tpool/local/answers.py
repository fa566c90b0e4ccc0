"""What a local worker answered, kept as it came until somebody asks for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from tpool.errors import DecodeError, RemoteTraceback
from tpool.tensors.payload import Received
from tpool.tensors.pickler import Codec
from tpool.tensors.unpickler import loads_plain

__all__ = ["LocalResult", "PlainResult", "take_failed"]


class PlainResult:
    """A result that needs nothing but pickle; see ``tpool.engine.Result``."""

    __slots__ = ("_stream", "seconds")
    failed = False

    def __init__(self, stream: bytes, seconds: float) -> None:
        self._stream = stream
        self.seconds = seconds

    @property
    def nbytes(self) -> int:
        """See Result."""
        return len(self._stream)

    def take(self) -> Any:
        """See Result."""
        return loads_plain(self._stream)

    def discard(self) -> None:
        """See Result."""


class LocalResult:
    """Any other result, and every error; see ``tpool.engine.Result``."""

    __slots__ = ("__weakref__", "codec", "failed", "received", "seconds", "traceback")

    def __init__(self, failed: bool, received: Received, traceback: str, seconds: float, codec: Codec) -> None:
        self.failed = failed
        self.received = received
        self.traceback = traceback
        self.seconds = seconds
        self.codec = codec
        if received.fds:
            # Blocks give themselves back when nobody wants the result; descriptors do not.
            weakref.finalize(self, received.discard).atexit = False

    @property
    def nbytes(self) -> int:
        """See Result."""
        data = self.received.data
        blocks = sum([block.nbytes for block in self.received.blocks])
        return blocks + (len(data) if isinstance(data, bytes) else data.nbytes)

    def take(self) -> Any:
        """See Result."""
        if not self.failed:
            return self.codec.loads(self.received)
        return take_failed(lambda: self.codec.loads(self.received), self.traceback)

    def discard(self) -> None:
        """See Result."""
        self.received.discard()


def take_failed(loads: Callable[[], Any], traceback: str) -> Any:
    """The exception that a worker sent, with its traceback as its cause.

    Raises:
        DecodeError: it could not be unpickled.
    """
    try:
        error = loads()
    except Exception as reason:
        # The exception's own text is in the traceback; better that than only "could not be unpickled".
        raise DecodeError(
            f"the task raised an exception that could not be unpickled here ({reason}); "
            "the traceback above, from the worker, tells what it was"
        ) from RemoteTraceback(_quote(traceback))
    error.__cause__ = RemoteTraceback(_quote(traceback))
    return error


def _quote(text: str) -> str:
    return f'\n"""\n{text}"""'
