"""Puts together what the workers and the caller's threads wrote down, as a timeline."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

from tpool import failures
from tpool.engine import WorkerLoss
from tpool.handler import Handler
from tpool.local.crew import Life
from tpool.local.encodings import Encoding
from tpool.local.looks import Look
from tpool.local.trace import DEFINITIONS, Record
from tpool.task import JobId
from tpool.timeline.spans import EncodeSpan, LifeSpan, ReadSpan, Spans, TaskSpan
from tpool.timeline.timeline import Timeline

__all__ = ["collect_timeline"]

FEEDER = "tpool-feeder-"


def collect_timeline(handler: Handler, look: Look) -> Timeline:
    """What is known now; the pool goes on meanwhile.

    Args:
        handler: knows what the calls are.
        look: at the workers.
    """
    collector = _Collector(handler, look.began)
    for slot in range(len(look.slots)):
        records, gone, lives, running = look.trace(slot)
        collector.add_worker(slot, records, gone, lives, running)
    encodings, gone = look.encodings()
    collector.add_encodings(encodings, gone)
    workers = len(collector.spans.workers())
    return Timeline(f"tpool.Pool, {workers} worker{'s' if workers != 1 else ''}", collector.spans)


class _Collector:
    def __init__(self, handler: Handler, began: float) -> None:
        self._names = handler.names or {}
        self._began = began
        self._stopped = handler.terminated_at
        self._now = monotonic()
        self.spans = Spans()

    def _call(self, job: int) -> str:
        return self._names.get(JobId(job), "an earlier call")

    def add_worker(
        self,
        slot: int,
        records: Iterable[Record],
        gone: int,
        lives: Iterable[Life],
        running: tuple[int, int, float] | None,
    ) -> None:
        """One place in the pool."""
        self.spans.dropped += gone
        zero = self._began
        for job, index, began, ended, decoded, ran, came, sent in records:
            if job == DEFINITIONS:
                self.spans.readings.append(ReadSpan(slot, began - zero, ended - zero, came))
                continue
            times = began - zero, decoded - zero, ran - zero, ended - zero
            self.spans.tasks.append(TaskSpan(slot, self._call(job), index, *times, came, sent))
        if running is not None:
            self._add_unfinished(slot, running, self._now, "running")
        for life in lives:
            if life.cut is not None and life.ended is not None:
                self._add_unfinished(slot, life.cut, life.ended, "lost" if self._is_lost(life) else "stopped")
            self._add_life(slot, life)

    def _add_unfinished(self, slot: int, running: tuple[int, int, float], ended: float, fate: str) -> None:
        job, index, began = running
        began, ended = began - self._began, max(began, ended) - self._began
        self.spans.tasks.append(TaskSpan(slot, self._call(job), index, began, began, ended, ended, fate=fate))

    def _add_life(self, slot: int, life: Life) -> None:
        zero, loss = self._began, life.loss
        why = failures.tell(loss) if isinstance(loss, WorkerLoss) else ""
        ready, ended = (None if time is None else time - zero for time in (life.ready, life.ended))
        self.spans.lives.append(LifeSpan(slot, life.pid, life.began - zero, ready, ended, why, self._is_lost(life)))

    def _is_lost(self, life: Life) -> bool:
        """It did not leave by itself, nor with its pool."""
        ended, loss = life.ended, life.loss
        return ended is not None and ended < self._stopped and isinstance(loss, WorkerLoss) and loss.exitcode != 0

    def add_encodings(self, encodings: Iterable[Encoding], gone: int) -> None:
        """What the caller's threads did. Each stream has a feeder; those that do not overlap share a lane."""
        self.spans.dropped += gone
        last: dict[str, float] = {}
        for encoding in encodings:
            if encoding.thread.startswith(FEEDER):
                last[encoding.thread] = encoding.ended
        lanes: list[float] = []
        lane_of: dict[str, str] = {}
        for thread, began, ended, nbytes in encodings:
            if thread in last and thread not in lane_of:
                number = next((n for n, end in enumerate(lanes) if end <= began), len(lanes))
                lanes[number : number + 1] = [last[thread]]
                lane_of[thread] = f"feeder {number + 1}"
            name = lane_of.get(thread, thread)
            self.spans.encodings.append(EncodeSpan(name, began - self._began, ended - self._began, nbytes))
