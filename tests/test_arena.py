from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import SupportsIndex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from interrupting import AlarmError, interrupt

from tpool.errors import PlatformError, ProtocolError
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.extents import ALIGNMENT, LARGE_NBYTES, Extents, class_nbytes, whole_pages_nbytes
from tpool.tensors.memfd import PAGE_NBYTES

MIB = 1 << 20
PAGE = PAGE_NBYTES


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    ledger = Ledger.create(2, 64 * MIB)
    yield ledger
    ledger.close()


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(256 * MIB)
    yield arena
    arena.close()


@pytest.fixture
def allocator(arena: Arena, ledger: Ledger) -> Iterator[Allocator]:
    allocator = Allocator(arena, ledger, 0)
    yield allocator
    allocator.check()


def resident_nbytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def take(allocator: Allocator, nbytes: int) -> int:
    offset = allocator.allocate(nbytes)
    assert offset is not None
    return offset


def touch(allocator: Allocator, offset: int, nbytes: int) -> None:
    allocator.arena.view(offset, nbytes)[:] = b"x" * nbytes


# Sizes ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 1 << 44))
def test_classes(nbytes: int) -> None:
    size = class_nbytes(nbytes)
    assert nbytes <= size
    assert class_nbytes(size) == size
    assert size % (ALIGNMENT if size < PAGE else PAGE) == 0
    if nbytes > LARGE_NBYTES:
        assert size <= nbytes * 1.04
    elif nbytes > 8 * PAGE:
        assert size <= nbytes * 1.13
    assert class_nbytes(nbytes + 1) >= size
    if nbytes > 1:
        assert class_nbytes(nbytes - 1) <= size


@given(st.integers(0, 20 * PAGE), st.integers(0, 20 * PAGE))
def test_whole_pages(start: int, length: int) -> None:
    end = start + length
    pages = [page for page in range(50) if start <= page * PAGE and (page + 1) * PAGE <= end]
    assert whole_pages_nbytes(start, end) == len(pages) * PAGE


def test_extents_find_a_range_beyond_many_that_are_a_little_too_small() -> None:
    extents = Extents()
    extents.put(0, 0)
    assert extents.take(64) is None
    extents.put(0, 3 * PAGE)
    for index in range(1, 200):
        extents.put(index * 10 * PAGE, index * 10 * PAGE + 2 * PAGE)
    assert extents.take(3 * PAGE) == (0, 3 * PAGE)
    assert extents.take(3 * PAGE) is None
    assert extents.take_containing(50 * PAGE + 1, 51 * PAGE) == (50 * PAGE, 52 * PAGE)
    assert extents.take_containing(50 * PAGE + 1, 51 * PAGE) is None
    assert len(extents.peek()) == len(list(extents.take_all())) == 198
    assert list(extents.take_all()) == []


# Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 64, 65, 4000, 4096, 5000, MIB, 3 * MIB + 1])
def test_alignment(allocator: Allocator, nbytes: int) -> None:
    take(allocator, 1)
    for _ in range(5):
        assert take(allocator, nbytes) % (ALIGNMENT if class_nbytes(nbytes) < PAGE else PAGE) == 0


@pytest.mark.parametrize("nbytes", [10, 5000, 2 * MIB])
def test_the_block_freed_last_is_used_first(allocator: Allocator, nbytes: int) -> None:
    offsets = [take(allocator, nbytes) for _ in range(5)]
    for offset in offsets:
        allocator.free(offset)
    assert [take(allocator, nbytes) for _ in range(5)] == offsets[::-1]


def test_a_burst_of_small_blocks_lies_together(allocator: Allocator) -> None:
    big = [take(allocator, 100_000) for _ in range(3)]
    offsets = [take(allocator, 100) for _ in range(100)]
    assert offsets == list(range(offsets[0], offsets[0] + 128 * 100, 128))
    for offset in big:
        allocator.free(offset)
    more = [take(allocator, 100) for _ in range(10)]
    assert more == list(range(offsets[-1] + 128, offsets[-1] + 128 * 11, 128))


