"""The public calls that show what a pool does: a part of ``Pool``."""

from __future__ import annotations

from typing import Any

from tpool import report
from tpool.engine import Engine
from tpool.handler import Handler
from tpool.maps import Calls
from tpool.stats import PoolStats
from tpool.timeline.timeline import Timeline
from tpool.tracing import collect_timeline

__all__ = ["Seen"]


class Seen(Calls):
    """``stats``, ``report``, and how a pool shows itself. Pools have these methods; nothing else does."""

    _engine: Engine
    _handler: Handler

    def stats(self) -> PoolStats:
        """What the pool has done so far, in all and by worker; from any thread, also after its end.

        >>> with tpool.Pool(2) as pool:
        ...     values = pool.map(abs, range(10), chunksize=1)
        ...     now = pool.stats()
        >>> now.tasks_done, sum(worker.tasks_done for worker in now.workers), now.restarts
        (10, 10, 0)
        """
        return report.collect_stats(self._handler, self._engine.look())

    def report(self, *, stacks: bool = True) -> str:
        """Who runs what, since when, and where in its code: a page of text that tells why a pool hangs.

        A worker tells the Python stacks of its threads and goes on; one that is stuck in C code tells its main
        thread's, by ``faulthandler``. It is asked by a signal, which C code may notice as an interrupted system call.
        One that is stopped, or not yet started, cannot answer: the page says so. What stands there is true of the
        moment in which it was read. From any thread.

        >>> with tpool.Pool(1) as pool:
        ...     result = pool.submit(time.sleep, 60)
        ...     while "runs" not in pool.report(stacks=False):
        ...         pass
        ...     print(pool.report(stacks=False).splitlines()[1].partition(": ")[2].partition(", for")[0])
        runs task 0 of apply(sleep)

        Args:
            stacks: ask each worker that is not idle where it is; takes up to a second for each that does not answer.
        """
        handler, look = self._handler, self._engine.look()
        return report.text_report(repr(self), handler, look, stacks=stacks)

    def timeline(self) -> Timeline:
        """What was done when, by each worker and in the caller; of a pool made with ``timeline=``. From any thread.

        May be asked for at any time, also after the pool's end; tasks that run are in it up to the moment.

        >>> with tpool.Pool(2, timeline=True) as pool:
        ...     values = pool.map(abs, range(10), chunksize=1)
        >>> timeline = pool.timeline()
        >>> timeline.save("timeline.json")  # for ui.perfetto.dev; .svg or .html for a picture
        >>> len(timeline.tasks), {task.call for task in timeline.tasks}, timeline.dropped
        (10, {'map(abs)'}, 0)

        Raises:
            ValueError: the pool was made without ``timeline=``.
        """
        if self._handler.names is None:
            raise ValueError("this pool writes no timeline; make it with Pool(..., timeline=True)")
        look: Any = self._engine.look()  # the local engine's: other engines refuse ``timeline=``
        return collect_timeline(self._handler, look)

    def _repr_html_(self) -> str:
        look = self._engine.look()
        return report.html_table(repr(self), self._handler, look, self.stats())

    def _busy(self) -> str:
        look = self._engine.look()
        busy = sum(doing.busy for doing in report.doings(self._handler, look))
        return f"busy={busy} done={look.tasks_done}"
