"""How a call becomes a job: its function and items are encoded, here in the caller's thread, and handed over.

Pool.apply, map, imap ─► Opener ─┬─ encode ─► engine
└─ open, submit ─► handler (imap: by way of a feeder)
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tpool.direct import call_directly
from tpool.engine import Encoded, Engine, Result
from tpool.feeder import Feeder
from tpool.futures import AsyncResult
from tpool.gate import Gate
from tpool.handler import Handler
from tpool.limits import Limits
from tpool.local.faltering import Faltering
from tpool.local.seeding import SeededCall, SeededItems
from tpool.local.wire import Mode
from tpool.map_result import MapResult
from tpool.messages import JobCancelled, JobSealed, JobWithdrawn
from tpool.results import Failure, Sink, check_may_wait
from tpool.streams import IMapIterator, Stream
from tpool.task import JobId, Task

# As in the standard library: enough chunks that the last ones even out, few enough that each is worth a message.
CHUNKS_PER_WORKER = 4


class Opener:
    """Opens the jobs of one pool; from any thread.

    Args:
        engine: encodes.
        handler: takes the jobs.
        gate: raises if the pool takes no more work, and knows how many workers there are.
        max_tasks: after how many calls a worker is replaced; None for never.
        stream_nbytes: what one ``imap`` may hold in items drawn but not consumed.
        seed: what the random numbers of all tasks begin with; None leaves them to the workers.
    """

    def __init__(
        self,
        engine: Engine,
        handler: Handler,
        gate: Gate,
        max_tasks: int | None,
        stream_nbytes: int,
        seed: int | None = None,
    ) -> None:
        self._engine = engine
        self._handler = handler
        self._gate = gate
        self._max_tasks = max_tasks
        self._stream_nbytes = stream_nbytes
        self._seed = seed
        self._call_numbers = itertools.count()  # next() is atomic

    def open_single(
        self,
        result: AsyncResult[Any],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwds: Mapping[str, Any],
        limits: Limits,
    ) -> None:
        """Make a job of one call."""
        try:
            payload = self.encode(func, args, kwds, limits)
        except Exception as error:  # as in the standard library: the result says so, not this call
            result.resolve(0, Failure(error))
            return
        self.open_encoded(result, payload, limits)

    def encode(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwds: Mapping[str, Any], limits: Limits
    ) -> Encoded:
        """A whole call, ready to be sent."""
        if self._seed is not None:
            func = SeededCall(func, self._seed, next(self._call_numbers))
        return self._engine.encode_call(_guarded(func, limits), args, dict(kwds))

    def call_directly(self, payload: Encoded, story: str) -> Result | None:
        """Make a call now if a worker is to be had for it; see ``direct.py``.

        Raises:
            RuntimeError: in the handler's thread, which nobody may keep waiting.
        """
        check_may_wait(self._handler.thread, story)
        return call_directly(self._engine, self._handler, payload, story)

    def open_encoded(self, result: AsyncResult[Any], payload: Encoded, limits: Limits) -> None:
        """Make a job of one call that was encoded."""
        job = self._open_result(result)
        try:
            with self._gate.lock:
                self._gate.check_running()
                self._handler.open_single(job, result, Mode.APPLY, payload, limits.rules)
        except BaseException:
            self._handler.post(JobWithdrawn(job))
            raise

    def open_map(
        self,
        result: MapResult[Any],
        func: Callable[..., Any],
        items: Sequence[Any],
        size: int,
        limits: Limits,
    ) -> None:
        """Make a job of a map, ``size`` items to a task."""
        if self._seed is not None:
            func, items = SeededItems(func, self._seed, next(self._call_numbers)), list(enumerate(items))
        try:
            function = self._engine.encode(_guarded(func, limits))
        except Exception as error:
            result.resolve(0, Failure(error))
            result.expect(1)
            result.finish()
            return
        job = self._open_result(result)
        try:
            self._open(job, result, Mode.MAP, function, 1, limits)
            self._submit_chunks(job, result, items, size)
            self._handler.post(JobSealed(job))
        except BaseException:
            self._handler.post(JobWithdrawn(job))
            raise

    def _submit_chunks(self, job: JobId, result: MapResult[Any], items: Any, size: int) -> None:
        count = -(-len(items) // size)
        for index in range(count):
            chunk = list(items[index * size : (index + 1) * size])
            try:
                payload = self._engine.encode(chunk)
            except Exception as error:  # this chunk's outcome; the others run
                result.resolve(index, Failure(error))
                continue
            self._handler.post(Task(job, index, payload, weight=len(chunk)))
        result.expect(count)

    def chunksize(self, count: int, chunksize: int | None) -> int:
        """How many of ``count`` items travel together."""
        if chunksize is None:
            chunksize = max(1, -(-count // (self._gate.processes * CHUNKS_PER_WORKER)))
        # A worker is replaced after so many calls, not so many chunks.
        return chunksize if self._max_tasks is None else min(chunksize, self._max_tasks)

    def open_stream(
        self,
        iterator: IMapIterator[Any],
        stream: Stream,
        func: Callable[..., Any],
        iterable: Iterable[Any],
        chunksize: int,
        buffersize: int | None,
        buffer_nbytes: int | None,
        limits: Limits,
    ) -> None:
        """Make a job of an ``imap``, and start its feeder."""
        if self._seed is not None:
            func = SeededItems(func, self._seed, next(self._call_numbers))
            iterable = _Numbered(iterable)
        try:
            function = self._engine.encode(_guarded(func, limits))
        except Exception as error:
            stream.resolve(0, Failure(error))
            stream.set_length(1)
            stream.finish()
            return
        window = None if buffersize is None else max(buffersize, chunksize)
        if chunksize > 1 and window is None:
            window = 2 * chunksize * self._gate.processes
        gate = self._gate
        nbytes = self._stream_nbytes if buffer_nbytes is None else min(self._stream_nbytes, buffer_nbytes)
        job = self._handler.new_job(stream.story)
        stream.server = self._handler.thread
        packs = self._engine.packs_items and limits.rules is None and self._max_tasks is None
        feeder = Feeder(self._handler, job, stream, iterable, lambda: gate.processes, packs)
        try:
            self._open(job, stream, Mode.CALL, function, chunksize, limits)
            weakref.finalize(iterator, _abandon, stream, self._handler, job).atexit = False
            feeder.start(chunksize, window, nbytes)
        except BaseException:
            feeder.give_up()
            raise

    def _open_result(self, result: AsyncResult[Any]) -> JobId:
        """A job for this result."""
        result._server = self._handler.thread
        job = result._job = self._handler.new_job(result.story)
        return job

    def _open(self, job: JobId, sink: Sink, mode: Mode, function: Any, batch: int, limits: Limits) -> None:
        with self._gate.lock:
            self._gate.check_running()
            self._handler.open_job(job, sink, mode, function, batch, limits.rules)

    def cancel(self, job: JobId) -> None:
        """Nobody can ask for the rest of a job any more."""
        self._handler.post(JobCancelled(job))


class _Numbered:
    """An input with the place of each item; what ``iter`` raises is raised where the input is drawn."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self._iterable)


def _guarded(func: Callable[..., Any], limits: Limits) -> Callable[..., Any]:
    """The function as it is sent: one that tells exceptions to be tried again from others, if there are any."""
    return Faltering(func, limits.caught) if limits.caught else func


def _abandon(stream: Stream, handler: Handler, job: JobId) -> None:
    """The iterator was dropped: nobody can take the rest. Runs in a finalizer, so it takes no lock."""
    stream.cancel()
    handler.post(JobCancelled(job))
    stream.discard()
