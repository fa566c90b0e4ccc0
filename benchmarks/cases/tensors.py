"""Tensors and arrays by size and direction: as arguments, as results, and both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import tasks
from benchmarks.case import Bench, Case
from benchmarks.peers.base import ARGUMENTS, STREAM


class Size(NamedTuple):
    """A tensor size and how many of them a round sends (about a second of torch's time, much less if quick)."""

    label: str
    nbytes: int
    items: int
    quick_items: int | None


SIZES = (
    Size("4KB", 4 << 10, 2000, 100),
    Size("150KB", 150_000, 400, 50),
    Size("1MB", 1 << 20, 128, 16),
    Size("16MB", 16 << 20, 16, 4),
    Size("256MB", 256 << 20, 3, None),
)


def fresh_tensors(bench: Bench) -> list[torch.Tensor]:
    """Tensors that no pool has seen: a pool that shares moves them, and the second send would be cheaper."""
    return [torch.ones(bench.integer("nbytes") // 4) for _ in range(bench.integer("items"))]


def run_argument(bench: Bench) -> None:
    """``map`` over tensors, a number back."""
    items = fresh_tensors(bench)
    function = tasks.take_verified if bench.meter.warm_up else tasks.take
    with bench.meter.measure():
        answers = bench.pool.map(function, items)
    assert list(answers) == [items[0].numel()] * len(items)


def run_result(bench: Bench) -> None:
    """``map`` over sizes, tensors back."""
    sizes = [bench.integer("nbytes")] * bench.integer("items")
    with bench.meter.measure():
        made = bench.pool.map(tasks.tensor, sizes)
    assert len(made) == len(sizes)
    assert all(tasks.stamped(each) for each in made)


def run_both(bench: Bench) -> None:
    """``map`` over tensors, tensors of the same size back."""
    items = fresh_tensors(bench)
    with bench.meter.measure():
        made = bench.pool.map(tasks.exchange, items)
    assert len(made) == len(items)
    assert all(tasks.stamped(each) for each in made)


def run_result_stream(bench: Bench) -> None:
    """Tensors back from ``imap_unordered``, each looked at and dropped as it comes."""
    sizes = [bench.integer("nbytes")] * bench.integer("items")
    arrived = tasks.stamped if bench.meter.warm_up else tasks.begun
    with bench.meter.measure():
        good = sum(arrived(each) for each in bench.pool.imap_unordered(tasks.tensor, sizes))
    assert good == len(sizes)


def run_first_and_second_pass(bench: Bench) -> None:
    """A new pool, and tensors that the caller keeps: all shared memory is fresh, then all is in place."""
    items = fresh_tensors(bench)
    with bench.own_pool() as pool:
        pool.map(tasks.noop, range(8))  # the workers are up
        with bench.meter.measure("first"):
            pool.map(tasks.take, items, 1)
        with bench.meter.measure("second"):
            pool.map(tasks.take, items, 1)


def run_resend(bench: Bench) -> None:
    """One tensor, sent before, sent again and again; one task each, so that no chunk sends it just once."""
    item = torch.ones(bench.integer("size_nbytes") // 4)
    bench.pool.map(tasks.take, [item, item], 1)
    with bench.meter.measure():
        answers = list(bench.pool.imap_unordered(tasks.take, [item] * bench.integer("sends")))
    assert answers == [item.numel()] * bench.integer("sends")


def run_dicts(bench: Bench) -> None:
    """Dicts of small tensors back, each dropped as it comes."""
    count = bench.integer("tensors")
    with bench.meter.measure():
        lengths = [
            len(each) for each in bench.pool.imap_unordered(tasks.tensor_dict, [count] * bench.integer("items"))
        ]
    assert lengths == [count] * bench.integer("items")


def run_arrays(bench: Bench) -> None:
    """``map`` over numpy arrays, arrays back."""
    items = [np.ones(bench.integer("nbytes") // 4, np.float32) for _ in range(bench.integer("items"))]
    with bench.meter.measure():
        made = bench.pool.map(tasks.exchange_array, items)
    assert [each.nbytes for each in made] == [items[0].nbytes] * len(items)
    assert all(each[0] == 1.0 for each in made)


class Direction(NamedTuple):
    """Which way tensors travel."""

    label: str
    text: str
    run: Callable[[Bench], None]
    copies: int
    needs: frozenset[str]


_DIRECTIONS = (
    Direction("argument", "as argument", run_argument, 1, frozenset({ARGUMENTS})),
    Direction("result", "as result", run_result, 1, frozenset()),
    Direction("both", "as argument and result", run_both, 2, frozenset({ARGUMENTS})),
)


def _by_size() -> Iterator[Case]:
    for size in SIZES:
        for way in _DIRECTIONS:
            yield Case(
                name=f"tensor-{size.label}-{way.label}",
                description=f"{size.label} tensors {way.text}, map",
                run=way.run,
                params={"items": size.items, "nbytes": size.nbytes, "directions": way.copies},
                quick={"items": size.quick_items}
                if size.quick_items and (way.copies == 2 or size is SIZES[0])
                else None,
                needs=way.needs,
                rounds=3 if size.nbytes > 100 << 20 else 7,
                group=f"tensor-{way.label}",
                x=size.nbytes,
            )


def cases() -> Iterator[Case]:
    """The cases of this module."""
    yield from _by_size()
    for size in SIZES[2:4]:
        yield Case(
            name=f"tensor-{size.label}-result-stream",
            description=f"{size.label} tensors as result, imap_unordered, consumed as they come",
            run=run_result_stream,
            params={"items": size.items, "nbytes": size.nbytes},
            quick={"items": size.quick_items or size.items} if size.label == "16MB" else None,
            needs=frozenset(),
        )
    big = SIZES[3].nbytes
    yield Case(
        name="two-passes-16MB",
        description="16 MB tensors that the caller keeps: first pass of a new pool (all memory fresh), second pass",
        run=run_first_and_second_pass,
        params={"items": 16, "nbytes": big},
        needs=frozenset({ARGUMENTS}),
        pool="own",
        rounds=5,
    )
    for label, nbytes in (("16MB", big), ("1MB", 1 << 20), ("64KB", 64 << 10)):
        yield Case(
            name=f"resend-{label}",
            description=f"one {label} tensor, sent before, sent 200 times",
            run=run_resend,
            params={"sends": 200, "size_nbytes": nbytes},
            per="sends",
            quick={"sends": 10} if label == "16MB" else None,
            needs=frozenset({ARGUMENTS, STREAM}),
        )
    yield Case(
        name="dicts",
        description="dicts of 100 tensors of 1 KB as result, imap_unordered, consumed as they come",
        run=run_dicts,
        params={"items": 1000, "tensors": 100},
        quick={"items": 4},
        rounds=3,
        deadline=180,
    )
    yield Case(
        name="numpy",
        description="numpy arrays in and out, map",
        run=run_arrays,
        params={"items": 4, "nbytes": 100_000_000, "directions": 2},
        quick={"items": 2, "nbytes": 20_000_000},
        needs=frozenset({ARGUMENTS}),
        rounds=5,
    )
