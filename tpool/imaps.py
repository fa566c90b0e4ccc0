"""The public calls that give values one by one, as they are consumed: a part of ``Pool``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tpool import options
from tpool.arguments import check_func, check_items
from tpool.limits import POOL, Limits, PoolDefault, RetryOn
from tpool.local.starring import Starred
from tpool.maps import Calls
from tpool.progress import MeteredStream, Show
from tpool.streams import IMapIterator, Stream

T = TypeVar("T")


@dataclass(slots=True)
class StreamCall:
    """What is called on every item, and how."""

    name: str
    func: Callable[..., Any]
    ordered: bool
    star: bool
    limits: Limits
    progress: bool | Show
    buffersize: int | None
    buffer_nbytes: int | str | None


class StreamCalls(Calls):
    """``imap`` and its kin. Pools have these methods; nothing else does."""

    def imap(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
        buffer_nbytes: int | str | None = None,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
        progress: bool | Show = False,
    ) -> IMapIterator[T]:
        """Call ``func(item)`` for each item; an iterator gives the values in the order of the input.

        The input is drawn only as fast as results are consumed, so it may be infinite, and results are held only for
        what was drawn. The iterator is an asynchronous one, too: ``async for value in pool.imap(...)``.

        >>> with tpool.Pool(2) as pool:
        ...     for value in pool.imap(abs, itertools.count(-3), buffersize=8, buffer_nbytes="100MB"):
        ...         print(value)
        ...         if value == 1:
        ...             break
        3
        2
        1

        >>> async def main():
        ...     with tpool.Pool(2) as pool:
        ...         return [value async for value in pool.imap(abs, [-1, -2])]
        >>> asyncio.run(main())
        [1, 2]

        Args:
            func: what to call.
            iterable: the input; drawn and pickled in a thread of its own.
            chunksize: how many items may travel together before it is known how long a task runs.
            buffersize: the most items drawn and not consumed; None for a few per worker, or where tasks take
                microseconds for as many as hold 32 MB with their results, 1,000 per worker at most.
            buffer_nbytes: about the most bytes of items and results drawn and not consumed, as a number or as text
                such as ``"2GB"``, but one item per worker at least; None for a quarter of the pool's ``memory``, in
                which only items count. Shared memory that several items refer to counts once.
            timeout: how many seconds a task may run, until its worker is killed; see ``Pool``.
            retries: how often a task is tried again; see ``Pool``.
            retry_on: after which exceptions.
            progress: True for a bar (of tqdm: items, rate, bytes moved, workers lost), or a callable that is given a
                ``tpool.Progress`` now and then, in the callback thread.

        Returns:
            An iterator over the values. What a call raised is raised in its place, and the iterator goes on; so may
            ``WorkerLostError`` and ``TaskTimeoutError`` be.

        Raises:
            ValueError: a number is out of range.
            TypeError: an argument is of the wrong kind.
            PoolEndedError: the pool takes no more work.
        """
        limits = self._limits.override(timeout, retries, retry_on)
        call = StreamCall("imap", func, True, False, limits, progress, buffersize, buffer_nbytes)
        return self._stream(call, iterable, chunksize)

    def imap_unordered(
        self,
        func: Callable[[Any], T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
        buffer_nbytes: int | str | None = None,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
        progress: bool | Show = False,
    ) -> IMapIterator[T]:
        """As ``imap``, but the values come in the order in which the calls finish."""
        limits = self._limits.override(timeout, retries, retry_on)
        call = StreamCall("imap_unordered", func, False, False, limits, progress, buffersize, buffer_nbytes)
        return self._stream(call, iterable, chunksize)

    def istarmap(
        self,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
        buffer_nbytes: int | str | None = None,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
        progress: bool | Show = False,
    ) -> IMapIterator[T]:
        """As ``imap``, with ``func(*item)``.

        >>> with tpool.Pool(2) as pool:
        ...     list(pool.istarmap(pow, zip([2, 3, 4], [5, 2, 1])))
        [32, 9, 4]
        """
        limits = self._limits.override(timeout, retries, retry_on)
        call = StreamCall("istarmap", func, True, True, limits, progress, buffersize, buffer_nbytes)
        return self._stream(call, iterable, chunksize)

    def istarmap_unordered(
        self,
        func: Callable[..., T],
        iterable: Iterable[Any],
        chunksize: int = 1,
        *,
        buffersize: int | None = None,
        buffer_nbytes: int | str | None = None,
        timeout: float | PoolDefault | None = POOL,
        retries: int | PoolDefault = POOL,
        retry_on: RetryOn | PoolDefault = POOL,
        progress: bool | Show = False,
    ) -> IMapIterator[T]:
        """As ``imap_unordered``, with ``func(*item)``."""
        limits = self._limits.override(timeout, retries, retry_on)
        call = StreamCall("istarmap_unordered", func, False, True, limits, progress, buffersize, buffer_nbytes)
        return self._stream(call, iterable, chunksize)

    def _stream(self, call: StreamCall, iterable: Iterable[Any], chunksize: int) -> IMapIterator[T]:
        self._gate.check_running()
        check_func(call.func)
        check_items(iterable)
        size = options.check_chunksize(chunksize) or 1
        window = options.check_buffersize(call.buffersize)
        nbytes = options.check_buffer_nbytes(call.buffer_nbytes)
        story = f"{call.name}({options.describe(call.func)})"
        total = operator.length_hint(iterable, -1) if hasattr(iterable, "__len__") else -1
        meter = self._meter(call.progress, story, None if total < 0 else total)
        arguments = (story, call.ordered, nbytes is not None)
        stream = Stream(*arguments) if meter is None else MeteredStream(meter, *arguments)
        iterator: IMapIterator[T] = IMapIterator(stream, self)
        func = Starred(call.func) if call.star else call.func
        self._opener.open_stream(iterator, stream, func, iterable, size, window, nbytes, call.limits)
        return iterator
