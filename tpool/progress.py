"""How far a call is: counted where its results arrive, shown by the callback thread.

    handler ─► resolve ─► MeteredMap, MeteredStream ─► Meter.add ─► callback thread ─► bar or callable

Showing is user code, or as slow: it runs in the callback thread, and what arrives while it runs is shown together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar

from tpool.engine import Result
from tpool.map_result import MapResult
from tpool.results import Callbacks, Failure, Results, SharedFailure, Sink
from tpool.stats import PoolStats
from tpool.streams import Stream
from tpool.task import JobId
from tpool.waiting import Flag

T = TypeVar("T")

# How long a map waits for its last progress to be shown, so that it stands before what the caller prints next. Longer
# would let a display that hangs hold the caller up; he has his values already.
SHOW_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a call is; what a ``progress=`` callable is given.

    Attributes:
        done: items that have an outcome, failures included.
        total: items in all; None where the input does not say how many it has.
        seconds: since the call began.
        moved_nbytes: bytes that the pool moved by handle since then, for all its calls.
        workers_lost: workers that the pool lost since then.
        finished: whether this is the last there will be of this call.
        waiting: what workers wait for before they can start, in words; empty if for nothing. Told on Ray, where a
            cluster may have no room for them yet.
    """

    done: int
    total: int | None
    seconds: float
    moved_nbytes: int
    workers_lost: int
    finished: bool
    waiting: str = ""


Show = Callable[[Progress], object]


class Meter:
    """Counts what is done of one call.

    Args:
        show: called in the callback thread with the latest progress; not again once it has raised.
        callbacks: that thread.
        stats: tells what the pool has done.
        total: items in all, if known.
    """

    def __init__(self, show: Show, callbacks: Callbacks, stats: Callable[[], PoolStats], total: int | None) -> None:
        callbacks.prepare()
        self._show: Show | None = show
        self._callbacks = callbacks
        self._stats = stats
        self._total = total
        self._began = monotonic()
        self._before = stats()
        # Written by whoever brings results: the handler and, for items that cannot be sent, feeder and caller.
        self._lock = threading.Lock()
        self._done = 0
        self._over = False
        self._posted = False
        self._closed = Flag()
        self._waiting = ""

    def note(self, waiting: str) -> None:
        """Workers wait for this before they can start; empty: no longer."""
        self._waiting = waiting
        self._post()

    def add(self, items: int) -> None:
        """So many more items have their outcomes."""
        with self._lock:
            self._done += items
        self._post()

    def finish(self) -> None:
        """There will be no more."""
        self._over = True
        self._post()

    def wait_shown(self) -> None:
        """Wait until the last progress was shown, unless this is the thread that shows it."""
        if not self._callbacks.is_current():
            self._closed.wait(SHOW_SECONDS)

    def _post(self) -> None:
        with self._lock:
            posted, self._posted = self._posted, True
        if not posted:
            self._callbacks.post(self._tell)

    def _tell(self) -> None:
        with self._lock:
            self._posted = False
        over, show = self._over, self._show
        if show is None or self._closed.is_set():
            return
        now = self._stats()
        lost = now.workers_lost - self._before.workers_lost
        moved = now.moved_nbytes - self._before.moved_nbytes
        try:
            show(Progress(self._done, self._total, monotonic() - self._began, moved, lost, over, self._waiting))
        except BaseException:
            self._show = None
            raise  # to the log
        finally:
            if over or self._show is None:
                self._closed.set()


class _Metered:
    """Mixed into a sink whose meter hears of its end, and of what the pool waits for."""

    _meter: Meter

    def note(self, waiting: str) -> None:
        """See Meter."""
        self._meter.note(waiting)

    def finish(self) -> None:
        """See Sink."""
        self._meter.finish()

    def abandon(self, failure: Failure | SharedFailure) -> None:
        """See Sink."""
        self._meter.finish()
        super().abandon(failure)  # type: ignore[misc]  # the sink's


class MeteredMap(_Metered, MapResult[T]):
    """A MapResult that is counted.

    Args:
        meter: counts.
        items: how many there are.
        size: how many are in a chunk.
    """

    def __init__(self, meter: Meter, items: int, size: int, *args: Any, **kwds: Any) -> None:
        super().__init__(*args, **kwds)
        self._meter = meter
        self._items = items
        self._size = size

    def resolve(self, index: int, result: Result) -> None:
        """See Sink."""
        self._meter.add(max(0, min(self._size, self._items - index * self._size)))
        super().resolve(index, result)

    def wait_shown(self) -> None:
        """Wait until the last progress was shown; not for long."""
        self._meter.wait_shown()

    def give_up(self) -> None:
        """Nobody waits for this any more: show that it is over, though parts of it may still run."""
        self._meter.finish()
        self._meter.wait_shown()


class MeteredStream(_Metered, Stream):
    """A Stream that is counted.

    Args:
        meter: counts.
    """

    def __init__(self, meter: Meter, *args: Any, **kwds: Any) -> None:
        super().__init__(*args, **kwds)
        self._meter = meter

    def resolve(self, index: int, result: Result) -> None:
        """See Sink."""
        self._meter.add(1)
        super().resolve(index, result)

    def resolve_run(self, index: int, results: Results) -> None:
        """See Sink."""
        for offset, result in enumerate(results):
            self.resolve(index + offset, result)


def tell_waiting(sinks: Mapping[JobId, Sink], text: str) -> None:
    """Show with the progress of all calls what workers wait for before they can start."""
    for sink in list(sinks.values()):
        if isinstance(sink, _Metered):
            sink.note(text)


def check_progress(progress: bool | Show, story: str) -> Show | None:
    """What shows the progress: the user's callable, or a bar named ``story``; None for nothing.

    Raises:
        TypeError: it is neither a bool nor callable.
        ImportError: a bar is asked for, and tqdm is not installed.
    """
    if isinstance(progress, bool):
        return Bar(story) if progress else None
    if not callable(progress):
        raise TypeError(f"progress must be True, False or a callable that takes a tpool.Progress, not {progress!r}")
    return progress


class Bar:
    """A progress bar of tqdm, in a terminal or a notebook; belongs to the callback thread.

    Args:
        story: its name.
    """

    def __init__(self, story: str) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError(
                "progress=True needs tqdm: pip install tqdm; or pass a callable that takes a tpool.Progress"
            ) from error
        self._make = tqdm
        self._story = story
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        """Draw the bar anew."""
        if self._bar is None:
            self._bar = self._make(total=progress.total, desc=self._story)
        notes = [f"{progress.moved_nbytes / 1e6:.1f} MB moved"] if progress.moved_nbytes else []
        if progress.workers_lost:
            notes.append(f"{progress.workers_lost} workers lost")
        if progress.waiting:
            notes.append(progress.waiting.partition(":")[0])  # the whole is in the log
        self._bar.set_postfix_str(", ".join(notes), refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if progress.finished:
            self._bar.close()
