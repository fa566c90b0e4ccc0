from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from lease_pair import Pair, Process
from support import wait_until

from tpool.errors import PoolEndedError, ProtocolError, SharedMemoryExhausted
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.entries import Entry, Mapped, Watch
from tpool.tensors.lease_table import MANY_BLOCKS, SMALL_PART
from tpool.tensors.leases import Block, LeaseTable, Memory, Peer, table
from tpool.tensors.memfd import PAGE_NBYTES

MIB = 1 << 20
PAGE = PAGE_NBYTES


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture
def one(pair: Pair) -> Process:
    return pair.a


# Blocks and their views -------------------------------------------------------------------------------------------


def test_a_block_is_found_by_its_address_while_it_lives(one: Process) -> None:
    block = one.allocate(1000)
    block.view[:] = bytes(range(250)) * 4
    address = one.arena.address + block.offset
    located = one.table.locate(address, 1000)
    assert located is not None
    found, start = located
    assert (found.arena, found.offset, found.nbytes, start) == (one.arena, block.offset, 1000, 0)
    assert found.view == block.view
    for elsewhere in ((address + 1, 999), (address + 64, 936), (address, 999), (address, 1001)):
        assert one.table.locate(*elsewhere) is None, "a block that is no slab is found whole"
    del block
    assert one.table.locate(address, 1000) is not None, "what was found keeps it alive"
    del found, located
    assert one.table.locate(address, 1000) is None
    one.table.collect()
    assert one.table.locate(address, 1000) is None
    assert one.allocator.blocks_in_use == 0


def test_a_view_is_cut_to_the_size_that_was_asked_for(one: Process) -> None:
    view = one.allocate(1001).view
    assert (view.nbytes, view.format, view.readonly, view.contiguous) == (1001, "B", False, True)


@pytest.mark.parametrize(
    "derive",
    [
        lambda view: torch.frombuffer(view, dtype=torch.uint8),
        lambda view: torch.frombuffer(view, dtype=torch.uint8)[7:9].untyped_storage(),
        lambda view: np.frombuffer(view, np.uint8)[3:],
        lambda view: view[5:6],
        lambda view: view.toreadonly(),
        lambda view: view.cast("q"),
        lambda view: memoryview(view),
        lambda view: (ctypes.c_ubyte * 64).from_buffer(view),
    ],
)
def test_whatever_is_made_from_a_view_keeps_the_block(one: Process, derive: Callable[[memoryview], object]) -> None:
    block = one.allocate(64)
    offset = block.offset
    derived = derive(block.view)
    del block
    gc.collect()
    assert one.table.locate(one.arena.address + offset, 64) is not None
    second = one.allocate(64)
    assert second.offset != offset
    del derived
    assert one.allocate(64).offset == offset


def test_a_tensor_on_a_block_has_its_address_and_size(one: Process) -> None:
    block = one.allocate(1001)
    storage = torch.frombuffer(block.view, dtype=torch.uint8).untyped_storage()
    assert (storage.data_ptr(), storage.nbytes()) == (one.arena.address + block.offset, 1001)


def test_blocks_in_garbage_cycles_die_with_them(one: Process) -> None:
    # Views of views in such a cycle crash the collector of CPython 3.11; ours must not be such.
    for _ in range(5):
        block = one.allocate(5000)
        found = one.table.locate(one.arena.address + block.offset, 5000)
        assert found is not None
        cycle: list[object] = [found, block.view[1:], block.view.toreadonly(), np.frombuffer(block.view, np.uint8)]
        cycle += [block, torch.frombuffer(block.view, dtype=torch.uint8), cycle]
        del block, found, cycle
        gc.collect()
    one.table.collect()
    assert one.allocator.blocks_in_use == 0


