"""A timeline in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

The format: "Trace Event Format", Nicholas Duca and Dan Sinclair, 2016. Used of it: complete events (``X``) with ``ts``
and ``dur`` in microseconds, which nest by time within a thread; instant events (``i``); metadata (``M``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from tpool.timeline.spans import LifeSpan, Spans, TaskSpan

__all__ = ["chrome_json"]

Event = dict[str, Any]

# Made-up numbers: a lane is a place in the pool, which more than one process may have held.
_PID = 1
_FIRST_CALLER_TID = 10_000


def chrome_json(title: str, spans: Spans) -> str:
    """The whole file as text.

    Args:
        title: names the process.
        spans: what happened.
    """
    threads = {name: _FIRST_CALLER_TID + number for number, name in enumerate(spans.threads())}
    events: list[Event] = [_metadata("process_name", 0, title)]
    for order, (tid, name) in enumerate([*((tid, name) for name, tid in threads.items()), *_named(spans.workers())]):
        events.append(_metadata("thread_name", tid, name))
        events.append({"ph": "M", "name": "thread_sort_index", "pid": _PID, "tid": tid, "args": {"sort_index": order}})
    for life in spans.lives:
        events += _life_events(life)
    for encoding in spans.encodings:
        arguments = {"bytes": encoding.nbytes}
        events.append(_span("encode", "transfer", threads[encoding.thread], encoding.began, encoding.ended, arguments))
    for reading in spans.readings:
        arguments = {"bytes": reading.nbytes}
        events.append(_span("definitions", "transfer", reading.worker, reading.began, reading.ended, arguments))
    for task in spans.tasks:
        events += _task_events(task)
    whole = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"dropped_events": spans.dropped}}
    return json.dumps(whole, separators=(",", ":"))


def _named(workers: Iterable[int]) -> Iterator[tuple[int, str]]:
    for worker in workers:
        yield worker, f"worker {worker}"


def _metadata(kind: str, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": _PID, "tid": tid, "args": {"name": name}}


def _span(name: str, category: str, tid: int, began: float, ended: float, arguments: Event) -> Event:
    # Rounded as points in time, so that what ends where the next begins still does, and parts stay within their whole.
    start = round(began * 1e6, 3)
    duration = round(round(ended * 1e6, 3) - start, 3)
    return {"ph": "X", "name": name, "cat": category, "pid": _PID, "tid": tid, "ts": start, "dur": duration,
            "args": arguments}  # fmt: skip


def _task_events(task: TaskSpan) -> Iterator[Event]:
    """The task, and within it what it was sent and what it sent."""
    arguments: Event = {"task": task.task}
    if task.fate:
        arguments["fate"] = task.fate
    tid = task.worker
    yield _span(task.call, "task", tid, task.began, task.ended, arguments)
    if task.fate:
        return
    yield _span("receive", "transfer", tid, task.began, task.received, {"bytes": task.received_nbytes})
    yield _span("send", "transfer", tid, task.ran, task.ended, {"bytes": task.sent_nbytes})


def _life_events(life: LifeSpan) -> Iterator[Event]:
    if life.ready is not None:
        yield _span("start", "worker", life.worker, life.began, life.ready, {"process": life.pid})
    if life.ended is not None:
        yield {"ph": "i", "name": life.why, "cat": "worker", "pid": _PID, "tid": life.worker, "s": "t",
               "ts": round(life.ended * 1e6, 3), "args": {"process": life.pid}}  # fmt: skip