def test_a_large_request_takes_a_warm_block_that_is_a_little_larger(allocator: Allocator) -> None:
    warm = take(allocator, 10 * MIB)
    allocator.free(warm)
    committed = allocator.committed_nbytes
    assert take(allocator, 9 * MIB) == warm
    assert allocator.committed_nbytes == committed
    allocator.free(warm)
    assert take(allocator, 5 * MIB) != warm


def test_freeing_twice_is_an_error(allocator: Allocator) -> None:
    offset = take(allocator, 10)
    allocator.free(offset)
    with pytest.raises(KeyError):
        allocator.free(offset)


# The budget -------------------------------------------------------------------------------------------------------


def test_only_new_pages_count(allocator: Allocator, ledger: Ledger) -> None:
    offsets = [take(allocator, 64) for _ in range(PAGE // 64)]
    assert ledger.committed_nbytes(0) == PAGE
    take(allocator, 64)
    assert ledger.committed_nbytes(0) == 2 * PAGE
    for offset in offsets:
        allocator.free(offset)
    assert ledger.committed_nbytes() == 2 * PAGE
    for _ in offsets:
        take(allocator, 64)
    assert ledger.committed_nbytes() == 2 * PAGE


def test_warm_reuse_does_not_look_at_the_ledger(allocator: Allocator, ledger: Ledger) -> None:
    offset = take(allocator, 5000)
    allocator.free(offset)
    ledger.set_committed(1, 1 << 40)
    assert take(allocator, 5000) == offset
    assert allocator.allocate(5000) is None


def test_the_budget_is_shared(allocator: Allocator, ledger: Ledger) -> None:
    ledger.set_committed(1, 60 * MIB)
    first = take(allocator, 4 * MIB)
    assert allocator.allocate(1) is None
    assert ledger.committed_nbytes(0) == 4 * MIB
    ledger.set_committed(1, 60 * MIB - PAGE)
    take(allocator, 1)
    allocator.free(first)


def test_free_memory_of_other_sizes_makes_room(allocator: Allocator, arena: Arena) -> None:
    offsets = [take(allocator, MIB) for _ in range(64)]
    for offset in offsets:
        touch(allocator, offset, MIB)
        allocator.free(offset)
    assert take(allocator, 60 * MIB) == 0
    assert resident_nbytes(arena) == 0
    assert allocator.allocate(6 * MIB) is None


def test_a_full_arena(ledger: Ledger) -> None:
    arena = Arena.create(MIB)
    allocator = Allocator(arena, ledger, 0)
    offsets = [take(allocator, 2048) for _ in range(512)]
    assert allocator.allocate(1) is None
    for offset in offsets[::2]:
        allocator.free(offset)
    assert allocator.allocate(4096) is None, "no hole is that large"
    allocator.free(offsets[1])
    allocator.free(offsets[511])
    assert {take(allocator, 4096), take(allocator, 4096)} == {0, MIB - 4096}
    allocator.check()
    arena.close()


# Trimming ---------------------------------------------------------------------------------------------------------


def test_trim_gives_back_whole_pages_and_keeps_what_lives(allocator: Allocator, arena: Arena) -> None:
    small = [take(allocator, 64) for _ in range(1000)]
    large = [take(allocator, 10 * PAGE) for _ in range(10)]
    for offset in [*small, *large]:
        touch(allocator, offset, 64)
    kept = small[::100]
    for offset in [*(offset for offset in small if offset not in kept), *large]:
        allocator.free(offset)
    before = allocator.committed_nbytes
    given_back = allocator.trim()
    assert given_back == before - allocator.committed_nbytes > 100 * PAGE
    assert resident_nbytes(arena) == allocator.committed_nbytes == 10 * PAGE
    assert all(bytes(arena.view(offset, 64)) == b"x" * 64 for offset in kept)
    assert allocator.trim() == 0
    for offset in kept:
        allocator.free(offset)
    allocator.trim()
    assert (resident_nbytes(arena), allocator.committed_nbytes, allocator.blocks_in_use) == (0, 0, 0)


def test_trim_of_aged_memory_keeps_what_was_used_since(allocator: Allocator) -> None:
    idle, busy = take(allocator, 20 * PAGE), take(allocator, 20 * PAGE)
    allocator.free(idle)
    allocator.free(busy)
    assert allocator.trim(aged_only=True) == 0
    assert take(allocator, 20 * PAGE) == busy
    allocator.free(busy)
    assert allocator.trim(aged_only=True) == 20 * PAGE
    assert take(allocator, 20 * PAGE) == busy
    allocator.free(busy)
    assert allocator.trim(aged_only=True) == 0
    assert allocator.trim(aged_only=True) == 20 * PAGE
    assert allocator.committed_nbytes == 0


def test_where_nothing_can_be_discarded_memory_stays_warm(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def discard(self: Arena, offset: int, nbytes: int) -> None:
        raise PlatformError("not here")

    offsets = [take(allocator, 5000) for _ in range(10)]
    for offset in offsets:
        allocator.free(offset)
    with monkeypatch.context() as patch:
        patch.setattr(Arena, "discard", discard)
        assert allocator.trim() == 0
    allocator.check()
    assert sorted(take(allocator, 5000) for _ in offsets) == offsets


# A new owner ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ascending", [True, False])
def test_a_successor_keeps_living_blocks_and_warm_pages(
    allocator: Allocator, arena: Arena, ledger: Ledger, ascending: bool
) -> None:
    sizes = [100, 5000, 64, 3 * MIB, 200_000, 4096]
    blocks = {take(allocator, size): size for size in sizes}
    for offset, size in blocks.items():
        touch(allocator, offset, size)
    living = sorted(blocks.items(), reverse=not ascending)[::2]
    ledger.set_waiting(0, True)
    successor = Allocator(Arena.attach(os.dup(arena.fd), arena.id), ledger, 0)
    for offset, size in living:
        successor.reserve(offset, size)
    successor.adopt()
    successor.check()
    assert not ledger.anyone_waiting()
    assert resident_nbytes(arena) <= successor.committed_nbytes <= allocator.committed_nbytes
    committed = successor.committed_nbytes
    warm = max(size for offset, size in blocks.items() if (offset, size) not in living)
    fresh = take(successor, warm)
    assert successor.committed_nbytes == committed, "warm memory was there"
    spans = [(offset, offset + size) for offset, size in living]
    assert all(fresh + warm <= start or end <= fresh for start, end in spans)
    for offset in [*dict(living), fresh]:
        successor.free(offset)
    successor.trim()
    assert (successor.committed_nbytes, resident_nbytes(arena)) == (0, 0)
    successor.check()
    successor.arena.close()
    # The fixture's check looks at the ledger again.
    ledger.set_committed(0, allocator.committed_nbytes)


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(-64, 64), (1, 64), (64, PAGE), (0, 0), (0, -5), (256 * MIB, 1), (0, 1 << 50), (PAGE, 64)]
)
def test_impossible_blocks_are_refused(allocator: Allocator, offset: int, nbytes: int) -> None:
    allocator.reserve(PAGE, 64)
    with pytest.raises(ProtocolError):
        allocator.reserve(offset, nbytes)
    allocator.adopt()


class Raced(list[int]):
    """Free blocks that a signal handler takes in the moment in which one is asked for."""

    def pop(self, *args: SupportsIndex) -> int:
        if len(self) < 3:
            self.clear()
        return super().pop(*args)


def test_a_signal_handler_that_takes_the_last_free_blocks(allocator: Allocator) -> None:
    offsets = [take(allocator, 5000) for _ in range(5)]
    for offset in offsets:
        allocator.free(offset)
    (size,) = allocator._young
    allocator._young[size] = Raced(offsets)
    assert sorted(allocator.allocate_young(5000, 5)) == offsets[2:]
    allocator._young[size] = Raced(offsets[:2])
    assert allocator.allocate_young(5000, 5) == []
    allocator._young[size] = Raced(offsets[:2])
    assert allocator.trim() == 0
    for offset in offsets[2:]:
        allocator.free(offset)
    allocator._young[size] += offsets[:2]


def fill_with_all_kinds(arena: Arena, ledger: Ledger) -> Allocator:
    """Blocks in use, young and aged ones, warm and cold extents, and a bump extent."""
    former = Allocator(arena, ledger, 0)
    for offset in [take(former, MIB) for _ in range(4)]:
        touch(former, offset, MIB)
    allocator = Allocator(arena, ledger, 0)
    allocator.reserve(MIB, MIB)
    allocator.adopt()
    offsets = [take(allocator, nbytes) for nbytes in (100, 5000, 70_000, 100, 5000, 70_000, 3 * MIB)]
    for offset in offsets[::2]:
        allocator.free(offset)
    allocator.trim(aged_only=True)
    allocator.free(offsets[1])
    allocator.check()
    return allocator


def free_ranges(allocator: Allocator) -> list[tuple[int, int]]:
    spans = [*allocator._cold.peek(), *allocator._warm.peek(), (allocator._bump, allocator._bump_end)]
    for lists in (allocator._young, allocator._aged):
        spans += [(offset, offset + size) for size, offsets in lists.items() for offset in offsets]
    return [span for span in spans if span[0] < span[1]]


def lost_ranges(allocator: Allocator) -> list[tuple[int, int]]:
    """Those that are neither free nor in use."""
    used = [(offset, offset + size) for offset, size in allocator._sizes.items()]
    lost, end = [], 0
    for start, stop in sorted([*free_ranges(allocator), *used]):
        assert start >= end, "given twice"
        if start > end:
            lost.append((end, start))
        end = stop
    return lost if end == allocator.arena.nbytes else [*lost, (end, allocator.arena.nbytes)]


def test_a_trim_that_is_interrupted_as_it_gives_memory_back_loses_nothing(ledger, monkeypatch) -> None:
    discard = Arena.discard
    for moment in range(100):
        left = moment

        def interrupted(self: Arena, start: int, nbytes: int) -> None:
            nonlocal left
            discard(self, start, nbytes)
            left -= 1
            if left < 0:
                raise AlarmError

        arena = Arena.create(256 * MIB)
        allocator = fill_with_all_kinds(arena, ledger)
        with monkeypatch.context() as patch, contextlib.suppress(AlarmError):
            patch.setattr(Arena, "discard", interrupted)
            allocator.trim()
        for _ in range(2):
            allocator.check()
            allocator.trim()
        arena.close()
        if left >= 0:
            break
    assert moment > 2


@pytest.mark.parametrize("discards", [True, False])
def test_a_trim_that_is_interrupted_anywhere_gives_nothing_twice_and_loses_one_range_at_most(
    ledger, discards: bool, monkeypatch
) -> None:
    if not discards:
        monkeypatch.setattr(Arena, "discard", refuse)
    for moment in itertools.count(1):
        arena = Arena.create(16 * MIB)
        allocator = fill_with_all_kinds(arena, ledger)
        free = free_ranges(allocator)
        place = interrupt(allocator.trim, moment)
        lost = lost_ranges(allocator)
        assert len(lost) <= 1, place
        for start, end in lost:
            joined = start in [first for first, _ in free] and end in [last for _, last in free]
            assert (start, end) in free or (discards and joined), place
        used = allocator.used_nbytes
        allocator.reclaim(lambda offset: True)
        allocator.check()
        assert allocator.used_nbytes == used
        arena.close()
        if place is None:
            break
    assert moment > 50


def test_what_an_interrupt_lost_anywhere_is_found_where_it_lay(ledger) -> None:
    kinds: dict[bool, int] = {True: 0, False: 0}
    for moment in itertools.count(1):
        arena = Arena.create(16 * MIB)
        allocator = fill_with_all_kinds(arena, ledger)
        lives = set(allocator._sizes)

        def use(allocator: Allocator = allocator) -> None:
            offsets = [take(allocator, nbytes) for nbytes in (100, 5000, 70_000, 3 * MIB, 5 * MIB)]
            for offset in offsets:
                touch(allocator, offset, 100)
            allocator.free(offsets.pop())
            offsets += allocator.allocate_young(5 * MIB, 2)
            for offset in offsets:
                allocator.free(offset)

        place = interrupt(use, moment)
        before = lost_ranges(allocator)
        resident = resident_nbytes(arena)
        allocator.reclaim(lives.__contains__)
        allocator.check()
        assert set(allocator._sizes) == lives, place
        assert resident_nbytes(arena) == resident, "found as it was"
        assert allocator.committed_nbytes >= resident, place
        for start, end in before:
            kinds[bool(arena.find_pages(start, end))] += 1
        allocator.trim()
        allocator.check()
        assert resident_nbytes(arena) <= MIB + 70_000 + 2 * PAGE, place
        arena.close()
        if place is None:
            break
    assert kinds[True] > 2
    assert kinds[False] > 2


def refuse(arena: Arena, start: int, nbytes: int) -> None:
    raise PlatformError("no")


def test_who_comes_between_does_not_leave_the_ledger_with_an_old_number(ledger, monkeypatch) -> None:
    got = []
    for moment in itertools.count():
        arena = Arena.create(16 * MIB)
        allocator = Allocator(arena, ledger, 0)
        for offset in [take(allocator, MIB) for _ in range(4)][::2]:
            allocator.free(offset)
        calls, tell, taken = itertools.count(), Ledger.set_committed, []

        def tell_late(ledger: Ledger, index: int, nbytes: int) -> None:
            if next(calls) == moment:
                taken.append(allocator.allocate(MIB))  # None where all that is free is in the hands of the trim
            tell(ledger, index, nbytes)

        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "set_committed", tell_late)
            allocator.trim()
        allocator.check()
        arena.close()
        got += taken
        if not taken:
            break
    assert got.count(None) < len(got)


