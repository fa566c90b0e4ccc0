"""How costs grow: with workers, with tensors per message, with bytes per tensor, and with work per tensor."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import tasks
from benchmarks.case import Bench, Case
from benchmarks.cases import tensors
from benchmarks.peers.base import ARGUMENTS, STREAM


def run_sleepers(bench: Bench) -> None:
    """Sleeping tasks, one by one; what counts is the caller's CPU time per task."""
    count = bench.integer("items")
    with bench.meter.measure():
        seen = sum(1 for _ in bench.pool.imap_unordered(tasks.sleep, [bench.real("sleep_ms") / 1000] * count))
    assert seen == count
    bench.meter.values["parent_cpu_us"] = 1e6 * bench.meter.parent_cpu["time"] / count


def run_lists(bench: Bench) -> None:
    """Messages of many tiny tensors."""
    count = bench.integer("tensors")
    with bench.meter.measure():
        lengths = [
            len(each) for each in bench.pool.imap_unordered(tasks.tensor_list, [count] * bench.integer("items"))
        ]
    assert lengths == [count] * bench.integer("items")


def run_break_even(bench: Bench) -> None:
    """The same work with the pool and in a serial loop."""
    seconds = bench.real("work_us") * 1e-6
    items = [(each, seconds) for each in tensors.fresh_tensors(bench)]
    with bench.meter.measure("serial"):
        for item in items:
            tasks.work(item)
    with bench.meter.measure():
        bench.pool.map(tasks.work, items)


def cases() -> Iterator[Case]:
    """The cases of this module."""
    for workers in (2, 4, 8, 16, 32, 64):
        yield Case(
            name=f"scaling-workers-{workers}",
            description=f"sleeping tasks on {workers} workers: the caller's CPU time per task",
            run=run_sleepers,
            params={"workers": workers, "items": 40 * workers, "sleep_ms": 20.0},
            needs=frozenset({ARGUMENTS, STREAM}),
            # Pools that start a fresh interpreter per worker would import torch 64 times on two cores.
            only=frozenset(
                {
                    "tpool",
                    "tpool-ray",
                    "torch",
                    "torch-fs",
                    "multiprocessing",
                    "futures",
                    "mpire",
                    "pebble",
                    "billiard",
                }
            ),
            rounds=3,
            group="scaling-workers",
            x=workers,
        )
    for count in (1, 10, 100, 1_000, 10_000, 100_000):
        yield Case(
            name=f"scaling-tensors-{count}",
            description=f"messages of {count} tensors of 64 bytes as result",
            run=run_lists,
            params={"tensors": count, "items": 200 if count <= 100 else 4},
            rounds=3,
            group="scaling-tensors",
            x=count,
        )
    for power in (10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30):
        nbytes = 1 << power
        yield Case(
            name=f"scaling-size-{nbytes}",
            description=f"tensors of {nbytes} bytes as result, consumed as they come",
            run=tensors.run_result_stream,
            params={"nbytes": nbytes, "items": max(2, min(500, (64 << 20) // nbytes))},
            rounds=3,
            group="scaling-size",
            x=nbytes,
        )
    for work in (5, 10, 20, 50, 100, 200, 500, 1000, 2000):
        yield Case(
            name=f"break-even-{work}",
            description=f"{work} µs of work on each 150 KB tensor: two workers against a serial loop",
            run=run_break_even,
            params={"work_us": work, "items": 200, "nbytes": 150_000},
            needs=frozenset({ARGUMENTS}),
            rounds=5,
            group="break-even",
            x=work,
        )
