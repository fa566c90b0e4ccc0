from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from forking import fork, run_in_fork
from support import wait_until

from tpool.errors import PoolEndedError
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.leases import Block, LeaseTable, Peer, table

MIB = 1 << 20


class Process:
    """This process's own table, whose fork hooks are real."""

    def __init__(self) -> None:
        self.ledger = Ledger.create(1, 256 * MIB)
        self.arena = Arena.create(256 * MIB)
        self.allocator = Allocator(self.arena, self.ledger, 0)
        self.table: LeaseTable = table()
        self.table.add(self.arena, self.allocator)

    def tensor(self, nbytes: int, value: int) -> torch.Tensor:
        return torch.frombuffer(self.block(nbytes).view, dtype=torch.uint8).fill_(value)

    def block(self, nbytes: int) -> Block:
        block = self.table.allocate(self.arena, nbytes)
        assert block is not None
        return block

    def in_use(self) -> int:
        self.table.collect()
        return self.allocator.blocks_in_use


@pytest.fixture
def process() -> Iterator[Process]:
    process = Process()
    yield process
    process.table.check()
    gc.collect()
    process.table.collect()
    process.table.remove(process.arena)
    assert process.arena.fd == -1
    process.ledger.close()


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_reads_what_it_inherited_while_the_parent_goes_on(process: Process) -> None:
    inherited = [process.tensor(5000, value) for value in range(10)]
    addresses = {tensor.data_ptr() for tensor in inherited}
    go_read, go_write = os.pipe()

    def child() -> None:
        os.read(go_read, 1)
        for value, tensor in enumerate(inherited):
            assert (tensor == value).all()

    before = fds()
    pid = fork(child)
    inherited.clear()
    fresh = [process.tensor(5000, 255) for _ in range(20)]
    assert not addresses & {tensor.data_ptr() for tensor in fresh}
    process.table.check()
    process.table.trim()
    os.write(go_write, b"x")
    assert wait_for(pid) == 0
    del fresh
    assert process.in_use() == 0
    blocks = [process.block(5000) for _ in range(40)]
    assert addresses < {process.arena.address + block.offset for block in blocks}
    assert fds() == before
    os.close(go_read)
    os.close(go_write)


def test_a_grandchild_holds_what_its_parent_inherited(process: Process) -> None:
    inherited = [process.tensor(5000, 7)]
    go_read, go_write = os.pipe()
    answer_read, answer_write = os.pipe()

    def grandchild() -> None:
        os.read(go_read, 1)
        os.write(answer_write, b"y" if (inherited[0] == 7).all() else b"n")

    assert run_in_fork(lambda: fork(grandchild)) == 0
    inherited.clear()
    assert process.in_use() == 1
    other = process.tensor(5000, 8)
    os.write(go_write, b"x")
    assert os.read(answer_read, 1) == b"y"
    wait_until(lambda: process.in_use() == 1, 5, "only the other one is in use")
    del other
    for fd in (go_read, go_write, answer_read, answer_write):
        os.close(fd)


def test_a_child_that_executes_another_program_holds_nothing(process: Process) -> None:
    tensor = process.tensor(5000, 7)
    pid = fork(lambda: os.execvp("sleep", ["sleep", "30"]))
    del tensor
    wait_until(lambda: process.in_use() == 0, 10, "the hold ends with exec")
    os.kill(pid, 9)
    wait_for(pid)


def test_a_forked_child_owns_nothing_and_may_start_anew(process: Process) -> None:
    tensor = process.tensor(5000, 7)
    blocks = [process.table.locate(tensor.data_ptr(), tensor.nbytes)[0]]

    def child() -> None:
        assert process.table is table()
        assert process.table.locate(tensor.data_ptr(), tensor.nbytes) is None
        assert process.table.arena(process.arena.id) is None
        assert process.arena.fd == -1
        for attempt in (
            lambda: process.table.allocate(process.arena, 64),
            lambda: process.table.lend(blocks, Peer()),
        ):
            with pytest.raises(PoolEndedError):
                attempt()
        anew = Process()
        mine = [anew.tensor(5000, 9)]
        assert run_in_fork(lambda: (tensor + mine[0] == 16).all() or os._exit(3)) == 0
        thread = threading.Thread(target=lambda: mine.append(anew.tensor(5000, 10)))
        thread.start()  # the lock is a new one, not held by whoever forked
        thread.join(10)
        assert len(mine) == 2
        mine.clear()
        assert anew.in_use() == 0
        anew.table.check()
        assert (tensor == 7).all()

    assert run_in_fork(child) == 0
    blocks.clear()


