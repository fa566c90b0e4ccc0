"""The public API: validate, chunk, submit.

    Pool.map ─ encode ─► handler (scheduler, engine) ─► results

A pool is used from any thread of the process that made it, and of no other.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.context import BaseContext
from typing import Any, ParamSpec, TypeVar

from tpool import options
from tpool.arguments import check_args, check_callback, check_func, check_kwds
from tpool.batches import BatchCalls
from tpool.engine import Engine
from tpool.engines import EngineArguments, make_engine
from tpool.errors import WorkerLostError
from tpool.executor import PoolExecutor
from tpool.futures import AsyncResult
from tpool.gate import Gate
from tpool.handler import Handler
from tpool.imaps import StreamCalls
from tpool.limits import POOL, Limits, PoolDefault, RetryOn
from tpool.local.setup import check_platform
from tpool.messages import PoolClosed
from tpool.opening import Opener
from tpool.progress import tell_waiting
from tpool.ray.spec import RayEngine
from tpool.results import Callbacks, finish
from tpool.scheduler import START_GRACE_SECONDS, Scheduler
from tpool.seeing import Seen
from tpool.sizing import Sized
from tpool.task import JobId

P = ParamSpec("P")
T = TypeVar("T")

# What an imap may hold in items drawn but not consumed, as a share of the pool's shared memory: its results need room.
STREAM_SHARE = 4

LOG_SECONDS = 5.0
"""How long ``terminate`` waits for log records that the caller's handlers have not handled yet."""

_pool_numbers = itertools.count(1)