def test_a_collection_that_frees_a_block_of_another_size_in_the_middle_of_a_trim(arena, ledger) -> None:
    class Blocks(dict[int, list[int]]):
        """Those of each size; whenever pairs are made, which may start a collection, one of another size is freed."""

        def items(self):  # type: ignore[override]
            for pair in super().items():
                self.setdefault(3 * MIB, [])
                yield pair

    allocator = fill_with_all_kinds(arena, ledger)
    allocator._young = Blocks(allocator._young)
    allocator.trim()
    allocator.check()


# Anything, in any order -------------------------------------------------------------------------------------------


class Anything(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger.create(2, MIB)
        self.arena = Arena.create(2 * MIB)
        self.allocator = Allocator(self.arena, self.ledger, 0)
        self.live: dict[int, int] = {}

    @rule(nbytes=st.sampled_from([1, 64, 100, 700, 2048, 4095, 4097, 9000, 70_000, 300_000, MIB + 1]))
    def allocate(self, nbytes: int) -> None:
        offset = self.allocator.allocate(nbytes)
        if offset is not None:
            spans = [(start, start + size) for start, size in self.live.items()]
            assert all(offset + nbytes <= start or end <= offset for start, end in spans)
            self.live[offset] = nbytes

    @rule(nbytes=st.sampled_from([64, 700, 4097, 9000]), count=st.integers(0, 4))
    def allocate_young(self, nbytes: int, count: int) -> None:
        before = self.allocator.committed_nbytes
        offsets = self.allocator.allocate_young(nbytes, count)
        assert len(offsets) <= count
        assert self.allocator.committed_nbytes == before, "what was freed lately costs no new pages"
        assert not self.live.keys() & set(offsets)
        self.live.update(dict.fromkeys(offsets, nbytes))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[offset]
        self.allocator.free(offset)

    @rule(aged_only=st.booleans())
    def trim(self, aged_only: bool) -> None:
        self.allocator.trim(aged_only=aged_only)

    @rule(nbytes=st.sampled_from([0, MIB // 2, MIB]))
    def others_commit(self, nbytes: int) -> None:
        self.ledger.set_committed(1, nbytes)

    @rule(order=st.randoms(use_true_random=False))
    def replace_the_owner(self, order) -> None:  # type: ignore[no-untyped-def]
        blocks = list(self.live.items())
        order.shuffle(blocks)  # draws, and may end the example: before anything is changed
        self.allocator = Allocator(self.arena, self.ledger, 0)
        for block in blocks:
            self.allocator.reserve(*block)
        self.allocator.adopt()

    @invariant()
    def holds(self) -> None:
        self.allocator.check()
        assert self.allocator.blocks_in_use == len(self.live)

    def teardown(self) -> None:
        for offset in self.live:
            self.allocator.free(offset)
        self.allocator.trim()
        self.allocator.check()
        assert self.allocator.committed_nbytes == 0
        self.ledger.set_committed(1, 0)
        assert self.allocator.allocate(MIB) == 0, "all memory is in one piece again"
        self.arena.close()
        self.ledger.close()


Anything.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestAnything = Anything.TestCase
