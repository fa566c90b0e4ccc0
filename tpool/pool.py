"""The public API: validate, chunk, submit.

    Pool.map ─ encode ─► handler (scheduler, engine) ─► results

A pool is used from any thread of the process that made it, and of no other.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from tpool import options
from tpool.errors import PoolEndedError, PoolTerminatedError, WorkerStartError
from tpool.feeder import Feeder
from tpool.handler import Handler
from tpool.local.engine import LocalEngine
from tpool.local.setup import Settings, check_platform, refuse_fork_after_cuda
from tpool.local.wire import Mode
from tpool.messages import JobCancelled, JobId, JobSealed, PoolClosed, Task
from tpool.results import AsyncResult, Callbacks, Failure, MapResult, Sink
from tpool.scheduler import Scheduler
from tpool.stats import PoolStats
from tpool.streams import IMapIterator, Stream

T = TypeVar("T")

# As in the standard library: enough chunks that the last ones even out, few enough that each is worth a message.
CHUNKS_PER_WORKER = 4
# What an imap may hold in items drawn but not consumed, as a share of the pool's shared memory: its results need room.
STREAM_SHARE = 4

_pool_numbers = itertools.count(1)


class Pool:
    """A pool of worker processes that moves tensors through shared memory by handle.

    The API of ``multiprocessing.Pool``; what is better is listed in the README. May be used from any thread of the
    process that made it; workers are started at once, in the background.

    Args:
        processes: how many workers; None for the CPUs this process may use (affinity and cgroup quota).
        initializer: called as ``initializer(*initargs)`` in each worker before its first task. If it raises, the pool
            ends and every call raises that exception.
        initargs: its arguments. Locks, queues and pipes of ``multiprocessing`` may travel here.
        maxtasksperchild: after how many calls a worker is replaced by a fresh one; None for never.
        context: how workers start: ``"forkserver"`` (the default: forked from a clean process that has imported
            torch), ``"fork"``, ``"spawn"``, or a context object of ``multiprocessing``.
        preload: names of modules that the default start method imports once, before it forks workers.
        memory: the most shared memory the pool may use at a time, in bytes or as text such as ``"2GB"``; None for
            three quarters of what this machine or container has.
        sharing: ``"share"``: both sides see one memory, as in torch; ``"copy"``: each has its own. See ``KINDS.md``.

    Raises:
        ValueError: an argument is out of range.
        PlatformError: this system cannot run tpool.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: str | BaseContext | None = None,
        *,
        preload: Iterable[str] = (),
        memory: int | str | None = None,
        sharing: str = "share",
    ) -> None:
        check_platform()
        self._pid = os.getpid()
        self._state = "INIT"
        # Orders close() against calls of other threads: nothing is opened after it. A signal handler may close, too.
        self._lock = threading.RLock()
        self._max_tasks = options.check_max_tasks(maxtasksperchild)
        settings = Settings(
            processes=options.check_processes(processes),
            method=options.start_method(context),
            initializer=options.check_initializer(initializer),
            initargs=tuple(initargs),
            preload=options.check_preload(preload),
            memory_nbytes=options.parse_nbytes(memory),
            sharing=options.check_sharing(sharing),
        )
        refuse_fork_after_cuda(settings.method)
        self._processes = settings.processes
        self._stream_nbytes = settings.memory_nbytes // STREAM_SHARE
        name = f"tpool-{next(_pool_numbers)}"
        self._callbacks = Callbacks(name)
        self._engine = LocalEngine(settings)
        scheduler = Scheduler(settings.processes, self._max_tasks)
        self._handler = Handler(self._engine, scheduler, self._callbacks, name)
        description = f"<tpool.Pool pool_size={settings.processes} of process {self._pid}>"
        weakref.finalize(self, self._handler.forget_pool, description).atexit = False
        self._handler.start()
        self._state = "RUN"

    def __repr__(self) -> str:
        return f"<{type(self).__module__.partition('.')[0]}.Pool state={self._state} pool_size={self._processes}>"

    def __reduce__(self) -> str:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    # One call -------------------------------------------------------------------------------------------------------

    def apply(self, func: Callable[..., T], args: Iterable[Any] = (), kwds: Mapping[str, Any] | None = None) -> T:
        """Call ``func(*args, **kwds)`` in a worker and wait for what it returns.

        Raises:
            Exception: what the call raised, with the remote traceback as its cause.
            WorkerLostError: the worker died while it ran this call.
        """
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult[T]:
        """Call ``func(*args, **kwds)`` in a worker; returns at once.

        Args:
            func: what to call.
            args: its positional arguments.
            kwds: its keyword arguments.
            callback: called with the value, in the pool's callback thread, before ``get`` returns.
            error_callback: called with the exception instead, if the call fails.

        Raises:
            PoolEndedError: the pool takes no more work.
        """
        self._check_running()
        result: AsyncResult[T] = AsyncResult(
            self, f"apply({options.describe(func)})", self._callbacks, callback, error_callback
        )
        try:
            payload = self._engine.encode((func, tuple(args), dict(kwds or {})))
        except Exception as error:  # as in the standard library: the result says so, not this call
            result.resolve(0, Failure(error))
            return result
        with self._lock:
            self._check_running()
            self._handler.open_single(result, Mode.APPLY, payload)
        return result

    # Map ------------------------------------------------------------------------------------------------------------

    def map(self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int | None = None) -> list[T]:
        """Call ``func(item)`` for each item, in the workers; returns the values in order.

        Args:
            func: what to call.
            iterable: the items; read to its end at once.
            chunksize: how many items travel together and answer as one; None chooses.

        Raises:
            Exception: what the first call to fail raised; the other calls still run.
            WorkerLostError: a worker died while it ran one of the chunks.
        """
        return self._wait_for_map(Mode.MAP, func, iterable, chunksize)

    def map_async(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[T]:
        """As ``map``, but returns as soon as the items are pickled; see ``apply_async`` for the callbacks."""
        return self._map_async(Mode.MAP, func, iterable, chunksize, callback, error_callback)[0]

    def starmap(self, func: Callable[..., T], iterable: Iterable[Any], chunksize: int | None = None) -> list[T]:
        """As ``map``, with ``func(*item)``."""
        return self._wait_for_map(Mode.STARMAP, func, iterable, chunksize)

    def starmap_async(
        self,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[T]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> MapResult[T]:
        """As ``map_async``, with ``func(*item)``."""
        return self._map_async(Mode.STARMAP, func, iterable, chunksize, callback, error_callback)[0]

    def _wait_for_map(
        self, mode: Mode, func: Callable[..., T], iterable: Iterable[Any], chunksize: int | None
    ) -> list[T]:
        result, job = self._map_async(mode, func, iterable, chunksize, None, None)
        try:
            return result.get()
        except BaseException:
            # Interrupted, perhaps: nobody can ask for the rest any more.
            if not result.ready() and job is not None:
                self._handler.post(JobCancelled(job))
            raise

    def _map_async(
        self,
        mode: Mode,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int | None,
        callback: Callable[[list[T]], object] | None,
        error_callback: Callable[[BaseException], object] | None,
    ) -> tuple[MapResult[T], JobId | None]:
        self._check_running()
        items = iterable if isinstance(iterable, (list, tuple)) else list(iterable)
        size = self._chunksize(len(items), chunksize)
        result: MapResult[T] = MapResult(
            self, f"{mode.name.lower()}({options.describe(func)})", self._callbacks, callback, error_callback
        )
        try:
            function = self._engine.encode(func)
        except Exception as error:
            result.resolve(0, Failure(error))
            result.expect(1)
            return result, None
        job = self._open_job(result, mode, function)
        try:
            self._submit_chunks(job, result, items, size)
        except BaseException:
            self._handler.post(JobCancelled(job))
            raise
        finally:
            self._handler.post(JobSealed(job))
        return result, job

    def _submit_chunks(self, job: JobId, result: MapResult[Any], items: Any, size: int) -> None:
        count = -(-len(items) // size)
        for index in range(count):
            chunk = list(items[index * size : (index + 1) * size])
            try:
                payload = self._engine.encode(chunk)
            except Exception as error:  # this chunk's outcome; the others run
                result.resolve(index, Failure(error))
                continue
            self._handler.submit(Task(job, index, payload, weight=len(chunk)))
        result.expect(count)

    def _chunksize(self, count: int, chunksize: int | None) -> int:
        if chunksize is None:
            chunksize = max(1, -(-count // (self._processes * CHUNKS_PER_WORKER)))
        elif chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize}")
        # A worker is replaced after so many calls, not so many chunks.
        return chunksize if self._max_tasks is None else min(chunksize, self._max_tasks)

    # Streams --------------------------------------------------------------------------------------------------------

    def imap(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
    ) -> IMapIterator[T]:
        """Call ``func(item)`` for each item; an iterator gives the values in the order of the input.

        The input is drawn only as fast as results are consumed, so it may be infinite, and results are held only for
        what was drawn.

        Args:
            func: what to call.
            iterable: the input; drawn and pickled in a thread of its own.
            chunksize: how many items may travel together before it is known how long a task runs.
            buffersize: the most items drawn and not consumed; None for a few per worker.
        """
        return self._imap(func, iterable, chunksize, buffersize, ordered=True)

    def imap_unordered(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
    ) -> IMapIterator[T]:
        """As ``imap``, but the values come in the order in which the calls finish."""
        return self._imap(func, iterable, chunksize, buffersize, ordered=False)

    def _imap(
        self, func: Callable[[Any], T], iterable: Iterable[Any], chunksize: int, buffersize: int | None, ordered: bool
    ) -> IMapIterator[T]:
        self._check_running()
        if chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize}")
        if buffersize is not None and buffersize < 1:
            raise ValueError(f"buffersize must be 1 or more, not {buffersize}")
        kind = "imap" if ordered else "imap_unordered"
        stream = Stream(f"{kind}({options.describe(func)})", ordered)
        iterator: IMapIterator[T] = IMapIterator(stream, self)
        try:
            function = self._engine.encode(func)
        except Exception as error:
            stream.resolve(0, Failure(error))
            stream.set_length(1)
            return iterator
        job = self._open_job(stream, Mode.CALL, function, chunksize)
        weakref.finalize(iterator, _abandon, stream, self._handler, job).atexit = False
        window = None if buffersize is None else max(buffersize, chunksize)
        if chunksize > 1 and window is None:
            window = 2 * chunksize * self._processes
        feeder = Feeder(self._handler, job, stream, iterable, self._processes)
        feeder.start(chunksize, window, self._stream_nbytes)
        return iterator

    def _open_job(self, sink: Sink, mode: Mode, function: Any, batch: int = 1) -> JobId:
        with self._lock:
            self._check_running()
            return self._handler.open_job(sink, mode, function, batch)

    # The end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; workers exit when the work is done."""
        self._check_process()
        with self._lock:
            if self._state == "RUN":
                self._state = "CLOSE"
                self._handler.post(PoolClosed())

    def terminate(self) -> None:
        """Stop at once: kill the workers; calls without a result raise ``PoolTerminatedError``. Waits for the end."""
        self._check_process()
        self._state = "TERMINATE"
        if not self._handler.ended:
            self._handler.terminate()
            self._handler.join(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait until all work is done, callbacks included, and all workers are gone.

        Args:
            timeout: seconds to wait at most; None waits for as long as it takes.

        Raises:
            ValueError: neither ``close`` nor ``terminate`` was called before.
            multiprocessing.TimeoutError: it took longer than ``timeout``.
        """
        self._check_process()
        if self._state == "RUN" and not self._handler.ended:
            raise ValueError("Pool is still running")
        # The standard library has drawn all of an imap's input by now; ours is drawn for whoever consumes. If nobody
        # does, there would be no end.
        self._handler.lift_back_pressure()
        if not (self._handler.join(timeout) and self._callbacks.join(timeout)):
            raise multiprocessing.TimeoutError(f"the pool did not end within {timeout} seconds")

    def __enter__(self) -> Pool:
        self._check_running()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.terminate()

    def stats(self) -> PoolStats:
        """What the pool has done so far; from any thread."""
        handler, traffic = self._handler, self._engine.traffic
        return PoolStats(handler.tasks_done, handler.workers_lost, traffic.moved_nbytes, traffic.piped_nbytes)

    # Checks ---------------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise PoolEndedError(
                f"this pool belongs to process {self._pid}, and this is process {os.getpid()}, forked from it; "
                "make a pool of its own here"
            )

    def _check_running(self) -> None:
        self._check_process()
        error = self._handler.error
        if error is not None:
            raise WorkerStartError("Pool not running: its workers could not start") from error.take()
        if self._state != "RUN":
            raise PoolEndedError("Pool not running")
        if self._handler.ended:
            raise PoolTerminatedError("Pool not running: it was terminated")


def _abandon(stream: Stream, handler: Handler, job: JobId) -> None:
    """The iterator was dropped: nobody can take the rest. Runs in a finalizer, so it takes no lock."""
    stream.cancel()
    handler.post(JobCancelled(job))
    stream.discard()