def test_views_outlive_table_and_arena() -> None:
    ledger = Ledger.create(1, MIB)
    process = Process(ledger, 0)
    tensor = torch.frombuffer(process.allocate(64).view, dtype=torch.uint8).fill_(7)
    process.table.remove(process.arena)
    assert process.arena.fd >= 0, "a block lives"
    with pytest.raises(PoolEndedError):
        process.table.allocate(process.arena, 1)
    assert tensor.sum() == 7 * 64
    address = tensor.data_ptr()
    assert process.table.locate(address, 64) is not None
    del tensor
    process.table.collect()
    assert process.arena.fd == -1
    assert process.table.arena(process.arena.id) is None
    process.table.remove(process.arena)
    ledger.close()


def test_an_empty_arena_is_closed_when_removed(pair: Pair) -> None:
    arena = pair.a.mapped[1]
    pair.a.table.remove(arena)
    assert arena.fd == -1
    with pytest.raises(ProtocolError):
        pair.a.table.receive(arena.id, 0, 1, pair.a.other)


def test_arenas_are_known_by_id(one: Process) -> None:
    assert one.table.arena(one.arena.id) is one.arena
    one.table.add(one.arena)
    assert one.table.allocate(one.arena, 1) is not None, "adding it again changes nothing"
    twin = Arena.attach(os.dup(one.arena.fd), one.arena.id)
    with pytest.raises(ProtocolError):
        one.table.add(twin)
    twin.close()
    with pytest.raises(PoolEndedError):
        one.table.allocate(one.mapped[1], 1)


# Leases -----------------------------------------------------------------------------------------------------------


def test_a_block_is_free_when_both_sides_are_done(pair: Pair) -> None:
    block = pair.a.allocate(5000)
    block.view[:3] = b"abc"
    received = pair.send(block, pair.a, pair.b)
    assert bytes(received.view[:3]) == b"abc"
    del block
    pair.check()
    assert pair.a.allocator.blocks_in_use == 1
    del received
    assert pair.b.table.pending_nbytes(pair.b.other) == 5000
    assert len(pair.give_backs(pair.b, pair.a)) == 1
    assert pair.b.table.pending_nbytes(pair.b.other) == 0
    assert pair.a.allocator.blocks_in_use == 0


def test_the_sender_may_use_it_longer(pair: Pair) -> None:
    block = pair.a.allocate(5000)
    received = pair.send(block, pair.a, pair.b)
    del received
    pair.give_backs(pair.b, pair.a)
    assert pair.a.allocator.blocks_in_use == 1
    del block
    pair.a.table.collect()
    assert pair.a.allocator.blocks_in_use == 0


def test_a_second_lease_goes_back_at_once(pair: Pair) -> None:
    block = pair.a.allocate(64)
    first, second = pair.send(block, pair.a, pair.b), pair.send(block, pair.a, pair.b)
    assert first.view.obj is second.view.obj
    assert pair.give_backs(pair.b, pair.a) == [(block.arena.id, block.offset, 1)]
    del first
    assert pair.give_backs(pair.b, pair.a) == []
    del second
    assert pair.give_backs(pair.b, pair.a) == [(block.arena.id, block.offset, 1)]
    assert pair.give_backs(pair.b, pair.a) == []


def test_leases_on_the_same_block_are_given_back_together(pair: Pair) -> None:
    block = pair.a.allocate(64)
    for _ in range(3):
        pair.send(block, pair.a, pair.b)
    assert pair.give_backs(pair.b, pair.a) == [(block.arena.id, block.offset, 3)]


def test_our_own_block_comes_home_while_the_other_side_still_uses_it(pair: Pair) -> None:
    block = pair.a.allocate(64)
    offset = block.offset
    there = pair.send(block, pair.a, pair.b)
    del block
    home = pair.send(there, pair.b, pair.a)
    assert (home.arena, home.offset) == (pair.a.arena, offset)
    del there
    assert pair.give_backs(pair.b, pair.a) == [], "what b sent it keeps, until a gives it back"
    assert len(pair.give_backs(pair.a, pair.b)) == 1
    assert len(pair.give_backs(pair.b, pair.a)) == 1
    home.view[:3] = b"xyz"
    assert pair.a.allocate(64).offset != offset
    del home
    assert pair.a.allocate(64).offset == offset


