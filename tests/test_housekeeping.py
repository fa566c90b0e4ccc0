"""What an interrupt leaves behind in a table of blocks is found again, and nothing that lives is taken for it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from interrupting import AlarmError, interrupt
from lease_pair import MIB, Pair, Process

from tpool.tensors.leases import Block, Memory

SIZES = [200, 5000, 5000, 20_000, 150_000]


@pytest.fixture(autouse=True)
def _quiet_finalizers(monkeypatch: pytest.MonkeyPatch) -> None:
    # An exception in the callback of a weak reference is printed and lost.
    hook = sys.unraisablehook
    monkeypatch.setattr(
        sys, "unraisablehook", lambda lost: None if isinstance(lost.exc_value, AlarmError) else hook(lost)
    )


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.fixture
def one(pair: Pair) -> Process:
    return pair.a


def each_moment(step: int = 1) -> Iterator[tuple[Pair, int]]:
    """A new pair of processes for each moment, until the test breaks off."""
    for moment in itertools.count(1, step):
        pair = Pair()
        try:
            yield pair, moment
        finally:
            pair.close()


# Our own blocks ---------------------------------------------------------------------------------------------------


def use(one: Process) -> None:
    """All that is done with blocks of ours."""
    memory = Memory(one.arena, lambda seconds: False, one.table)
    blocks = [one.allocate(nbytes) for nbytes in SIZES]
    one.table.note_slab(blocks[0])
    blocks.pop(1)
    one.table.collect()
    blocks += memory.exchange_some(5000, 3)
    del blocks[::2]
    one.table.trim(aged_only=True)
    blocks += memory.exchange_some(150_000, 3)
    blocks.clear()
    one.table.collect()
    one.table.trim()


def test_of_our_own_blocks_an_interrupt_anywhere_leaves_nothing_in_use() -> None:
    lost = 0
    for pair, moment in each_moment(3):
        place = interrupt(lambda: use(pair.a), moment)
        pair.a.table.collect()
        lost += pair.a.allocator.blocks_in_use > 0
        pair.a.table.reclaim()
        pair.check()
        assert pair.a.allocator.blocks_in_use == 0, place
        take_and_drop(pair.a)  # as a trim that finds no free block does not join what was never in use
        pair.a.table.trim()
        pair.check()
        assert pair.ledger.committed_nbytes() == 0, place
        if place is None:
            break
    assert moment > 500
    assert lost > 5, "or reclaim has nothing to do here"


def take_and_drop(one: Process) -> None:
    one.allocate(1)


def test_what_was_lost_is_found_by_who_would_have_to_give_up(one: Process) -> None:
    lost = one.allocator.allocate(12 * MIB)  # who asked was interrupted before it was entered
    assert lost is not None
    memory = Memory(one.arena, lambda seconds: False, one.table)
    assert memory.allocate(12 * MIB).nbytes == 12 * MIB


@pytest.mark.parametrize("aged_only", [False, True])
def test_what_was_lost_is_found_as_old_memory_goes_back(one: Process, aged_only: bool) -> None:
    assert one.allocator.allocate(MIB) is not None
    one.table.trim(one.arena, aged_only=aged_only)
    assert one.allocator.blocks_in_use == 0
    one.table.trim(one.arena, aged_only=aged_only)
    assert one.allocator.committed_nbytes == 0


def test_blocks_that_a_thread_is_about_to_enter_are_not_taken_for_lost(
    one: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = one.table._enter

    def enter_late(mapped: object, offset: int, nbytes: int) -> Block:
        in_thread(one.table.reclaim)
        return enter(mapped, offset, nbytes)

    monkeypatch.setattr(one.table, "_enter", enter_late)
    block = one.allocate(5000)
    some = one.table.allocate_young(one.arena, 5000, 3)
    assert one.allocator.blocks_in_use == 1 + len(some)
    del block
    one.table.collect()
    some = one.table.allocate_young(one.arena, 5000, 3)
    assert one.allocator.blocks_in_use == len(some) == 1
    one.table.check()


def test_a_block_that_was_about_to_be_entered_in_vain_hides_no_other_for_ever(one: Process) -> None:
    class Refused(Exception):
        pass

    def enter(*arguments: object) -> Block:
        raise Refused

    for allocate in (one.allocate, lambda nbytes: one.table.allocate_young(one.arena, nbytes, 2)):
        kept = one.allocate(5000)
        del kept
        one.table.collect()
        one.table._enter, entering = enter, one.table._enter  # type: ignore[method-assign]
        with pytest.raises(Refused):
            allocate(5000)
        one.table._enter = entering  # type: ignore[method-assign]
        one.table.reclaim()
        assert one.allocator.blocks_in_use == 0


# Blocks of a peer -------------------------------------------------------------------------------------------------


def test_of_a_peers_blocks_an_interrupt_anywhere_leaves_no_lease() -> None:
    lost = 0
    for pair, moment in each_moment():
        lent = [pair.a.allocate(nbytes) for nbytes in SIZES]
        received = [pair.send(block, pair.a, pair.b) for block in lent]
        pair.b.table.note_slab(received[0])
        again = [pair.send(block, pair.a, pair.b) for block in lent[:2]]

        def drop() -> None:
            again.pop()
            received.pop()
            pair.b.table.collect()
            received.clear()
            again.clear()
            pair.b.table.collect()

        place = interrupt(drop, moment)
        received.clear()
        again.clear()
        pair.b.table.collect()
        lent.clear()
        pair.give_backs(pair.b, pair.a)
        lost += pair.a.allocator.blocks_in_use > 0
        pair.b.table.reclaim()
        pair.give_backs(pair.b, pair.a)
        pair.a.table.collect()
        pair.check()
        assert pair.a.allocator.blocks_in_use == 0, place
        if place is None:
            break
    assert moment > 50
    assert lost > 5, "or reclaim has nothing to do here"


def test_a_block_that_was_sent_anew_before_its_end_was_told_lives() -> None:
    found = 0
    for pair, moment in each_moment():
        block = pair.a.allocate(5000)
        received = [pair.send(block, pair.a, pair.b)]
        received.clear()
        place = interrupt(pair.b.table.collect, moment)
        found += bool(pair.b.table._unsettled)
        received = [pair.send(block, pair.a, pair.b)]
        pair.b.table.reclaim()
        pair.give_backs(pair.b, pair.a)
        pair.check()
        (entry,) = pair.a.table._entries.values()
        assert entry.lent == 1, place
        received.clear()
        del block
        pair.b.table.collect()
        pair.give_backs(pair.b, pair.a)
        pair.a.table.collect()
        assert pair.a.allocator.blocks_in_use == 0, place
        if place is None:
            break
    assert found > 3


def test_the_next_worker_of_a_slot_is_not_told_of_what_the_one_before_had_lent() -> None:
    found = 0
    for pair, moment in each_moment():
        received = [pair.send(pair.a.allocate(5000), pair.a, pair.b)]
        received.clear()
        place = interrupt(pair.b.table.collect, moment)
        found += bool(pair.b.table._unsettled)
        pair.b.table.forget(pair.b.other)  # the worker a dies; b is the parent
        lives = pair.b.table.live_blocks(pair.b.other, pair.b.mapped[1])
        pair.b.table.reclaim()
        told = pair.b.table.take_give_backs(pair.b.other)
        assert [offset for _, offset, _ in told] == [offset for offset, _ in lives], place
        if place is None:
            break
    assert found > 3


def test_the_arena_of_a_pool_that_ended_is_closed_though_an_interrupt_came() -> None:
    for pair, moment in each_moment():
        block = [pair.a.allocate(5000), pair.a.allocate(200)]

        def end() -> None:
            pair.a.table.remove(pair.a.arena)
            block.clear()

        place = interrupt(end, moment)
        block.clear()
        pair.a.table.remove(pair.a.arena)
        pair.a.table.reclaim()
        assert pair.a.arena.fd == -1, place
        if place is None:
            break
    assert moment > 20


# What lives ------------------------------------------------------------------------------------------------------


def lose_some(one: Process) -> None:
    """As interrupts would: blocks without an entry, and bytes that are nowhere."""
    for nbytes in SIZES:
        assert one.allocator.allocate(nbytes) is not None
    freed = [one.allocate(nbytes) for nbytes in (300, 30_000)]
    freed.clear()
    one.table.collect()
    for offsets in one.allocator._young.values():
        offsets.pop()
    one.allocator._cold.take(64)


def stamp(block: Block, number: int) -> tuple[Block, bytes]:
    content = bytes([number % 251]) * block.nbytes
    block.view[:] = content
    return block, content


def let_go(one: Process, kept: list[tuple[Block, bytes]]) -> None:
    del kept[0]
    one.table.collect()


def exchange(one: Process, kept: list[tuple[Block, bytes]]) -> None:
    let_go(one, kept)
    kept.append(stamp(one.allocate(5000), 9))


NESTED: dict[str, Callable[[Process, list[tuple[Block, bytes]]], object]] = {
    "a new block": lambda one, kept: kept.append(stamp(one.allocate(5000), 7)),
    "a block goes": let_go,
    "one goes, one comes": exchange,
    "a trim": lambda one, kept: one.table.trim(),
    "the same": lambda one, kept: one.table.reclaim(),
}


@pytest.mark.parametrize("name", NESTED)
def test_user_code_in_the_midst_of_it(name: str) -> None:
    for pair, moment in each_moment():
        one = pair.a
        kept = [stamp(one.allocate(nbytes), number) for number, nbytes in enumerate(SIZES * 2)]
        lose_some(one)

        place = interrupt(one.table.reclaim, moment, lambda: NESTED[name](one, kept))
        kept.append(stamp(one.allocate(5000), 101))
        kept.append(stamp(one.allocate(150_000), 102))
        assert all(block.view == content for block, content in kept), place
        kept.clear()
        one.table.reclaim()
        one.table.check()
        assert one.allocator.blocks_in_use == 0, place
        if place is None:
            break
    assert moment > 100


def test_user_code_that_drops_a_peers_blocks_in_the_midst_of_it() -> None:
    """Of one block the peer was not told, as an interrupt came between, and it has sent it once more."""
    for torn, moment in itertools.product((7, 12, 17, 22), range(1, 120)):
        pair = Pair()
        lent = [pair.a.allocate(nbytes) for nbytes in SIZES]
        received = [pair.send(block, pair.a, pair.b) for block in lent]
        del received[2]
        interrupt(pair.b.table.collect, torn)
        received.append(pair.send(lent[2], pair.a, pair.b))

        def let_go(received: list[Block] = received, pair: Pair = pair) -> None:
            received.clear()
            pair.b.table.collect()

        place = interrupt(pair.b.table.reclaim, moment, let_go)
        let_go()
        pair.b.table.reclaim()
        pair.give_backs(pair.b, pair.a)
        lent.clear()
        pair.a.table.collect()
        pair.check()
        assert pair.a.allocator.blocks_in_use == 0, place
        pair.close()


def test_user_code_that_drops_a_peers_other_blocks_as_one_goes() -> None:
    for pair, moment in each_moment():
        received = [pair.send(pair.a.allocate(nbytes), pair.a, pair.b) for nbytes in SIZES]

        def let_go(received: list[Block] = received, pair: Pair = pair) -> None:
            received.clear()
            pair.b.table.collect()

        del received[-1]
        place = interrupt(pair.b.table.collect, moment, let_go)
        let_go()
        pair.give_backs(pair.b, pair.a)
        pair.check()
        assert pair.a.allocator.blocks_in_use == 0, place
        if place is None:
            break
    assert moment > 10


def test_what_a_forked_child_held_is_free_after_it_though_an_interrupt_came() -> None:
    for pair, moment in each_moment():
        table, blocks = pair.a.table, [pair.a.allocate(nbytes) for nbytes in SIZES]
        table.before_fork()
        _, kept_by_child = table._pipes._next
        child = os.dup(kept_by_child)
        table.after_fork_in_parent()
        read_end = table._pipes.living[0]
        blocks.clear()
        table.collect()
        assert pair.a.allocator.blocks_in_use == len(SIZES)
        os.close(child)  # it ended
        place = interrupt(table.collect, moment)
        table.collect()
        table.reclaim()
        pair.check()
        assert pair.a.allocator.blocks_in_use == 0, place
        with contextlib.suppress(OSError):  # what an interrupt may leave open
            os.close(read_end)
        if place is None:
            break
    assert moment > 20


def test_it_starts_no_collection_however_many_blocks_there_are(one: Process) -> None:
    # A collection runs finalizers, and one that waits for the pool would wait for who wants the table's lock.
    kept = [one.allocate(64) for _ in range(5000)]
    freed = [one.allocate(64) for _ in range(5000)]
    freed.clear()
    one.table.collect()
    phases: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        phases.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        one.table.reclaim()
    finally:
        gc.callbacks.remove(note)
    assert not phases
    assert one.allocator.blocks_in_use == len(kept)


def test_threads_that_use_their_blocks_meanwhile(pair: Pair) -> None:
    one, over, failures, rounds = pair.a, threading.Event(), [], [0, 0]

    def work(seed: int) -> None:
        chance, kept = random.Random(seed), []
        memory = Memory(one.arena, lambda seconds: False, one.table)
        while not over.is_set():
            for block in [one.allocate(chance.choice(SIZES)), *memory.exchange_some(5000, 3)]:
                kept.append(stamp(block, chance.randrange(251)))
            rounds[seed] += 1
            while len(kept) > 20:
                block, content = kept.pop(chance.randrange(len(kept)))
                if block.view != content:
                    failures.append(block)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        while min(rounds) < 200 and all(thread.is_alive() for thread in threads):
            one.table.reclaim()
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert not failures
    assert min(rounds) >= 200, "one of them failed"
    one.table.reclaim()
    assert one.allocator.blocks_in_use == 0


def in_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
