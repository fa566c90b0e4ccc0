"""What an engine of local workers does in callers' threads: objects become payloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tpool.local import wire
from tpool.local.hunger import Hunger
from tpool.tensors.payload import Payload
from tpool.tensors.pickler import Codec
from tpool.tensors.plain import dumps_plain

__all__ = ["Encoder"]


class Encoder:
    """The part of ``tpool.engine.Engine`` that encodes; any thread may call.

    Args:
        codec: pickles.
        hunger: is told whose patience a wait for memory may count on.
    """

    def __init__(self, codec: Codec, hunger: Hunger) -> None:
        self._codec = codec
        self._patience = hunger

    def encode(self, obj: Any, patient: Callable[[], bool] | None = None) -> Payload | bytes:
        """See Engine."""
        stream = dumps_plain(obj)
        if stream is not None:
            return stream
        self._patience.set_patience(patient)
        return self._codec.dumps(obj)

    def encode_call(self, function: Any, args: tuple[Any, ...], kwds: dict[str, Any]) -> Payload | bytes:
        """See Engine."""
        self._patience.set_patience(None)
        return self._codec.dumps_call(function, args, kwds)

    def encoded_nbytes(self, encoded: Payload | bytes) -> int:
        """See Engine."""
        if isinstance(encoded, bytes):
            return len(encoded)
        if type(encoded.data) is bytes:
            nbytes = len(encoded.data)
            return nbytes + wire.moved_nbytes(encoded) if encoded.blocks else nbytes
        return wire.moved_nbytes(encoded)