def test_a_dead_peers_leases_end(pair: Pair) -> None:
    blocks = [pair.a.allocate(64) for _ in range(3)]
    for block in blocks:
        pair.send(block, pair.a, pair.b)
    theirs = pair.send(pair.b.allocate(64), pair.b, pair.a)
    theirs.view[:] = b"y" * 64
    del blocks, block
    assert pair.a.allocator.blocks_in_use == 3
    pair.a.table.forget(pair.a.other)
    assert pair.a.allocator.blocks_in_use == 0
    assert bytes(theirs.view) == b"y" * 64


def test_nothing_is_lent_if_one_block_is_foreign(pair: Pair) -> None:
    block = pair.a.allocate(64)
    stranger = Block(pair.b.arena, 0, 64, memoryview(bytearray(64)))
    with pytest.raises(PoolEndedError):
        pair.a.table.lend([block, stranger], pair.a.other)
    del block
    pair.a.table.collect()
    assert pair.a.allocator.blocks_in_use == 0


# What peers may get wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "nbytes"),
    [(-64, 64), (0, 0), (0, -1), (1, 5), (64 * MIB, 64), (0, 64 * MIB + 1), (64, 1 << 70), (1 << 70, 64)],
)
def test_blocks_outside_an_arena_are_refused(pair: Pair, offset: int, nbytes: int) -> None:
    for process in (pair.a, pair.b):
        with pytest.raises(ProtocolError):
            process.table.receive(pair.b.arena.id, offset, nbytes, process.other)


def test_overlapping_blocks_are_refused(pair: Pair) -> None:
    receive = pair.a.table.receive
    kept = [receive(pair.b.arena.id, offset, 100, pair.a.other) for offset in (0, 1024, 512)]
    for offset, nbytes in [(64, 64), (448, 65), (960, 65), (128, 2000), (1088, 1), (512, 101), (512, 99)]:
        with pytest.raises(ProtocolError):
            receive(pair.b.arena.id, offset, nbytes, pair.a.other)
    pair.a.table.check()
    kept.append(receive(pair.b.arena.id, 128, 384, pair.a.other))
    assert len(kept) == 4


def test_blocks_of_ours_must_be_lent(pair: Pair) -> None:
    block = pair.a.allocate(64)
    for offset, nbytes in [(block.offset, 64), (block.offset, 65), (block.offset + 64, 64)]:
        with pytest.raises(ProtocolError):
            pair.a.table.receive(pair.a.arena.id, offset, nbytes, pair.a.other)
    with pytest.raises(ProtocolError):
        pair.a.table.receive(12345, 0, 64, pair.a.other)


@pytest.mark.parametrize(
    ("sizes", "most", "waits"),
    [
        ([64] * (MANY_BLOCKS - 1), 1 << 20, True),
        ([64] * MANY_BLOCKS, 1 << 20, False),
        ([1 << 20], 1 << 20, False),
        ([4096] * 20, 1 << 20, True),
        ([4096] * 20, 1 << 16, False),
        ([64], 0, False),
    ],
)
def test_little_may_wait_to_be_given_back(pair: Pair, sizes: list[int], most: int, waits: bool) -> None:
    sent = [pair.a.allocate(nbytes) for nbytes in sizes]
    received = [pair.send(block, pair.a, pair.b) for block in sent]
    assert not pair.b.table.owes_much(pair.b.other, most)
    del received
    assert pair.b.table.owes_much(pair.b.other, most) is not waits
    assert len(pair.give_backs(pair.b, pair.a)) == len(sizes)
    assert not pair.b.table.owes_much(pair.b.other, most)


