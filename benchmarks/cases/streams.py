"""Long streams of large tensors: generators in, results consumed fast or slowly, and the memory that it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks import tasks
from benchmarks.case import Bench, Case
from benchmarks.peers.base import ARGUMENTS, STREAM

#: 128 images of 3×224×224 bytes.
BATCH_NBYTES = 128 * 3 * 224 * 224


class Clones:
    """A generator of clones of one tensor that knows how long it took itself.

    Attributes:
        seconds: the time spent cloning. Written by whichever thread draws, read after the stream has ended.
    """

    def __init__(self, base: torch.Tensor, count: int) -> None:
        self._base = base
        self._count = count
        self.seconds = 0.0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self._count):
            start = time.perf_counter()
            made = self._base.clone()
            self.seconds += time.perf_counter() - start
            yield made


def run_generator(bench: Bench) -> None:
    """Clones in, numbers out; the time of cloning taken off."""
    clones = Clones(torch.ones(bench.integer("nbytes") // 4), bench.integer("items"))
    with bench.meter.measure():
        answers = list(bench.pool.imap_unordered(tasks.take, iter(clones)))
    assert len(answers) == bench.integer("items")
    bench.meter.subtract(clones.seconds)


def run_batches(bench: Bench) -> None:
    """Batches in and out; a consumer that needs `consumer_ms` for each, which is taken off."""
    base = torch.zeros(bench.integer("nbytes"), dtype=torch.uint8)
    pause = bench.real("consumer_ms") / 1000
    paused, seen = 0.0, 0
    with bench.meter.measure():
        for batch in bench.pool.imap(tasks.invert, iter(Clones(base, bench.integer("items")))):
            assert batch[-1].item() == 255
            seen += 1
            start = time.perf_counter()
            if pause:
                time.sleep(pause)
            paused += time.perf_counter() - start
    assert seen == bench.integer("items")
    bench.meter.subtract(paused)


def cases() -> Iterator[Case]:
    """The cases of this module."""
    yield Case(
        name="generator-16MB",
        description="clones of a 16 MB tensor from a generator, imap_unordered, the generator's own time taken off",
        run=run_generator,
        params={"items": 32, "nbytes": 16 << 20},
        quick={"items": 6},
        needs=frozenset({STREAM, ARGUMENTS}),
    )
    for speed, pause in (("fast", 0.0), ("slow", 10.0)):
        yield Case(
            name=f"stream-19MB-{speed}",
            description=f"batches of 19 MB in and out, imap, {speed} consumer (its own time taken off)",
            run=run_batches,
            # 200, not 500, because pools that read ahead keep the whole stream: 7.7 GB here. 500 are below.
            params={"items": 200, "nbytes": BATCH_NBYTES, "directions": 2, "consumer_ms": pause},
            quick={"items": 6} if speed == "fast" else None,
            needs=frozenset({STREAM, ARGUMENTS}),
            rounds=3,
            memory=True,
        )
    for items in (50, 100, 200, 500):
        yield Case(
            name=f"stream-length-{items}",
            description=f"memory held by a stream of {items} batches of 19 MB, slow consumer",
            run=run_batches,
            params={"items": items, "nbytes": BATCH_NBYTES, "directions": 2, "consumer_ms": 10.0},
            needs=frozenset({STREAM, ARGUMENTS}),
            rounds=1,
            warm_up=False,
            memory=True,
            group="stream-length",
            x=items,
        )
