"""What callers hold of a whole map: the values of its chunks, put together when all are there."""

from __future__ import annotations

from typing import Any, TypeVar

from tpool.engine import Result
from tpool.futures import AsyncResult
from tpool.results import Failure, SharedFailure, decode

T = TypeVar("T")


class MapResult(AsyncResult[list[T]]):
    """The result of ``map_async`` and ``starmap_async``: a list, in the order of the input.

    The first failure to arrive is raised, once every chunk has its outcome.

    Args:
        args: see AsyncResult.
        ordered: whether the values stand in the order of the input, or in that in which their chunks arrived.
        kwds: see AsyncResult.
    """

    def __init__(self, *args: Any, ordered: bool = True, **kwds: Any) -> None:
        super().__init__(*args, **kwds)
        self._ordered = ordered
        # By chunk; guarded by the condition, since a chunk that cannot be pickled is failed by the caller's thread.
        self._chunks: dict[int, Result] = {}
        self._first_failure: Result | None = None
        self._expected: int | None = None

    def expect(self, chunks: int) -> None:
        """Say how many chunks there are; called once, by the caller's thread, when all are submitted."""
        with self._condition:
            self._expected = chunks
            self._announce_if_full()

    def resolve(self, index: int, result: Result) -> None:
        """See Sink."""
        with self._condition:
            if self._complete or index in self._chunks:
                return
            self._chunks[index] = result
            if result.failed and self._first_failure is None:
                self._first_failure = result
            self._announce_if_full()

    def _announce_if_full(self) -> None:
        if not self._complete and self._expected is not None and len(self._chunks) >= self._expected:
            self._announce(self._first_failure is not None)

    def abandon(self, failure: Failure | SharedFailure) -> None:
        """See Sink."""
        with self._condition:
            if not self._complete:
                self._first_failure = self._first_failure or failure
                self._announce(True)

    def _discard(self) -> None:
        while self._chunks:
            self._chunks.popitem()[1].discard()

    def _decode_once(self) -> tuple[bool, Any]:
        chunks, self._chunks = self._chunks, {}
        failure = self._outcome or self._first_failure  # cancelled, or failed
        if failure is not None:
            for result in chunks.values():
                if result is not failure:
                    result.discard()
            return decode(failure)
        if len(chunks) != self._expected:
            return self._lost()
        values: list[Any] = []
        for index in range(len(chunks)) if self._ordered else list(chunks):  # which keeps the order of arrival
            succeeded, value = decode(chunks.pop(index))
            if not succeeded:
                for result in chunks.values():
                    result.discard()
                return False, value
            values += value
        return True, values
