"""What an engine of local workers does in callers' threads: objects become payloads."""

from __future__ import annotations

import functools
import os
import pickle
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import torch

from tpool.errors import PlatformError
from tpool.local import wire
from tpool.local.crew import Crew, SlotRecord
from tpool.local.hunger import Hunger
from tpool.local.setup import PoolMemory
from tpool.outstanding import Piece
from tpool.task import JobId
from tpool.tensors.held import Holder, Reference
from tpool.tensors.payload import HeldObject, Payload
from tpool.tensors.plain import dumps_plain
from tpool.tensors.storages import Sharing

__all__ = ["Encoder"]

NOTED_NBYTES = 1024
"""What becomes less than this, and needs nothing but pickle, is left out of timelines: it takes a microsecond or two,
and to write it down would cost a third of that and push what is worth seeing out of what is kept."""


class Encoder:
    """The part of ``tpool.engine.Engine`` that encodes and makes room; any thread may call.

    Args:
        memory: of the pool, with the codec that pickles.
        hunger: is told whose patience a wait for memory may count on.
        crew: where jobs are written down.
    """

    def __init__(self, memory: PoolMemory, hunger: Hunger, crew: Crew) -> None:
        self._memory = memory
        self._codec = codec = memory.codec
        self._encodings = memory.encodings
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

    def make_room(self, processes: int) -> None:
        """See Engine."""
        try:
            self._memory.grow(processes)
        except (OSError, PlatformError) as error:
            raise PlatformError(
                f"there is no room for {processes} workers, so nothing was changed ({error}); raise the limits of"
                " descriptors (ulimit -n) and of address space (ulimit -v)"
            ) from error
        slots = self._crew.slots
        slots += [SlotRecord(trace=self._memory.trace(slot)) for slot in range(len(slots), processes)]
        self._memory.settings.processes = processes

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
        began = monotonic()
        encoded = self._codec.dumps(obj, sharing="share" if share else None)
        if self._encodings is not None:
            self._encodings.note(began, monotonic(), wire.carried_nbytes(encoded))
        return self._holder.hold(encoded)

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See Engine."""
        nbytes = dtype.itemsize
        for length in size:
            nbytes *= length
        if nbytes == 0:
            return torch.empty(size, dtype=dtype, device="cpu")
        self._patience.set_patience(None)
        block = self._codec.memory.allocate(nbytes, lazily=True)
        return torch.frombuffer(block.view, dtype=dtype).resize_(size)

    def encode(self, obj: Any, patient: Callable[[], bool] | None = None) -> Payload | bytes:
        """See Engine."""
        encodings = self._encodings
        began = 0.0 if encodings is None else monotonic()
        encoded: Payload | bytes | None = dumps_plain(obj)
        if encoded is None:
            self._patience.set_patience(patient)
            encoded = self._codec.dumps(obj)
        if encodings is not None and (type(encoded) is not bytes or len(encoded) >= NOTED_NBYTES):
            encodings.note(began, monotonic(), wire.carried_nbytes(encoded))
        return encoded

    @property
    def packs_items(self) -> bool:
        """See Engine; a timeline tells of each task."""
        return self._encodings is None

    def encode_items(self, items: tuple[Any, ...]) -> wire.Items:
        """See Engine."""
        return wire.Items(pickle.dumps(items, pickle.HIGHEST_PROTOCOL))

    def encode_call(self, function: Any, args: tuple[Any, ...], kwds: dict[str, Any]) -> Payload | bytes:
        """See Engine."""
        self._patience.set_patience(None)
        encodings = self._encodings
        began = 0.0 if encodings is None else monotonic()
        encoded = self._codec.dumps_call(function, args, kwds)
        if encodings is not None and (type(encoded) is not bytes or len(encoded) >= NOTED_NBYTES):
            encodings.note(began, monotonic(), wire.carried_nbytes(encoded))
        return encoded

    def weigh(self, encoded: Payload | bytes) -> tuple[int, Sequence[Piece]]:
        """See Engine."""
        if isinstance(encoded, bytes):
            return len(encoded), ()
        data = encoded.data
        own_nbytes = len(data) if isinstance(data, bytes) else data.nbytes
        # Not by address: a task that is done has given its memory back, and another item may have that by now.
        return own_nbytes, [(weakref.ref(block.view.obj), block.nbytes) for block in encoded.blocks]
