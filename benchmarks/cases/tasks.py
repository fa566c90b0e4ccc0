"""Tasks without tensors: throughput, latency and uneven durations."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from benchmarks import tasks
from benchmarks.case import WORKERS, Bench, Case
from benchmarks.peers.base import APPLY, ARGUMENTS, STREAM
from benchmarks.stats import percentile


def run_imap_unordered(bench: Bench) -> None:
    """No-ops one by one, in any order."""
    with bench.meter.measure():
        count = sum(1 for _ in bench.pool.imap_unordered(tasks.noop, range(bench.integer("items"))))
    assert count == bench.integer("items")


def run_imap(bench: Bench) -> None:
    """No-ops one by one, in order."""
    with bench.meter.measure():
        count = sum(1 for _ in bench.pool.imap(tasks.noop, range(bench.integer("items"))))
    assert count == bench.integer("items")


def run_map(bench: Bench) -> None:
    """No-ops in the pool's own chunks."""
    with bench.meter.measure():
        answers = bench.pool.map(tasks.noop, range(bench.integer("items")))
    assert len(answers) == bench.integer("items")


def run_singly(bench: Bench) -> None:
    """No-ops by ``map``, of which each is a task of its own."""
    with bench.meter.measure():
        answers = bench.pool.map(tasks.noop, range(bench.integer("items")), 1)
    assert len(answers) == bench.integer("items")


def run_apply(bench: Bench) -> None:
    """Round trips, one after another."""
    samples = []
    with bench.meter.measure():
        for _ in range(bench.integer("items")):
            start = time.perf_counter()
            bench.pool.apply(tasks.noop, None)
            samples.append(time.perf_counter() - start)
    bench.meter.times["p50"] = percentile(samples, 50)
    bench.meter.times["p99"] = percentile(samples, 99)
    bench.meter.samples["apply"] = [percentile(samples, each) for each in range(101)]


def run_uneven(bench: Bench) -> None:
    """Sleeping tasks of one length, but one; the time as a multiple of the best order without foresight."""
    unit = bench.real("unit_ms") / 1000
    durations = [unit] * bench.integer("items")
    durations[bench.integer("position")] = unit * bench.integer("longer")
    with bench.meter.measure():
        bench.pool.map(tasks.sleep, durations)
    bench.meter.values["over_best"] = bench.meter.times["time"] / best_in_order(durations, WORKERS)


def best_in_order(durations: Sequence[float], workers: int) -> float:
    """When the last task ends if each worker takes the next task the moment it is free, at no cost."""
    free_at = [0.0] * workers
    for duration in durations:
        first = min(range(workers), key=free_at.__getitem__)
        free_at[first] += duration
    return max(free_at)


def cases() -> Iterator[Case]:
    """The cases of this module."""
    yield Case(
        name="noop-imap-unordered",
        description="no-ops, imap_unordered(chunksize=1)",
        run=run_imap_unordered,
        params={"items": 20_000},
        quick={"items": 1_000},
    )
    yield Case(
        name="noop-imap",
        description="no-ops, imap(chunksize=1)",
        run=run_imap,
        params={"items": 20_000},
        needs=frozenset(),
    )
    yield Case(
        name="noop-map",
        description="no-ops, map in default chunks",
        run=run_map,
        params={"items": 100_000},
        quick={"items": 20_000},
        needs=frozenset({ARGUMENTS}),
    )
    yield Case(
        name="noop-map-singly",
        description="no-ops, map(chunksize=1)",
        run=run_singly,
        params={"items": 10_000},
        quick={"items": 1_000},
        needs=frozenset({ARGUMENTS}),
        rounds=3,
    )
    yield Case(
        name="apply",
        description="apply of a no-op, round trip",
        run=run_apply,
        params={"items": 1000},
        quick={"items": 100},
        needs=frozenset({APPLY}),
    )
    for position in (0, 20, 63):
        yield Case(
            name=f"uneven-{position}",
            description=f"64 sleeping tasks, number {position} twenty times longer, map",
            run=run_uneven,
            params={"items": 64, "unit_ms": 10, "longer": 20, "position": position},
            quick={"unit_ms": 3} if position == 20 else None,
            needs=frozenset({ARGUMENTS, STREAM}),
            rounds=3,
            per="",
        )
