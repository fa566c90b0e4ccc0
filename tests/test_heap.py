"""Heap memory that tensors have left goes back to the system, when and only when they took new shared memory."""

from __future__ import annotations

import pytest
from support import run_script

from tpool.tensors.heap import EXCHANGE_NBYTES, Heap

STEP = EXCHANGE_NBYTES


class System:
    """Takes memory back, in so many seconds each time."""

    def __init__(self) -> None:
        self.seconds = 0.001
        self.times = 0
        self.now = 1000.0

    def take(self) -> None:
        self.times += 1
        self.now += self.seconds

    def clock(self) -> float:
        return self.now


@pytest.fixture
def system() -> System:
    return System()


@pytest.fixture
def heap(system: System) -> Heap:
    return Heap(system.take, system.clock)


def test_memory_goes_back_for_each_so_many_bytes_of_new_memory(heap: Heap, system: System) -> None:
    times = []
    for committed_nbytes in range(0, 4 * STEP + 1, STEP // 4):
        heap.exchange(committed_nbytes, 0)
        times.append(system.times)
    assert times == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]


def test_memory_that_is_warm_already_gives_nothing_back(heap: Heap, system: System) -> None:
    heap.exchange(STEP, 0)
    for _ in range(100):
        heap.exchange(STEP, 0)
        heap.exchange(2 * STEP - 1, 0)
    assert system.times == 1


def test_an_arena_that_gave_memory_back_grows_again(heap: Heap, system: System) -> None:
    heap.exchange(3 * STEP, 0)
    heap.exchange(STEP, 0)
    assert system.times == 1, "it shrank"
    heap.exchange(2 * STEP - 1, 0)
    assert system.times == 1
    heap.exchange(2 * STEP, 0)
    assert system.times == 2


def test_a_heap_that_takes_long_is_left_alone_for_longer(heap: Heap, system: System) -> None:
    """As one with many small holes does, each time anew."""
    system.seconds = 0.1  # as much as the copy into 1 GB that is warm, a tenth of what new memory takes
    heap.exchange(STEP, 0)
    heap.exchange(STEP + (1 << 30) - 1, 0)
    assert system.times == 1
    system.seconds = 0.001
    heap.exchange(STEP + (1 << 30), 0)
    heap.exchange(2 * STEP + (1 << 30), 0)
    assert system.times == 3, "as before, now that it is fast"


def test_what_is_little_beside_what_the_pool_may_have_is_not_much(heap: Heap, system: System) -> None:
    for committed_nbytes in range(0, 12 * STEP + 1, STEP):
        heap.exchange(committed_nbytes, 5 * STEP)
    assert system.times == 2


LISTS = """
import os, torch, tpool

MIB = 1 << 20

def make(count):
    return [torch.full((4 * MIB,), 1, dtype=torch.uint8) for _ in range(count)]

def anonymous(pid):
    with open(f"/proc/{pid}/smaps_rollup") as rollup:
        return next(1024 * int(line.split()[1]) for line in rollup if line.startswith("Anonymous:"))

if __name__ == "__main__":
    with tpool.Pool(1, memory="2GB") as pool:
        worker = pool.apply(os.getpid)
        tensors = make(64)
        last = torch.ones(100_000)  # or what the last one leaves lies at the heap's end
        before = anonymous(os.getpid())
        assert pool.map(len, tensors) == [4 * MIB] * 64
        moved = anonymous(os.getpid())
        assert before > 256 * MIB, before
        assert moved < before - 150 * MIB, (moved, before)

        before = anonymous(worker)
        results = pool.apply(make, (64,))
        after = anonymous(worker)
        assert after < before + 100 * MIB, (after, before)

        before = anonymous(os.getpid())
        more = make(64)
        assert pool.map(len, more) == [4 * MIB] * 64
        del more
        again = make(64)  # in warm memory, both for itself and for its way
        made = anonymous(os.getpid())
        assert pool.map(len, again) == [4 * MIB] * 64
        assert anonymous(os.getpid()) > made - 50 * MIB, (anonymous(os.getpid()), made)
"""


def test_the_heap_of_a_caller_and_of_a_worker_shrinks_as_their_tensors_move():
    # As in a program that has freed a few large tensors: nothing has a mapping of its own.
    large = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    run_script(LISTS, 120, large).expect_success()