class Pool(StreamCalls, BatchCalls, Sized, Seen):
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
            three quarters of what this machine or container has. An ordered stream may go beyond it by one result for
            each worker, where later results hold the memory that the earlier one needs.
        sharing: ``"share"``: both sides see one memory, as in torch; ``"copy"``: each has its own. See ``KINDS.md``.
        timeout: how many seconds a task may run, the reading of its arguments included; None for any time. When it is
            over the worker is killed and replaced, and that task raises ``TaskTimeoutError``; no other is touched. A
            task is a call, or a chunk of calls where a ``chunksize`` is given to ``map``. Tasks with a time limit
            travel one by one, which costs throughput where they run for microseconds.
        retries: how often a task is tried again before its failure is told. What an attempt wrote into shared tensors
            stays written.
        retry_on: after which exceptions it is tried again, a class or several: ``WorkerLostError`` (the default),
            ``TaskTimeoutError``, or what the task raises.
        seed: gives each call on each item random numbers of its own in ``random``, ``torch`` and ``numpy``: the same
            in each run that makes the same calls in the same order, whatever the number of workers, the chunks, the
            order in which tasks run, or the retries. None: workers are seeded differently, and tasks not at all.
        worker_exit: called in each worker when it retires: after its last task when the pool was closed, after
            ``maxtasksperchild`` calls, or above ``max_memory``; not where it is killed, as by ``terminate``. If it
            raises, that is logged as a warning of the logger ``tpool``. ``get_worker_info().state`` is a place for
            what the initializer opened.
        threads: how many threads each worker may use for one operation of torch and of the OpenMP and BLAS libraries
            (of those that are loaded already only where threadpoolctl is installed). None: its share of the CPUs, for
            torch and libraries that are loaded later, unless a variable such as ``OMP_NUM_THREADS`` says otherwise.
        affinity: which CPUs workers may run on: True for one each, or a list of CPUs, or of sets of CPUs, that are
            given to one worker after the other, again from the start if there are more workers; None for all.
        devices: devices of torch, such as ``["cuda:0", "cuda:1"]``, given to one worker after the other in the same
            way. There it is the default device; ``get_worker_info().device`` names it.
        max_memory: a worker with more private memory than this after a task, in bytes or as text such as ``"2GB"``,
            is replaced by a fresh one. Shared memory does not count. None for any amount.
        max_cuda_memory: the same for GPUs: what torch's caching allocator has reserved in the worker after a task, on
            all of them together, in use or not. The CUDA context and what libraries allocate by themselves do not
            count. A worker whose CUDA tensors the caller still uses is replaced, but its memory stays as long.
        forward_logs: True, or a level such as ``"INFO"``: what workers log from that level on (True: the root
            logger's) is handled here, by the loggers of the same names, in a thread of the pool's; a record's
            ``processName`` and ``worker`` tell where it comes from. In the workers it replaces the root logger's
            handlers and level.
        timeline: True: write down when each task and transfer began and ended, for ``timeline()``. What is kept are
            the latest 65,536 tasks of each worker, in 4 MB of shared memory each (beyond ``memory``) that is used as
            they come, and as many of what the caller encoded; or as many as this number says.
        engine: what runs the workers: ``"local"``, processes of this machine; ``"ray"``, actors on a cluster; or a
            ``tpool.RayEngine`` that says where and with which resources. On Ray tensors travel by copy, a pool without
            ``processes`` is as large as the cluster, and what has no meaning there is refused.

    ``timeout``, ``retries`` and ``retry_on`` can be given to each call, too, which then go before these.

    Raises:
        TypeError: an argument is of the wrong kind.
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
        sharing: str | None = None,
        timeout: float | None = None,
        retries: int = 0,
        retry_on: RetryOn = WorkerLostError,
        seed: int | None = None,
        worker_exit: Callable[[], object] | None = None,
        threads: int | None = None,
        affinity: bool | Iterable[int | Iterable[int]] | None = None,
        devices: Iterable[str] | None = None,
        max_memory: int | str | None = None,
        max_cuda_memory: int | str | None = None,
        forward_logs: bool | int | str = False,
        timeline: bool | int = False,
        engine: str | RayEngine = "local",
    ) -> None:
        check_platform()
        self._limits = Limits(timeout, retries, retry_on)
        seed = options.check_seed(seed)
        max_tasks = options.check_max_tasks(maxtasksperchild)
        self._engine: Engine
        self._engine, count, memory_nbytes = make_engine(
            engine,
            EngineArguments(
                processes,
                initializer,
                initargs,
                context,
                preload,
                memory,
                sharing,
                worker_exit,
                threads,
                affinity,
                devices,
                max_memory,
                max_cuda_memory,
                forward_logs,
                timeline,
            ),
        )
        name = f"tpool-{next(_pool_numbers)}"
        self._callbacks = Callbacks(name)
        grace = START_GRACE_SECONDS if initializer is not None or worker_exit is not None else 0.0
        scheduler = Scheduler(count, max_tasks, grace)
        self._handler = Handler(self._engine, scheduler, self._callbacks, name)
        self._engine.tell_waiting = functools.partial(tell_waiting, self._handler.sinks)
        self._handler.names = {} if timeline else None
        self._gate = Gate(self._handler, count)
        self._opener = Opener(self._engine, self._handler, self._gate, max_tasks, memory_nbytes // STREAM_SHARE, seed)
        description = f"<tpool.Pool pool_size={count} of process {os.getpid()}>"
        weakref.finalize(self, self._handler.forget_pool, description).atexit = False
        self._handler.start()

    def __repr__(self) -> str:
        name = type(self).__module__.partition(".")[0]
        return f"<{name}.Pool state={self._gate.state} pool_size={self._gate.processes} {self._busy()}>"

    def __reduce__(self) -> str:
        raise NotImplementedError(
            "pool objects cannot be passed between processes or pickled: have the caller make the calls, or make a"
            " pool in the task (a method sends its object, too: keep the pool out of that)"
        )

    # One call -------------------------------------------------------------------------------------------------------

    def apply(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> T:
        """Call ``func(*args, **kwds)`` in a worker and wait; see ``apply_async``.

        >>> with tpool.Pool(1) as pool:
        ...     pool.apply(pow, (2, 3))
        8

        Returns:
            What the call returned.

        Raises:
            Exception: what the call raised, with the remote traceback as its cause.
            WorkerLostError: the worker died while it ran this call.
            TaskTimeoutError: the call ran for longer than ``timeout``.
            PoolEndedError: the pool takes no more work.
        """
        self._gate.check_running()
        check_func(func)
        limits = self._limits.override(timeout, retries, retry_on)
        story = f"apply({options.describe(func)})"
        payload = self._opener.encode(func, check_args(args), check_kwds(kwds), limits)
        if limits.rules is None:
            answer = self._opener.call_directly(payload, story)
            if answer is not None:
                value: T = finish(answer)
                return value
        result: AsyncResult[T] = AsyncResult(self, story, self._callbacks)
        self._opener.open_encoded(result, payload, limits)
        return result.get()

    def apply_async(
        self,
        func: Callable[..., T],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[T], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> AsyncResult[T]:
        """Call ``func(*args, **kwds)`` in a worker; returns at once.

        >>> with tpool.Pool(1) as pool:
        ...     result = pool.apply_async(time.sleep, (60,), timeout=0.1)
        ...     type(result.exception()).__name__
        'TaskTimeoutError'

        Args:
            func: what to call.
            args: its positional arguments.
            kwds: its keyword arguments.
            callback: called with the value, in the pool's callback thread, before ``get`` returns.
            error_callback: called with the exception instead, if the call fails.
            timeout: how many seconds a task may run, until its worker is killed; see ``Pool``.
            retries: how often a task is tried again; see ``Pool``.
            retry_on: after which exceptions.

        Returns:
            The result, which is there when the call is done; also a ``concurrent.futures.Future``, and awaitable.

        Raises:
            PoolEndedError: the pool takes no more work.
            TypeError: an argument is of the wrong kind.
            ValueError: an argument is out of range.
        """
        self._gate.check_running()
        check_func(func)
        limits = self._limits.override(timeout, retries, retry_on)
        story = f"apply({options.describe(func)})"
        args, kwds = check_args(args), check_kwds(kwds)
        check_callback("callback", callback)
        check_callback("error_callback", error_callback)
        result: AsyncResult[T] = AsyncResult(self, story, self._callbacks, callback, error_callback)
        self._opener.open_single(result, func, args, kwds, limits)
        return result

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[T]:
        """Call ``fn(*args, **kwargs)`` in a worker; returns at once, as ``concurrent.futures.Executor.submit``.

        >>> with tpool.Pool(2) as pool:
        ...     futures = [pool.submit(pow, 2, n) for n in (3, 4)]
        ...     [future.result() for future in futures]
        [8, 16]

        Args:
            fn: what to call.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            The result: a ``concurrent.futures.Future``, and awaitable.

        Raises:
            PoolEndedError: the pool takes no more work.
        """
        return self._submit(self._limits, fn, *args, **kwargs)

    def executor(
        self,
        *,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
    ) -> PoolExecutor:
        """A view of this pool as a ``concurrent.futures.Executor``, for ``loop.run_in_executor`` and libraries.

        >>> with tpool.Pool(2) as pool, pool.executor(timeout=60) as executor:
        ...     list(executor.map(pow, [2, 3], [5, 2]))
        [32, 9]

        Shutting it down waits for its calls and does not end the pool.

        Args:
            timeout: how many seconds each of its calls may run; see ``Pool``.
            retries: how often each is tried again; see ``Pool``.
            retry_on: after which exceptions.

        Raises:
            PoolEndedError: the pool takes no more work.
            TypeError: an argument is of the wrong kind.
            ValueError: an argument is out of range.
        """
        self._gate.check_running()
        limits = self._limits.override(timeout, retries, retry_on)
        return PoolExecutor(functools.partial(self._submit, limits))

    def _submit(self, limits: Limits, fn: Callable[..., T], *args: Any, **kwargs: Any) -> AsyncResult[T]:
        self._gate.check_running()
        check_func(fn)
        result: AsyncResult[T] = AsyncResult(self, f"apply({options.describe(fn)})", self._callbacks)
        self._opener.open_single(result, fn, args, kwargs, limits)
        return result

    def _cancel_job(self, job: JobId, kill: bool, answer: Callable[[bool], None] | None) -> bool:
        return self._handler.cancel_job(job, kill, answer)

    def _has_started(self, job: JobId) -> bool:
        return self._handler.has_started(job)

    # The end --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; workers exit when the work is done.

        Raises:
            PoolEndedError: this is a process that was forked from the pool's own.
        """
        self._gate.check_process()
        with self._gate.lock:
            if self._gate.state == "RUN":
                self._gate.state = "CLOSE"
                self._handler.post(PoolClosed())

    def terminate(self) -> None:
        """Stop at once: kill the workers; calls without a result raise ``PoolTerminatedError``. Waits for the end.

        Raises:
            PoolEndedError: this is a process that was forked from the pool's own.
        """
        self._gate.check_process()
        self._gate.state = "TERMINATE"
        if not self._handler.ended:
            self._handler.terminate()
            self._handler.join(None)
            self._join_logs(LOG_SECONDS)

    def join(self, timeout: float | None = None) -> None:
        """Wait until all work is done, callbacks included, and all workers are gone.

        Args:
            timeout: seconds to wait at most; None waits for as long as it takes.

        Raises:
            ValueError: neither ``close`` nor ``terminate`` was called before.
            multiprocessing.TimeoutError: it took longer than ``timeout``.
        """
        self._gate.check_process()
        if self._gate.state == "RUN" and not self._handler.ended:
            raise ValueError("Pool is still running; call close() before join() to let it finish, or terminate()")
        # The standard library has drawn all of an imap's input by now; ours is drawn for whoever consumes. If nobody
        # does, there would be no end.
        self._handler.lift_back_pressure()
        if not (self._handler.join(timeout) and self._callbacks.join(timeout)):
            raise multiprocessing.TimeoutError(f"the pool did not end within {timeout} seconds")
        self._join_logs(timeout)

    def _join_logs(self, timeout: float | None) -> None:
        if self._engine.logs is not None:
            self._engine.logs.join(timeout)

    def __enter__(self) -> Pool:
        self._gate.check_running()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.terminate()