def test_more_than_was_lent_cannot_be_given_back(pair: Pair) -> None:
    block = pair.a.allocate(64)
    pair.a.table.lend([block, block], pair.a.other)
    wrong = [
        (pair.a.other, block.arena.id, block.offset, 3),
        (pair.a.other, block.arena.id, block.offset, 0),
        (pair.a.other, block.arena.id, block.offset, -1),
        (pair.a.other, block.arena.id, block.offset + 64, 1),
        (pair.a.other, 99, block.offset, 1),
        (Peer("somebody else"), block.arena.id, block.offset, 1),
    ]
    for peer, arena_id, offset, count in wrong:
        with pytest.raises(ProtocolError):
            pair.a.table.given_back(peer, [(arena_id, offset, count)])
    triple = (block.arena.id, block.offset, 1)
    with pytest.raises(ProtocolError):
        pair.a.table.given_back(pair.a.other, [triple, (99, block.offset, 1)])  # of which the first counts
    pair.a.table.given_back(pair.a.other, [triple])
    with pytest.raises(ProtocolError):
        pair.a.table.given_back(pair.a.other, [(block.arena.id, block.offset, 1)])


# A slot's worker is replaced --------------------------------------------------------------------------------------


def test_the_next_worker_in_a_slot_keeps_what_lives(pair: Pair) -> None:
    parent, worker = pair.a, pair.b
    kept = pair.send(worker.allocate(5000), worker, parent)
    kept.view[:] = b"k" * 5000
    dropped = pair.send(worker.allocate(5000), worker, parent)
    also = pair.send(worker.allocate(64), worker, parent)
    parent.table.forget(parent.other)
    del dropped  # the dead worker is not told
    blocks = parent.table.live_blocks(parent.other, parent.mapped[1])
    assert blocks == sorted([(kept.offset, 5000), (also.offset, 64)])
    del also  # the next one is
    arena = Arena.attach(os.dup(worker.arena.fd), worker.arena.id)
    successor = LeaseTable()
    allocator = Allocator(arena, pair.ledger, 2)  # 1 still belongs to the worker that plays dead
    successor.add(arena, allocator)
    to_parent = Peer("parent")
    successor.reinstate(arena, blocks, to_parent)
    successor.check()
    assert allocator.blocks_in_use == 2
    successor.given_back(to_parent, parent.table.take_give_backs(parent.other))
    assert allocator.blocks_in_use == 1
    new = [successor.allocate(arena, 5000) for _ in range(10)]
    for block in new:
        assert block is not None
        block.view[:] = bytes(5000)
    assert bytes(kept.view) == b"k" * 5000
    # The survivor is sent to its home, which has had no view of it.
    parent.table.lend([kept], parent.other)
    home = successor.receive(arena.id, kept.offset, 5000, to_parent)
    assert bytes(home.view) == b"k" * 5000
    assert successor.take_give_backs(to_parent) == [(arena.id, kept.offset, 1)]
    arena.close()
    parent.table.forget(parent.other)


def test_what_the_dead_worker_had_sent_from_elsewhere_is_given_back_to_nobody(pair: Pair) -> None:
    parent, worker = pair.a, pair.b
    nested = Process(pair.ledger, 2)
    parent.map(nested.arena)
    block = nested.allocate(64)
    here = parent.table.receive(nested.arena.id, block.offset, 64, parent.other)
    parent.table.forget(parent.other)
    assert parent.table.live_blocks(parent.other, worker.arena) == []
    del here
    assert parent.table.take_give_backs(parent.other) == []
    nested.close()
    parent.table.remove(parent.mapped[-1])


@pytest.mark.parametrize("blocks", [[(1, 64)], [(0, 64), (0, 64)], [(0, 65), (64, 1)], [(64 * MIB, 64)], [(0, -1)]])
def test_impossible_blocks_are_not_reinstated(pair: Pair, blocks: list[tuple[int, int]]) -> None:
    arena = Arena.attach(os.dup(pair.b.arena.fd), pair.b.arena.id)
    successor = LeaseTable()
    successor.add(arena, Allocator(arena, pair.ledger, 1))
    with pytest.raises(ProtocolError):
        successor.reinstate(arena, blocks, Peer())
    arena.close()


# Waiting for memory -----------------------------------------------------------------------------------------------