def test_the_mapping_goes_in_the_child_when_its_last_view_does(process: Process) -> None:
    tensor = process.tensor(5000, 7)

    def child() -> None:
        def mapped() -> bool:
            with open("/proc/self/maps") as file:
                return f"{process.arena.address:x}-" in file.read()

        assert mapped()
        nonlocal tensor
        del tensor
        assert not mapped()

    assert run_in_fork(child) == 0
    assert (tensor == 7).all()


def test_repeated_forks_leak_nothing(process: Process) -> None:
    tensor = process.tensor(64, 1)
    before = fds()
    for _ in range(20):
        assert run_in_fork(lambda: fds() <= before + 1 or os._exit(2)) == 0
        process.table.collect()
        assert fds() == before
    del tensor


def test_no_pipe_is_made_when_there_is_nothing_to_read(process: Process) -> None:
    assert process.in_use() == 0
    before = fds()
    pid = fork(lambda: None)
    assert fds() == before
    wait_for(pid)


def test_forks_while_other_children_live(process: Process) -> None:
    go_read, go_write = os.pipe()
    tensors = [process.tensor(64, value) for value in range(5)]

    def child(value: int) -> None:
        os.read(go_read, 1)
        assert all((tensor == value + place).all() for place, tensor in enumerate(tensors))

    pids = []
    for value in range(5):
        pids.append(fork(lambda: child(value)))
        process.table.check()
        del tensors[0]
    fresh = [process.tensor(64, 255) for _ in range(5)]
    assert process.in_use() == 10
    os.write(go_write, b"12345")
    assert [wait_for(pid) for pid in pids] == [0] * 5
    assert process.in_use() == 5
    del fresh
    os.close(go_read)
    os.close(go_write)


def test_the_hooks_cost_little_with_many_blocks(process: Process) -> None:
    blocks = [process.block(64) for _ in range(1000)]
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        process.table.before_fork()
        process.table.after_fork_in_parent()
        best = min(best, time.perf_counter() - start)
    assert best < 0.005  # 0.2 ms on a quiet machine; the fork itself takes more
    assert process.in_use() == 1000
    del blocks


def test_without_descriptors_the_blocks_are_held_for_ever(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pipe() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    held = LeaseTable()
    ledger = Ledger.create(1, MIB)
    arena = Arena.create(MIB)
    allocator = Allocator(arena, ledger, 0)
    held.add(arena, allocator)
    block = held.allocate(arena, 64)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe", no_pipe)
        for _ in range(2):
            held.before_fork()
            held.after_fork_in_parent()
    held.check()
    del block
    held.collect()
    assert allocator.blocks_in_use == 1
    arena.close()
    ledger.close()


def test_a_fork_beside_a_thread_that_allocates_stops_nobody(process: Process) -> None:
    stop = threading.Event()
    problems: list[BaseException] = []

    def forks() -> None:
        def child() -> None:
            anew = Process()
            assert (anew.tensor(5000, 3) == 3).all()

        try:
            for _ in range(15):
                pid = fork(child)
                wait_until(lambda pid=pid: os.waitpid(pid, os.WNOHANG)[0], 30, "the child is stuck")
                process.table.collect()
        except BaseException as error:
            problems.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=forks)
    thread.start()
    kept = []
    while not stop.is_set():
        kept.append(process.block(5000))
        del kept[:-10]
    thread.join()
    del kept
    assert not problems, problems
    assert process.in_use() == 0
