"""What was not used for long goes back to the system, and nobody is woken for nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pool_tasks as tasks
import pytest
import torch
from support import wait_until

import tpool
from tpool.tensors import ageing
from tpool.tensors.ageing import AGE_SECONDS
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.leases import LeaseTable, Memory

DEADLINE = 30
MIB = 1 << 20


class Clock:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ageing, "monotonic", clock)
    return clock


@pytest.fixture
def memory(clock: Clock) -> Iterator[Memory]:
    arena, ledger, table = Arena.create(64 * MIB), Ledger.create(1, 64 * MIB), LeaseTable()
    table.add(arena, Allocator(arena, ledger, 0))
    yield Memory(arena, lambda seconds: False, table)
    table.remove(arena)
    ledger.close()


def committed_nbytes(memory: Memory) -> int:
    allocator = memory._table.allocator(memory.arena)
    assert allocator is not None
    return allocator.committed_nbytes


def test_who_has_no_shared_memory_waits_for_as_long_as_it_likes(memory, clock):
    assert (memory.limit_wait(None), memory.limit_wait(1e6)) == (None, 1e6)
    block = memory.allocate(4096)
    assert memory.limit_wait(None) == AGE_SECONDS, "nobody would be told of its end"
    del block
    memory._table.collect()
    assert memory.limit_wait(None) is None, "for so little nobody is woken"


def test_free_memory_goes_back_after_the_second_look(memory, clock):
    memory.allocate(8 * MIB)
    for passed, until, left in (
        (0, AGE_SECONDS, 8),
        (AGE_SECONDS - 1, 1, 8),
        (1, AGE_SECONDS, 8),
        (AGE_SECONDS - 3, 3, 8),
        (3, None, 0),
    ):
        clock.now += passed
        assert memory.limit_wait(None) == until
        assert memory.limit_wait(2.0) == (2.0 if until is None else min(2.0, until))
        assert committed_nbytes(memory) == left * MIB


@pytest.mark.parametrize("pause", [AGE_SECONDS / 4, AGE_SECONDS * 5 / 6, AGE_SECONDS - 0.1])
def test_what_comes_meanwhile_puts_nothing_off(memory, clock, pause):
    """A thread that something wakes after each pause."""
    memory.allocate(8 * MIB)
    began = next_one = clock.now
    while committed_nbytes(memory):
        next_one += pause if clock.now >= next_one else 0.0
        clock.now += min(memory.limit_wait(None) or 0.0, next_one - clock.now)
    assert clock.now - began == pytest.approx(2 * AGE_SECONDS)


def test_what_is_used_again_and_again_stays_and_the_rest_goes(memory, clock):
    blocks = [memory.allocate(2 * MIB) for _ in range(4)]
    kept = blocks.pop()
    blocks.clear()
    for _ in range(5):
        memory.allocate(2 * MIB)
        clock.now += AGE_SECONDS
        assert memory.limit_wait(None) == AGE_SECONDS
    assert committed_nbytes(memory) == 4 * MIB, "the one in use, and the one that is warm for the next"
    del kept


def test_an_idle_pool_gives_its_memory_back(monkeypatch):
    """What results and arguments needed, in the caller and in the worker."""
    monkeypatch.setattr(ageing, "AGE_SECONDS", 0.2)
    with tpool.Pool(1, tasks.age_soon, (0.2,)) as pool:
        result = pool.apply(tasks.double, (torch.ones(2 * MIB),))
        assert pool.stats().memory_peak_nbytes >= 8 * MIB

        wait_until(lambda: pool.stats().memory_nbytes < MIB, DEADLINE, "what the argument needed")
        assert pool.stats().workers[0].memory_nbytes >= 8 * MIB
        assert bool((result == 2).all()), "what is in use stays"
        del result
        wait_until(lambda: pool.stats().workers[0].memory_nbytes < MIB, DEADLINE, "what the result needed")
        assert float(pool.apply(tasks.double, (torch.ones(2 * MIB),)).sum()) == 4 * MIB


def test_an_idle_worker_gives_back_what_its_threads_let_go(monkeypatch, tmp_path):
    """It finds that when it looks for what is old, and says so at once."""
    monkeypatch.setattr(ageing, "AGE_SECONDS", 0.2)
    go = tmp_path / "go"
    with tpool.Pool(1, tasks.age_soon, (0.2,)) as pool:
        pool.apply(tasks.hold_until, (torch.ones(2 * MIB), str(go)))
        assert pool.stats().memory_nbytes >= 8 * MIB
        go.touch()
        wait_until(lambda: pool.stats().memory_nbytes < MIB, DEADLINE, "what the thread held")
