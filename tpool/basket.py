"""Items of microsecond tasks, on their way from a stream's feeder to the handler.

    feeder ── put ──► Basket ── take ──► spans: tasks of many items, for the scheduler

To handle such items one by one costs more than to run them. They are not packed by the feeder, as its input may block
after any of them: what was drawn until then must not wait. They lie here until the handler comes, which takes all
there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tpool.task import JobId, Task

__all__ = ["FULL", "SPAN_ITEMS", "Basket"]

SPAN_ITEMS = 64
"""The most items of a span. More: a little less work for each. Less: a span is cut more seldom, where its items go to
several workers at the end of a stream, or wait behind one that takes long."""

FULL = 64
"""So many items wait for nobody: the handler is woken even from a nap."""


class Basket:
    """Light items of one stream that stand behind each other; see ``light_nbytes`` for what is light.

    Shared data: ``_items`` is filled by the feeder and emptied by the handler, in atomic steps. Who puts something in
    looks at ``_announced`` afterwards; who takes clears that before looking for items: one of the two always notices.

    Args:
        job: the stream's.
        index: of the first item that will be put in.
        announce: called where the handler is to come: with this, and whether it is in a hurry.
    """

    __slots__ = ("_announce", "_announced", "_index", "_items", "_job")

    def __init__(self, job: JobId, index: int, announce: Callable[[Basket, bool], None]) -> None:
        self._job = job
        self._index = index
        self._announce = announce
        self._announced = False
        self._items: deque[Any] = deque()

    def put(self, item: object) -> None:
        """Add an item; by the feeder."""
        self._items.append(item)
        if not self._announced:
            self._announced = True
            self._announce(self, False)
        elif len(self._items) == FULL:
            self._announce(self, True)

    def take(self, encode: Callable[[tuple[Any, ...]], Any]) -> list[Task]:
        """Take all items out, in spans; by the handler.

        Args:
            encode: makes the payload of a span of these items.
        """
        self._announced = False
        items, tasks = self._items, []
        while count := min(len(items), SPAN_ITEMS):
            span = tuple([items.popleft() for _ in range(count)])
            tasks.append(Task(self._job, self._index, encode(span), count=count))
            self._index += count
        return tasks
