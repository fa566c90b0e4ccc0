"""What an engine of local workers does in callers' threads: objects become payloads."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from tpool.local import wire
from tpool.local.crew import Crew
from tpool.local.hunger import Hunger
from tpool.messages import JobId
from tpool.tensors.held import Holder, Reference
from tpool.tensors.payload import HeldObject, Payload
from tpool.tensors.pickler import Codec
from tpool.tensors.plain import dumps_plain
from tpool.tensors.storages import Sharing

__all__ = ["Encoder"]


class Encoder:
    """The part of ``tpool.engine.Engine`` that encodes; any thread may call.

    Args:
        codec: pickles.
        hunger: is told whose patience a wait for memory may count on.
        crew: where jobs are written down.
    """

    def __init__(self, codec: Codec, hunger: Hunger, crew: Crew) -> None:
        self._codec = codec
        self._patience = hunger
        self._crew = crew
        self._holder = Holder(codec.memory, self.wake)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """See Engine."""
        try:
            os.eventfd_write(self._wake_fd, 1)
        except (OSError, ValueError):
            return  # closed meanwhile: nobody is left to wake

    def open_job(self, job: JobId, mode: int, function: Payload | bytes | None) -> None:
        """See Engine."""
        if function is not None:
            self._crew.jobs[job] = (mode, function)

    @property
    def sharing(self) -> Sharing:
        """What sending a tensor means; see ``Codec``."""
        return self._codec.sharing

    @property
    def shares_memory(self) -> bool:
        """See Engine."""
        return True

    def put(self, obj: object, share: bool = False) -> Reference:
        """See Engine."""
        return Reference(functools.partial(self._hold, share), obj)

    def _hold(self, share: bool, obj: object) -> HeldObject:
        self._patience.set_patience(None)
        return self._holder.hold(self._codec.dumps(obj, sharing="share" if share else None))

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See Engine."""
        nbytes = dtype.itemsize
        for length in size:
            nbytes *= length
        if nbytes == 0:
            return torch.empty(size, dtype=dtype, device="cpu")
        self._patience.set_patience(None)
        block = self._codec.memory.allocate(nbytes)
        return torch.frombuffer(block.view, dtype=dtype).resize_(size)

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
