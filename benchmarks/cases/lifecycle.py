"""What a pool costs beside its tasks: start, replacement of workers, idling, memory, end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch

from benchmarks import proc, tasks
from benchmarks.case import WORKERS, Bench, Case
from benchmarks.peers.base import APPLY, ARGUMENTS, RECYCLE, TERMINATE


def run_startup(bench: Bench) -> None:
    """Open a pool and have the first result."""
    with bench.meter.measure():
        pool = bench.peer.open(WORKERS)
        pool.apply(tasks.noop, None)
    pool.close()


def run_startup_beside_memory(bench: Bench) -> None:
    """Likewise, by a caller that holds tensors."""
    held = [torch.ones(1 << 18) for _ in range(bench.integer("held"))]
    run_startup(bench)
    held.clear()


def run_respawn(bench: Bench) -> None:
    """Every task in a new worker."""
    with bench.own_pool(maxtasksperchild=1) as pool:
        pool.map(tasks.noop, range(WORKERS), 1)
        with bench.meter.measure():
            pool.map(tasks.noop, range(bench.integer("items")), 1)


def run_idle(bench: Bench) -> None:
    """Wake-ups and CPU time of all threads and processes of a pool that has nothing to do, but for this thread's."""
    bench.pool.map(tasks.noop, range(8))
    time.sleep(0.3)  # whatever the pool still has to tidy up is not idling
    pid = os.getpid()
    wakeups, cpu, own = proc.tree_wakeups(pid), sum(proc.tree_cpu_seconds(pid)), time.thread_time()
    time.sleep(bench.real("seconds"))
    # What this thread does is to go through /proc: 0.5 to 1.4 ms, more for more processes. It uses no pool meanwhile.
    cpu, own = sum(proc.tree_cpu_seconds(pid)) - cpu, time.thread_time() - own
    bench.meter.values["cpu_ms"] = 1000 * max(0.0, cpu - own)
    bench.meter.values["wakeups"] = proc.tree_wakeups(pid) - wakeups


def run_worker_memory(bench: Bench) -> None:
    """USS per worker after first tasks that used torch."""
    with bench.own_pool() as pool:
        pids = set(pool.map(tasks.pid_after_tensor, range(8), 1))
        sizes = [proc.unique_nbytes(pid) for pid in pids]
    bench.meter.values["uss_mb"] = sum(sizes) / len(sizes) / 1e6


def run_close(bench: Bench) -> None:
    """Close and join an idle pool."""
    pool = bench.peer.open(WORKERS)
    pool.map(tasks.noop, range(8), 1)
    with bench.meter.measure():
        pool.close()


def run_terminate(bench: Bench) -> None:
    """Terminate a pool whose workers are busy and which has more to do."""
    pool = bench.peer.open(WORKERS)
    pool.map(tasks.noop, range(8), 1)
    pool.submit(tasks.sleep, [60.0] * 4 * WORKERS)
    time.sleep(0.2)  # both workers have a task by now
    with bench.meter.measure():
        pool.terminate()


def cases() -> Iterator[Case]:
    """The cases of this module."""
    apply = frozenset({APPLY})
    pool = frozenset({ARGUMENTS})
    yield Case(
        name="startup-first",
        description="first result of the first pool of a process that has imported torch",
        run=run_startup,
        needs=apply,
        pool="fresh",
        warm_up=False,
        rounds=5,
    )
    yield Case(
        name="startup-second",
        description="first result of a second pool of a process",
        run=run_startup,
        quick={},
        needs=apply,
        pool="own",
    )
    yield Case(
        name="respawn",
        description="tasks with maxtasksperchild=1, chunksize=1",
        run=run_respawn,
        params={"items": 100},
        quick={"items": 10},
        needs=frozenset({RECYCLE}),
        pool="own",
        rounds=5,
    )
    yield Case(
        name="idle",
        description="wake-ups and CPU of an idle pool",
        run=run_idle,
        params={"seconds": 5.0},
        quick={"seconds": 1.0},
        needs=pool,
        warm_up=False,
        rounds=1,
    )
    yield Case(
        name="worker-memory",
        description="USS per worker after a first task",
        run=run_worker_memory,
        needs=pool,
        pool="own",
        warm_up=False,
        rounds=2,
    )
    yield Case(name="close", description="close and join, idle", run=run_close, needs=pool, pool="own")
    yield Case(
        name="terminate",
        description="terminate and join, workers busy",
        run=run_terminate,
        needs=frozenset({TERMINATE}),
        pool="own",
    )
    # Last: a caller that has held so much is slower to fork afterwards, which the others would show.
    yield Case(
        name="startup-second-1GB",
        description="first result of a second pool of a process that holds 1 GB of 1 MB tensors",
        run=run_startup_beside_memory,
        params={"held": 1000},
        needs=apply,
        pool="own",
    )
