"""A large free block that a busy arena has not needed for long goes back to the system; one that it needs does not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.extents import LARGE_NBYTES
from tpool.tensors.idle import TURNS, USES, Idle

MIB = 1 << 20
SIZE = 2 * MIB


@pytest.fixture
def allocator() -> Iterator[Allocator]:
    arena, ledger = Arena.create(1024 * MIB), Ledger.create(1, 1024 * MIB)
    allocator = Allocator(arena, ledger, 0)
    yield allocator
    allocator.check()
    arena.close()
    ledger.close()


def use(allocator: Allocator, count: int, times: int, nbytes: int = SIZE) -> None:
    """So many blocks are in use at one time, and free then; so many times."""
    for _ in range(times):
        offsets = [allocator.allocate(nbytes) for _ in range(count)]
        for offset in offsets:
            assert offset is not None
            allocator.free(offset)


def blocks(allocator: Allocator) -> int:
    return allocator.committed_nbytes // SIZE


def test_what_was_needed_once_goes_back_piece_by_piece(allocator: Allocator) -> None:
    use(allocator, 8, 1)
    held = []
    for _ in range(8 * USES):
        use(allocator, 2, 1)
        held.append(blocks(allocator))
    assert held[USES // 2 - 6] == 8, "two to a round, and seven before"
    assert all(0 <= before - after <= 1 for before, after in pairwise(held))
    assert held[-1] == 2


def test_what_is_needed_now_and_then_stays(allocator: Allocator) -> None:
    for _ in range(20):
        use(allocator, 8, 1)
        use(allocator, 2, USES // 2 - 8)
    assert blocks(allocator) == 8


def test_one_block_used_for_ever_stays(allocator: Allocator) -> None:
    use(allocator, 1, 1)
    allocator.arena.view(0, 4)[:] = b"mark"
    use(allocator, 1, 10 * USES)
    assert allocator.allocate(SIZE) == 0
    assert bytes(allocator.arena.view(0, 4)) == b"mark", "the pages are still those"


def test_a_list_of_tensors_that_is_let_go_stays_for_the_next(allocator: Allocator) -> None:
    use(allocator, 4 * USES, 3)
    assert blocks(allocator) == 4 * USES


def test_beside_much_memory_a_few_uses_are_not_many(allocator: Allocator) -> None:
    kept = allocator.allocate(512 * MIB)
    assert kept is not None
    use(allocator, 8, 1)
    before = blocks(allocator)
    use(allocator, 2, TURNS * before // 2 - 6)
    assert blocks(allocator) == before
    use(allocator, 2, 6)
    assert blocks(allocator) == before - 1
    allocator.free(kept)


def test_small_blocks_and_those_of_other_sizes_stay(allocator: Allocator) -> None:
    use(allocator, 8, 1, LARGE_NBYTES)
    use(allocator, 8, 1, 3 * MIB)
    committed_nbytes = allocator.committed_nbytes
    use(allocator, 2, 10 * USES, LARGE_NBYTES)
    assert allocator.committed_nbytes == committed_nbytes


def test_a_signal_handler_that_takes_all_free_blocks() -> None:
    idle = Idle(uses=1, turns=0)
    assert not idle.too_long(SIZE, [], 0)
    assert not idle.too_long(SIZE, [1, 2], 0)
    assert not idle.too_long(SIZE, [], 0)
    assert not idle.too_long(SIZE, [1, 2], 0)
    assert idle.too_long(SIZE, [1, 2], 0)


class Impatient(RuleBasedStateMachine):
    """Large blocks, of which one goes back whenever two others were used without it."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger.create(1, 24 * MIB)
        self.arena = Arena.create(32 * MIB)
        self.allocator = Allocator(self.arena, self.ledger, 0)
        self.allocator._idle = Idle(uses=2, turns=0)
        self.live: dict[int, tuple[int, bytes]] = {}
        self.count = 0

    @rule(nbytes=st.sampled_from([5000, MIB + 1, 2 * MIB, 2 * MIB + 100_000]))
    def allocate(self, nbytes: int) -> None:
        offset = self.allocator.allocate(nbytes)
        if offset is not None:
            assert all(offset + nbytes <= start or start + size <= offset for start, (size, _) in self.live.items())
            self.count += 1
            mark = self.count.to_bytes(4, "little")
            self.live[offset] = nbytes, mark
            for first in (0, nbytes // 2, nbytes - 4):
                self.arena.view(offset + first, 4)[:] = mark

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[offset]
        self.allocator.free(offset)

    @precondition(lambda self: len(self.live) > 1)
    @rule()
    def free_all(self) -> None:
        for offset in list(self.live):
            del self.live[offset]
            self.allocator.free(offset)

    @rule(aged_only=st.booleans())
    def trim(self, aged_only: bool) -> None:
        self.allocator.trim(aged_only=aged_only)

    @invariant()
    def holds(self) -> None:
        self.allocator.check()
        for offset, (nbytes, mark) in self.live.items():
            for first in (0, nbytes // 2, nbytes - 4):
                assert bytes(self.arena.view(offset + first, 4)) == mark, "pages of a block in use went back"

    def teardown(self) -> None:
        for offset in self.live:
            self.allocator.free(offset)
        self.allocator.trim()
        self.allocator.check()
        assert self.allocator.committed_nbytes == 0
        self.arena.close()
        self.ledger.close()


Impatient.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestImpatient = Impatient.TestCase
