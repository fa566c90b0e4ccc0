"""The stopwatch that a case holds, and what it has measured in one round."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Iterator

from benchmarks import proc


class Meter:
    """Measures one round; a case may take several named times in it.

    Attributes:
        warm_up: True in the round that is not counted; a case may verify more then.
        times: seconds of wall time by metric.
        parent_cpu: CPU seconds of the process that uses the pool, by metric.
        children_cpu: CPU seconds of all its descendants, by metric.
        values: numbers that are no durations (wake-ups, megabytes, …) by metric.
        samples: many durations of one kind, for percentiles, by metric.
    """

    def __init__(self, warm_up: bool = False) -> None:
        self.warm_up = warm_up
        self.times: dict[str, float] = {}
        self.parent_cpu: dict[str, float] = {}
        self.children_cpu: dict[str, float] = {}
        self.values: dict[str, float] = {}
        self.samples: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def measure(self, metric: str = "time") -> Iterator[None]:
        """Time the block, with the garbage of what came before collected first."""
        gc.collect()
        pid = os.getpid()
        parent, children = proc.tree_cpu_seconds(pid)
        start = time.perf_counter()
        yield
        self.times[metric] = self.times.get(metric, 0.0) + time.perf_counter() - start
        parent_after, children_after = proc.tree_cpu_seconds(pid)
        self.parent_cpu[metric] = self.parent_cpu.get(metric, 0.0) + parent_after - parent
        # Never below zero: the time of a child that was reaped by a child counts in ticks.
        self.children_cpu[metric] = self.children_cpu.get(metric, 0.0) + max(0.0, children_after - children)

    def subtract(self, seconds: float, metric: str = "time") -> None:
        """Take off what the case itself spent inside the block; the rest is the pool's, and never negative."""
        self.times[metric] = max(1e-6, self.times[metric] - seconds)

    def report(self) -> dict[str, object]:
        """Everything measured, ready for JSON."""
        return {key: value for key, value in vars(self).items() if key != "warm_up"}
