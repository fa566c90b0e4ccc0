"""Draws an ``imap``'s input and pickles it, in a thread of its own, only as fast as results are consumed.

A slow, blocked or raising iterable, and slow user reducers, are this thread's affair and stall nobody else.

Back-pressure: at most ``window`` items are drawn and not yet consumed, and beyond a handful no more than
``max_nbytes``; shared memory that several items refer to counts once. The default window is a few tasks per worker;
only tasks that run for microseconds get a wider one, since they travel many to a message, as far as their items and
results take no more than 32 MB.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tpool.basket import Basket
from tpool.handler import Handler
from tpool.messages import JobCancelled, JobSealed, JobWithdrawn
from tpool.outstanding import Outstanding
from tpool.results import Failure
from tpool.streams import Stream
from tpool.task import JobId, Task
from tpool.tensors.plain import light_nbytes

# Enough that no worker waits while the consumer is a little slow; each one more holds one more result in memory.
TASKS_PER_WORKER = 4
# For microsecond tasks: several messages' worth for each worker, and of the very short ones this many seconds' worth,
# up to so many. More would gain a little, and draw more of an endless input than anybody expects.
WIDE_TASKS_PER_WORKER = 512
WIDE_SECONDS = 10e-3
MAX_TASKS_PER_WORKER = 896
WIDE_TASK_SECONDS = 200e-6
# But no more than whose items and results hold so many bytes. Streams of 4 KB and 150 KB tensors to no-ops take half
# the time that they take with a few tasks per worker.
WIDE_NBYTES = 32 << 20
# After so many chunks, or one of so many bytes, the limit is looked at again.
LOOK_AGAIN = 16
LOOK_AGAIN_WIDE = 64
LOOK_NBYTES = 64 << 10


class Feeder:
    """Feeds one stream; everything but what its caller calls runs in its own thread.

    Args:
        handler: takes the tasks.
        job: the job they belong to.
        stream: tells how far the consumer is.
        iterable: the input.
        processes: tells how many workers there are.
        packs: whether light items of short tasks may go in spans.
    """

    def __init__(
        self,
        handler: Handler,
        job: JobId,
        stream: Stream,
        iterable: Iterable[Any],
        processes: Callable[[], int],
        packs: bool,
    ) -> None:
        self._handler = handler
        self._job = job
        self._stream = stream
        self._iterable: Iterable[Any] | None = iterable
        self._processes = processes
        self._packs = packs
        self._basket: Basket | None = None  # takes the next item, if that is light
        self._wide = False  # tasks of microseconds, few enough of which are large
        self._heavy = False  # the latest item that might have been light was not
        self._drawn = 0
        self._claim = threading.Lock()  # taken for good by whoever says what becomes of the job
        self._outstanding = Outstanding()
        self._latest_nbytes = 0  # by how much an item of the latest chunk made that more

    def start(self, chunksize: int, window: int | None, max_nbytes: int) -> None:
        """Start the thread. It is daemonic: an input that blocks for ever must not hold up the interpreter's exit.

        Args:
            chunksize: how many items are drawn together. As in the standard library, where the input raises in the
                middle of a chunk its error takes the place of the whole chunk.
            window: the most items drawn and not consumed; None adapts.
            max_nbytes: the most bytes drawn and not consumed, beyond one item per worker.
        """
        self._chunksize = chunksize
        self._window = window
        self._max_nbytes = max_nbytes
        threading.Thread(target=self._run, name=f"tpool-feeder-{self._job}", daemon=True).start()

    def give_up(self) -> None:
        """The caller was interrupted while it made the job, in ``start`` perhaps: feed no more of it."""
        self._stream.cancel()
        if self._claim.acquire(blocking=False):  # else the thread runs and will notice
            self._handler.post(JobWithdrawn(self._job))

    def _run(self) -> None:
        if not self._claim.acquire(blocking=False):
            return
        stream = self._stream
        assert self._iterable is not None
        try:
            iterator = iter(self._iterable)
            self._iterable = None
            self._feed(iterator)
        except BaseException as error:  # the input's own; it takes the place of the item it should have given
            stream.resolve(self._drawn, Failure(error))
            self._drawn += 1
        finally:
            if stream.cancelled:
                self._handler.post(JobCancelled(self._job))
            stream.set_length(self._drawn)
            self._handler.post(JobSealed(self._job))

    def _feed(self, iterator: Iterator[Any]) -> None:
        stream = self._stream
        while not stream.cancelled:
            room = self._room()
            if room <= 0:
                self._wait_for_room()
                continue
            if self._wide and self._packs and self._chunksize == 1 and not self._heavy:
                if not self._draw_light(iterator, min(room, LOOK_AGAIN_WIDE)):
                    return
                continue
            # The limit is looked at again soon: it follows what the items and tasks turn out to be. The first eight
            # large ones must not take all the memory that their results will need.
            for _ in range(min(room, LOOK_AGAIN if self._wide else 1)):
                chunk = list(itertools.islice(iterator, self._chunksize))
                if not chunk:
                    return
                count, before = len(chunk), self._outstanding.nbytes
                chunk.reverse()
                while chunk:  # each item is held by nobody but its payload once it was sent
                    self._send(chunk.pop())
                added = self._outstanding.nbytes - before
                self._latest_nbytes = added // count
                if added > LOOK_NBYTES:
                    break
            self._heavy = False

    def _draw_light(self, iterator: Iterator[Any], count: int) -> bool:
        """Draw items for the basket, up to one that does not belong there; False when there are no more."""
        light = drawn = nbytes = 0
        more = True
        for item in itertools.islice(iterator, count):
            drawn += 1
            item_nbytes = light_nbytes(item)
            if not item_nbytes or self._stream.cancelled:
                break
            if self._basket is None:
                self._basket = Basket(self._job, self._drawn, self._handler.visit)
            self._basket.put(item)
            self._drawn += 1
            light += 1
            nbytes += item_nbytes
        else:
            more = drawn == count
        if light:
            self._outstanding.add_light(light, nbytes)
            self._latest_nbytes = nbytes // light
        if light < drawn:
            before = self._outstanding.nbytes
            self._heavy = True
            self._send(item)
            self._latest_nbytes = self._outstanding.nbytes - before
        return more

    def _send(self, item: Any) -> None:
        self._basket = None
        index = self._drawn
        self._drawn += 1
        handler = self._handler
        try:
            payload = handler.engine.encode(item, patient=self._stream.may_take)
        except BaseException as error:
            self._outstanding.add(0, ())
            self._stream.resolve(index, Failure(error))
            return
        self._outstanding.add(*handler.engine.weigh(payload))
        if self._wide:
            handler.submit_soon(Task(self._job, index, payload))
        else:
            handler.post(Task(self._job, index, payload))

    def _limit(self) -> int:
        """How many items may be outstanding now."""
        processes = self._processes()
        outstanding = self._drawn - self._stream.consumed
        self._outstanding.keep(outstanding)
        result_nbytes = self._stream.result_nbytes
        each = int(result_nbytes or 0)
        item_nbytes = self._outstanding.mean_nbytes
        fits = (item_nbytes + each) * TASKS_PER_WORKER * processes <= WIDE_NBYTES
        self._wide = fits and 0 < self._stream.seconds < WIDE_TASK_SECONDS
        if self._window is not None:
            limit = self._window
        elif self._wide:
            each_worker = min(MAX_TASKS_PER_WORKER, int(WIDE_SECONDS / self._stream.seconds))
            limit = max(WIDE_TASKS_PER_WORKER, each_worker) * processes
            each_nbytes = max(1, item_nbytes + self._stream.latest_nbytes)  # read once: the handler's thread writes it
            limit = max(TASKS_PER_WORKER * processes, min(limit, WIDE_NBYTES // each_nbytes))
        else:
            limit = TASKS_PER_WORKER * processes
        if result_nbytes is None:
            limit = min(limit, processes)  # nobody knows yet how large results are
        else:
            room = self._max_nbytes - self._outstanding.nbytes - each * outstanding
            each += self._latest_nbytes  # as if the next items were like the latest
            if room < each * (limit - outstanding):
                limit = min(limit, max(processes, outstanding + room // max(1, each)))
        return limit

    def _room(self) -> int:
        """How many chunks may be drawn now; the last of them may overshoot the limit by less than a chunk."""
        if self._stream.unbounded:
            self._outstanding.keep(1)
            return LOOK_AGAIN
        return -(-(self._limit() - self._drawn + self._stream.consumed) // self._chunksize)

    def _wait_for_room(self) -> None:
        stream = self._stream
        while not stream.cancelled:
            limit = self._limit()
            # Woken at a quarter free, not at each item: a switch of threads costs more than drawing an item.
            stream.feeder_waits_below = self._drawn - limit + max(1, limit // 4)
            if stream.unbounded or self._drawn - stream.consumed < limit:
                stream.feeder_waits_below = -1
                return
            stream.room.get()
