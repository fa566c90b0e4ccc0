"""What a worker on Ray answered: large buffers stay in the object store until somebody asks for them."""

from __future__ import annotations

import threading
from typing import Any

from tpool.errors import DecodeError
from tpool.local.answers import take_failed
from tpool.ray import parcels
from tpool.ray.private import PrivateMemory
from tpool.tensors.payload import Received
from tpool.tensors.pickler import Codec

__all__ = ["RayResult"]


class RayResult:
    """See ``tpool.engine.Result``.

    Args:
        failed: it is an exception.
        wired: stream, buffers, and where those in the store begin.
        count: how many of those there are.
        ref: Ray's reference to the buffers of its call.
        nbytes, seconds: see Result.
        traceback: of an exception, as text.
        codec, memory: of the caller.
        get: ``ray.get``.
    """

    __slots__ = ("__weakref__", "_codec", "_count", "_get", "_lock", "_memory", "_ref", "_traceback", "_wired",
                 "failed", "nbytes", "seconds")  # fmt: skip

    def __init__(self, failed: bool, wired: parcels.Wired, count: int, ref: Any, nbytes: int, seconds: float,
                 traceback: str, codec: Codec, memory: PrivateMemory, get: Any) -> None:  # fmt: skip
        self.failed = failed
        self.seconds = seconds
        self.nbytes = nbytes
        self._wired = wired
        self._count = count
        self._ref = ref
        self._traceback = traceback
        self._codec = codec
        self._memory = memory
        self._get = get
        # Whoever decodes and the pool's end, which fetches what will soon be out of reach, may come at once.
        self._lock = threading.Lock()

    def take(self) -> Any:
        """See Result; may wait for the store (its buffers may have been spilled)."""
        if not self.failed:
            return self._codec.loads(self._receive())
        return take_failed(lambda: self._codec.loads(self._receive()), self._traceback)

    def _receive(self) -> Received:
        with self._lock:
            stream, inline, place = self._wired
            if place < 0:
                return parcels.unpack(stream, inline, _copy)
            ref, self._ref = self._ref, None
            return parcels.unpack(stream, self._fetch(ref, place), self._memory.view)

    def _fetch(self, ref: Any, place: int) -> list[Any]:
        try:
            return list(self._get(ref)[place : place + self._count])
        except Exception as error:  # of Ray's: its node is gone, and so are the buffers
            raise DecodeError(f"the result was lost after it had come: {error}") from error

    def keep(self) -> None:
        """Copy what lies in the object store, which is about to go; nothing if it was taken before."""
        with self._lock:
            if self._ref is not None:
                stream, _, place = self._wired
                ref, self._ref = self._ref, None
                self._wired = stream, tuple(map(bytes, self._fetch(ref, place))), -1

    def discard(self) -> None:
        """See Result."""
        self._ref = None


def _copy(buffer: bytes) -> memoryview:
    return memoryview(bytearray(buffer))
