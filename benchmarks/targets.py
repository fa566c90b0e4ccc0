"""What tpool has to reach, as data: each promise names a case, a measured time or value, and a bound.

Bounds against another pool are medians of ratios taken pair by pair. Bounds against the machine use the limits that
the same run measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["speedup", "time_ratio", "bandwidth", "limit_time", "value", "memory_batches", "break_even"]


@dataclass(frozen=True)
class Target:
    """One promise.

    Attributes:
        case: name of the case (for ``break_even``: the group of cases).
        kind: how `bound` is meant:
            ``speedup``: at least so many times faster than `against`;
            ``time_ratio``: at most so many times the time of `against`;
            ``bandwidth``: bytes moved per second, at least this fraction of the limit `against`;
            ``limit_time``: at most so many times the limit `against`, a duration;
            ``value``: the value `metric` is at most this;
            ``memory_batches``: at most so many items' worth of memory at the peak;
            ``break_even``: the work at which the pool beats a loop, at least so many times less than `against`'s.
        bound: the number.
        metric: which time or value of the case.
        against: a pool, or a limit of the machine.
        pool: whose promise it is.
    """

    case: str
    kind: Kind
    bound: float
    metric: str = "time"
    against: str = "torch"
    pool: str = "tpool"


def _speedups() -> Iterator[Target]:
    table = {"4KB": (30, 40, 40), "150KB": (12, 20, 12), "1MB": (8, 8, 8), "16MB": (4, 4, 4), "256MB": (2, 2, 2)}
    for size, bounds in table.items():
        for direction, bound in zip(("argument", "result", "both"), bounds, strict=True):
            yield Target(f"tensor-{size}-{direction}", "speedup", bound)
    for direction in ("argument", "result", "both"):
        yield Target(f"tensor-4KB-{direction}", "speedup", 12, against="torch-fs")
        yield Target(f"tensor-4KB-{direction}", "speedup", 1, against="ray")
        yield Target(f"tensor-256MB-{direction}", "bandwidth", 1, against="fresh_copy")
    for size, bound in {"1MB": 8, "16MB": 4}.items():
        yield Target(f"tensor-{size}-result-stream", "speedup", bound)
        yield Target(f"tensor-{size}-result-stream", "bandwidth", 0.5, against="warm_copy")


TARGETS: tuple[Target, ...] = (
    *_speedups(),
    Target("two-passes-16MB", "speedup", 1, metric="first"),
    Target("two-passes-16MB", "speedup", 20, metric="second"),
    Target("generator-16MB", "speedup", 4),
    Target("generator-16MB", "speedup", 4, pool="tpool-copy"),
    Target("resend-16MB", "speedup", 10),
    Target("noop-imap-unordered", "speedup", 8),
    Target("noop-imap", "speedup", 7),
    Target("noop-map", "speedup", 0.5),
    Target("apply", "time_ratio", 0.6, metric="p50"),
    Target("apply", "time_ratio", 1, metric="p99"),
    Target("stream-19MB-fast", "speedup", 3),
    Target("stream-19MB-slow", "speedup", 3),
    # The window is the pool's own choice; held to be at most eight batches each way.
    Target("stream-19MB-fast", "memory_batches", 16),
    Target("stream-19MB-slow", "memory_batches", 16),
    Target("stream-length-500", "memory_batches", 16),
    Target("dicts", "speedup", 20),
    Target("numpy", "speedup", 8, against="multiprocessing"),
    Target("numpy", "bandwidth", 0.5, against="warm_copy"),
    *(Target(f"uneven-{position}", "value", 1.10, metric="over_best") for position in (0, 20, 63)),
    Target("startup-second", "time_ratio", 1),
    Target("startup-second-1GB", "time_ratio", 1),
    # One import of torch, which overlaps with the caller; the rest is starting an interpreter and forking.
    Target("startup-first", "limit_time", 1.2, against="import_torch"),
    Target("respawn", "time_ratio", 1),
    Target("idle", "value", 0, metric="wakeups"),
    # The benchmark's own thread needs some hundred microseconds to read the counters.
    Target("idle", "value", 1, metric="cpu_ms"),
    Target("worker-memory", "value", 8, metric="uss_mb"),
    Target("close", "time_ratio", 1),
    Target("terminate", "time_ratio", 1),
    Target("break-even", "break_even", 6),
    *(Target(f"tensor-{size}-both", "speedup", 5, against="ray", pool="tpool-ray") for size in ("1MB", "16MB")),
    Target("noop-map-singly", "speedup", 10, against="ray", pool="tpool-ray"),
    *(Target(f"uneven-{at}", "value", 1.10, metric="over_best", pool="tpool-ray") for at in (0, 20, 63)),
)