def test_others_give_free_memory_back_to_who_waits(pair: Pair) -> None:
    blocks = [pair.a.allocate(MIB) for _ in range(16)]
    assert pair.b.table.allocate(pair.b.arena, PAGE) is None
    received = pair.send(blocks.pop(), pair.a, pair.b)
    del blocks
    pair.a.table.collect()
    assert pair.a.allocator.committed_nbytes == 16 * MIB, "nobody waits"
    pair.ledger.set_waiting(0, True)
    pair.a.table.collect()
    assert pair.a.allocator.committed_nbytes == 16 * MIB, "not for itself"
    pair.ledger.set_waiting(1, True)
    pair.a.table.collect()
    assert pair.a.allocator.committed_nbytes == MIB
    del received
    pair.give_backs(pair.b, pair.a)
    assert pair.a.allocator.committed_nbytes == 0, "at the give-back"
    assert pair.b.table.allocate(pair.b.arena, 16 * MIB) is not None


def test_memory_waits_until_some_comes_back(pair: Pair) -> None:
    received = [pair.send(pair.a.allocate(8 * MIB), pair.a, pair.b) for _ in range(2)]
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        assert pair.ledger.anyone_waiting(besides=1)
        waits.append(seconds)
        if len(waits) == 3:
            received.pop()
            pair.give_backs(pair.b, pair.a)
        return True

    memory = Memory(pair.a.arena, wait, pair.a.table)
    block = memory.allocate(4 * MIB)
    assert block.nbytes == 4 * MIB
    assert len(waits) == 3
    assert all(0 < seconds < 1 for seconds in waits)
    assert not pair.ledger.anyone_waiting()
    assert memory.allocate(4 * MIB).nbytes == 4 * MIB
    assert len(waits) == 3


def test_memory_says_when_none_can_come_back(pair: Pair) -> None:
    kept = pair.send(pair.a.allocate(16 * MIB), pair.a, pair.b)
    memory = Memory(pair.a.arena, lambda seconds: False, pair.a.table)
    with pytest.raises(SharedMemoryExhausted, match=r"4096 bytes .* 16777216 of this pool's 16777216"):
        memory.allocate(4096)
    assert not pair.ledger.anyone_waiting()
    del kept


def test_before_it_gives_up_it_looks_for_memory_in_garbage(pair: Pair) -> None:
    cycle: list[object] = [torch.frombuffer(pair.a.allocate(16 * MIB).view, dtype=torch.uint8)]
    cycle.append(cycle)
    gc.collect()  # so that none comes by itself before long
    del cycle
    memory = Memory(pair.a.arena, lambda seconds: False, pair.a.table)
    assert memory.allocate(4 * MIB).nbytes == 4 * MIB


def test_memory_does_not_wait_for_more_than_the_budget(pair: Pair) -> None:
    def wait(seconds: float) -> bool:
        raise AssertionError("hopeless from the start")

    with pytest.raises(SharedMemoryExhausted):
        Memory(pair.a.arena, wait, pair.a.table).allocate(17 * MIB)


