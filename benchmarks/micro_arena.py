"""What one block of shared memory costs: allocate, find, receive, give back, fork.

Run it as ``python benchmarks/micro_arena.py``. Each line is the best of several runs, in microseconds per operation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from tpool.tensors import leases
from tpool.tensors.arena import Allocator, Arena, Ledger

ROUNDS = 100
COUNT = 1_000


def main() -> None:
    ledger = Ledger.create(2, 8 << 30)
    arena = Arena.create(8 << 30)
    table = leases.table()
    table.add(arena, Allocator(arena, ledger, 0))
    other = leases.LeaseTable()  # plays the process at the other end
    other.add(Arena.attach(os.dup(arena.fd), arena.id))
    here, there = leases.Peer("here"), leases.Peer("there")

    def allocate() -> None:
        table.allocate(arena, 4096)

    keep = [table.allocate(arena, 4096) for _ in range(1000)]
    block = table.allocate(arena, 4096)
    assert block is not None
    address = arena.address + block.offset
    table.lend([block] * (ROUNDS * COUNT + 1), there)
    known = other.receive(arena.id, block.offset, 4096, here)

    def find() -> None:
        table.find(address)

    def lend() -> None:
        table.lend([block], there)

    def receive_known() -> None:
        other.receive(arena.id, block.offset, 4096, here)

    offset = keep[0].offset if keep[0] is not None else 0

    def receive_new() -> None:
        other.receive(arena.id, offset, 4096, here)

    def round_trip() -> None:
        one = table.allocate(arena, 4096)
        assert one is not None
        table.lend([one], there)
        other.receive(arena.id, one.offset, 4096, here)
        del one
        for give_back in other.take_give_backs(here):
            table.given_back(there, *give_back)

    def collect() -> None:
        table.collect()

    for function in (allocate, find, lend, receive_known, receive_new, collect):
        show(function)
    other.take_give_backs(here)
    show(round_trip)
    print(f"{'touch 4 KiB for the first time':32}{fresh(table, arena):8.2f}")
    print(f"{'fork hooks, 1000 live blocks':32}{hooks(table):8.2f}")
    del known


def show(function: Callable[[], None]) -> None:
    best = min(timed(function) for _ in range(ROUNDS))
    print(f"{function.__name__:32}{best:8.2f}")


def timed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(COUNT):
        function()
    return (time.perf_counter() - start) / COUNT * 1e6


def fresh(table: leases.LeaseTable, arena: Arena) -> float:
    start = time.perf_counter()
    blocks = [table.allocate(arena, 4096) for _ in range(COUNT)]
    for block in blocks:
        assert block is not None
        block.view[0] = 1
    return (time.perf_counter() - start) / COUNT * 1e6


def hooks(table: leases.LeaseTable) -> float:
    start = time.perf_counter()
    for _ in range(100):
        table.before_fork()
        table.after_fork_in_parent()
    table.collect()
    return (time.perf_counter() - start) / 100 * 1e6


if __name__ == "__main__":
    main()