def test_who_interrupts_the_giving_back_of_memory_does_not_wait_for_it(
    one: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler: its thread holds the table, without which nobody can tell that there is memory, or none."""

    def wait(seconds: float) -> bool:
        raise AssertionError("for ever")

    memory = Memory(one.arena, wait, one.table)
    discard, told = Arena.discard, []

    def discard_and_interrupt(arena: Arena, offset: int, nbytes: int) -> None:
        discard(arena, offset, nbytes)
        with pytest.raises(SharedMemoryExhausted, match="signal handler or finalizer") as caught:
            memory.allocate(12 * MIB)
        told.append(caught.value)

    free_lately(one, MIB, 4)
    monkeypatch.setattr(Arena, "discard", discard_and_interrupt)
    one.table.trim()
    monkeypatch.undo()
    assert told
    assert not one.allocator.ledger.anyone_waiting()
    assert memory.allocate(12 * MIB).nbytes == 12 * MIB


@pytest.fixture
def roomy() -> Iterator[Process]:
    """One with a larger budget, so that 2 MB are a small part of it."""
    ledger = Ledger.create(1, 1 << 30)
    process = Process(ledger, 0)
    yield process
    process.table.check()
    process.close()
    ledger.close()


def free_lately(process: Process, nbytes: int, count: int) -> set[int]:
    blocks = [process.allocate(nbytes) for _ in range(count)]
    return {block.offset for block in blocks}


def test_some_blocks_at_once(roomy: Process) -> None:
    memory = Memory(roomy.arena, lambda seconds: False, roomy.table)
    (first,) = memory.exchange_some(150_000, 50)  # nothing was freed lately
    freed = free_lately(roomy, 150_000, 20)
    some = memory.exchange_some(150_000, 10)
    assert len(some) == 10
    assert {block.offset for block in some} < freed
    assert {block.nbytes for block in some} == {150_000}
    assert len(memory.exchange_some(150_000, 50)) == 10, "there are no more"
    assert first.offset not in freed


def test_some_blocks_at_once_are_not_all_that_there_are(roomy: Process, one: Process) -> None:
    memory = Memory(roomy.arena, lambda seconds: False, roomy.table)
    for nbytes, most in ((150_000, 13), (MIB, 2), (3 * MIB, 1), (9000, 2 * MIB // 9000)):
        free_lately(roomy, nbytes, most + 1)
        assert len(memory.exchange_some(nbytes, 400)) == most
    free_lately(one, 9000, 50)
    small = Memory(one.arena, lambda seconds: False, one.table)
    assert len(small.exchange_some(9000, 50)) == one.allocator.ledger.budget_nbytes // SMALL_PART // 9000


def test_of_some_blocks_an_interrupt_leaves_none_in_use(one: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    free_lately(one, 9000, 10)
    enter = one.table._enter
    entered: list[Block] = []

    def enter_interrupted(mapped: Mapped, offset: int, nbytes: int) -> Block:
        entered.append(enter(mapped, offset, nbytes))
        if len(entered) == 4:
            raise KeyboardInterrupt
        return entered[-1]

    monkeypatch.setattr(one.table, "_enter", enter_interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.table.allocate_young(one.arena, 9000, 8)
    assert one.allocator.blocks_in_use == 4
    entered.clear()
    one.table.collect()
    assert one.allocator.blocks_in_use == 0


def test_trim(pair: Pair) -> None:
    pair.a.allocate(MIB)
    assert pair.a.table.trim(aged_only=True) == 0
    assert pair.a.table.trim(pair.b.arena) == 0
    assert pair.a.table.trim(pair.a.arena, aged_only=True) == MIB
    pair.a.allocate(MIB)
    assert pair.a.table.trim() == MIB
    assert pair.ledger.committed_nbytes() == 0


def test_a_closed_pools_memory(pair: Pair) -> None:
    memory = Memory(pair.a.arena, lambda seconds: False)
    with pytest.raises(PoolEndedError):
        memory.allocate(1)  # the process's own table does not know it
    assert memory._table is table()
    assert table() is table()


def test_a_removed_arena_closes_when_its_last_view_dies(pair: Pair) -> None:
    blocks = [pair.b.allocate(100 * (i + 1)) for i in range(3)]
    received = [pair.send(block, pair.b, pair.a) for block in blocks]
    arena = received[0].arena
    pair.a.table.forget(pair.a.other)
    pair.a.table.remove(arena)
    while received:
        assert arena.fd >= 0
        received.pop()
    assert arena.fd < 0  # nobody called the table since


def test_views_of_a_removed_arena_may_die_in_several_threads(pair: Pair) -> None:
    received = [pair.send(pair.b.allocate(64), pair.b, pair.a) for _ in range(400)]
    arena = received[0].arena
    pair.a.table.remove(arena)
    parts = [received[i::4] for i in range(4)]
    received.clear()
    threads = [threading.Thread(target=part.clear) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert arena.fd < 0


# Collections and threads ------------------------------------------------------------------------------------------


@pytest.fixture
def collect_always() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(1)
    yield
    gc.set_threshold(*before)


class Cyclic:
    """A tensor in a reference cycle; when the collector finds it, user code sends and allocates again."""

    def __init__(self, pair: Pair, depth: int) -> None:
        self.pair, self.depth, self.me = pair, depth, self
        self.tensor = torch.frombuffer(pair.a.allocate(100 * (depth + 1)).view, dtype=torch.uint8)
        self.tensor.fill_(depth)

    def __del__(self) -> None:
        assert (self.tensor == self.depth).all()
        if self.depth:
            child = Cyclic(self.pair, self.depth - 1)
            located = self.pair.a.table.locate(child.tensor.data_ptr(), child.tensor.nbytes)
            assert located is not None
            self.pair.send(located[0], self.pair.a, self.pair.b)


@pytest.mark.usefixtures("collect_always")
def test_tensors_die_inside_our_own_steps(pair: Pair) -> None:
    for round in range(30):
        Cyclic(pair, 3)
        kept = [pair.a.allocate(200) for _ in range(3)]
        for block in kept:
            block.view[:] = bytes([round]) * 200
        there = [pair.send(block, pair.a, pair.b) for block in kept]
        pair.check()
        assert all(bytes(block.view) == bytes([round]) * 200 for block in there)
        del kept, there, block
        pair.give_backs(pair.b, pair.a)
    gc.collect()
    gc.collect()
    while pair.give_backs(pair.b, pair.a) or pair.give_backs(pair.a, pair.b):
        pass
    pair.a.table.collect()
    assert pair.a.allocator.blocks_in_use == 0


def test_what_is_owed_is_told_though_a_finalizer_asks_in_the_middle(pair: Pair) -> None:
    peer = Peer("somebody")
    entries = [Entry(Mapped(pair.a.arena, None), 64 * i, 64, None, peer) for i in range(200)]
    told: list[int] = []

    def ask(*_: object) -> None:
        told.extend(peer.take_pending().values())

    gc.callbacks.append(ask)
    try:
        for entry in entries:
            gc.disable()
            _due = [[] for _ in range(2000)]  # type: ignore[var-annotated]  # so a collection comes where one can
            gc.enable()
            peer.owe(entry)
    finally:
        gc.enable()
        gc.callbacks.remove(ask)
    ask()
    assert sum(told) == len(entries)


def test_a_signal_handler_that_notices_dead_views_in_the_middle_of_that(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[None] = []

    class Interrupted(deque[Watch]):
        def popleft(self) -> Watch:
            if not handled:
                handled.append(None)
                pair.a.table.collect()
            return super().popleft()

    monkeypatch.setattr(pair.a.table, "_dead", Interrupted())
    blocks = [pair.a.allocate(64) for _ in range(5)]
    blocks.clear()
    pair.a.table.collect()
    assert handled
    assert pair.a.allocator.blocks_in_use == 0


def test_many_threads(pair: Pair) -> None:
    errors: list[BaseException] = []
    stop = threading.Event()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        kept: list[tuple[Block, bytes]] = []
        try:
            for step in range(300):
                nbytes = draw.choice([64, 100, 5000, 20_000])
                block = pair.a.table.allocate(pair.a.arena, nbytes)
                if block is not None:
                    stamp = bytes([seed, step % 256]) * (nbytes // 2)
                    block.view[:] = stamp
                    received = pair.send(block, pair.a, pair.b)
                    kept.append((draw.choice([block, received]), stamp))
                for kept_block, stamp in kept:
                    assert bytes(kept_block.view) == stamp
                while len(kept) > 5 or (kept and draw.random() < 0.3):
                    kept.pop(draw.randrange(len(kept)))
        except BaseException as error:
            errors.append(error)

    def give_back() -> None:
        while not stop.is_set():
            pair.give_backs(pair.b, pair.a)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    server = threading.Thread(target=give_back)
    for thread in [*threads, server]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    server.join()
    assert not errors, errors
    wait_until(lambda: not (pair.give_backs(pair.b, pair.a) or pair.a.allocator.blocks_in_use), 5)
