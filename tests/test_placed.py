"""Results that nobody else knows are copied into shared memory; what anybody may know is moved, as ever."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pool_tasks as tasks
import pytest
import torch
from codec_peer import Peering, codec_for, new_arena
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tpool
from tpool.errors import SharedMemoryExhausted
from tpool.local.calls import EARLY_NBYTES
from tpool.tensors import leases, placed, torch_private
from tpool.tensors.leases import Memory
from tpool.tensors.placed import Placed, place_last

DTYPES = [torch.float32, torch.int8, torch.bool, torch.complex64, torch.bfloat16, torch.float8_e4m3fn]
LARGE = EARLY_NBYTES // 4  # float32 values

needs_counts = pytest.mark.skipif(not torch_private.COUNTS_USES, reason="this torch does not count uses")
pytestmark = needs_counts


def place(values: list[Any], memory: Memory, least_nbytes: int = EARLY_NBYTES) -> bool:
    """Whether the last value was placed."""
    place_last(values, memory, least_nbytes)
    return type(values[-1]) is Placed


def never_wait(seconds: float) -> bool:
    raise AssertionError("it waits")


@pytest.fixture
def memory() -> Iterator[Memory]:
    arena, ledger = new_arena(budget=4 << 20)
    yield Memory(arena, never_wait)
    leases.table().remove(arena)
    ledger.close()


# What travels -----------------------------------------------------------------------------------------------------


@given(
    size=st.lists(st.integers(2, 4), min_size=1, max_size=9),
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, 12),
    listed=st.booleans(),
)
@example(size=[2] * 9, dtype=torch.float32, count=1, listed=False)
@settings(deadline=None, max_examples=80)
def test_it_arrives_as_the_tensor(
    peering: Peering, size: list[int], dtype: torch.dtype, count: int, listed: bool
) -> None:
    codec = codec_for(peering.arena, "share")
    values: list[Any] = []
    expected = []
    for _ in range(count):
        values.append(torch.randint(2, size).to(dtype))
        expected.append(values[-1].clone())
        assert place(values, codec.memory, 1)
    sent = values if listed or count > 1 else values[0]
    payload = codec.dumps(sent)
    assert len(payload.blocks) == count
    back = codec.loads(peering.ask("", payload))
    for one, other in zip(expected, back if type(sent) is list else [back], strict=True):
        assert type(other) is torch.Tensor
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_among_others(peering: Peering) -> None:
    codec = codec_for(peering.arena, "share")
    values: list[Any] = []
    for number in range(20):
        values.append(torch.full((number // 10 + 2, 3), float(number)))
        if number % 7:
            assert place(values, codec.memory, 1)
    for sent in (
        values,
        values[15:],
        values[1:7],
        {"some": values[3:5], "last": values[8]},
        [*values[1:5], "text"] * 2,
    ):
        back = codec.loads(peering.ask("", codec.dumps(sent)))
        flat = back if type(back) is list else [*back["some"], back["last"]]
        numbers = {id(value): number for number, value in enumerate(values)}
        sent_flat = sent if type(sent) is list else [*sent["some"], sent["last"]]
        for one, other in zip(sent_flat, flat, strict=True):
            if type(one) is str:
                assert other == one
            else:
                assert other.shape == (numbers[id(one)] // 10 + 2, 3)
                assert bool(other.eq(numbers[id(one)]).all())


LISTS: dict[str, Callable[[int], torch.Tensor]] = {
    "alike": lambda number: torch.full((3, 4), float(number)),
    "of two shapes": lambda number: torch.full((3, 4) if number < 9 else (4, 3), float(number)),
    "of two types": lambda number: torch.full((3, 4), number, dtype=torch.int32 if number < 9 else torch.float32),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_that_are_alike_and_others(peering: Peering, name: str) -> None:
    codec, values = codec_for(peering.arena, "share"), []
    for number in range(12):
        values.append(LISTS[name](number))
        assert place(values, codec.memory, 1)
    for number, back in enumerate(codec.loads(peering.ask("", codec.dumps(values)))):  # type: ignore[call-overload]
        assert back.dtype == LISTS[name](number).dtype
        assert torch.equal(back, LISTS[name](number))


def test_its_block_goes_with_it(memory: Memory) -> None:
    table = leases.table()
    allocator = table.allocator(memory.arena)
    assert allocator is not None
    values: list[Any] = [torch.ones(LARGE)]
    assert place(values, memory)
    assert allocator.used_nbytes == 4 * LARGE
    values.clear()
    table.collect()
    assert allocator.used_nbytes == 0


# What does not ----------------------------------------------------------------------------------------------------

held: list[Any] = []


def keep(tensor: Any) -> Any:
    held.append(tensor)
    return tensor


def under(tensor: torch.Tensor, hold: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    held.append(hold(tensor))
    return tensor


def with_attribute() -> torch.Tensor:
    tensor = torch.ones(LARGE)
    tensor.name_of_it = "ones"  # type: ignore[attr-defined]
    return tensor


def saved_for_backward() -> torch.Tensor:
    tensor = torch.ones(LARGE)
    held.append((torch.ones(LARGE, requires_grad=True) * tensor).sum())
    return tensor


def weak_storage(tensor: torch.Tensor) -> Any:
    return weakref.ref(tensor.untyped_storage())


class Own(torch.Tensor):
    pass


OTHERS: dict[str, Callable[[], Any]] = {
    "one that somebody keeps": lambda: keep(torch.ones(LARGE)),
    "one of which somebody keeps a view": lambda: under(torch.ones(LARGE), lambda tensor: tensor[3:]),
    "one whose memory somebody keeps under another": lambda: under(torch.ones(LARGE), torch.Tensor.detach),
    "one whose storage somebody keeps": lambda: under(torch.ones(LARGE), torch.Tensor.untyped_storage),
    "one that numpy knows": lambda: under(torch.ones(LARGE), torch.Tensor.numpy),
    "one that DLPack knows": lambda: under(torch.ones(LARGE), torch.Tensor.__dlpack__),
    "one that autograd has saved": saved_for_backward,
    "one that somebody knows weakly": lambda: under(torch.ones(LARGE), weakref.ref),
    "one whose storage somebody knows weakly": lambda: under(torch.ones(LARGE), weak_storage),
    "a view": lambda: torch.ones(LARGE + 1)[1:],
    "a part": lambda: torch.ones(LARGE + 1)[:LARGE],
    "a transposed one": lambda: torch.empty_strided((LARGE, 4), (1, LARGE)),
    "one with memory to spare": lambda: torch.ones(LARGE + 1).resize_(LARGE),
    "an expanded one": lambda: torch.ones(1).expand(LARGE),
    "one with a dimension of 1": lambda: torch.ones(1, LARGE),
    "one that requires grad": lambda: torch.ones(LARGE, requires_grad=True),
    "one with an attribute": with_attribute,
    "one of a subclass": lambda: torch.ones(LARGE).as_subclass(Own),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(LARGE)),
    "a conjugate": lambda: torch.ones(LARGE, dtype=torch.complex64).conj(),
    "a sparse one": lambda: torch.ones(LARGE).to_sparse(),
    "one without memory": lambda: torch.ones(LARGE, device="meta"),
    "one that torch shares": lambda: torch.ones(LARGE).share_memory_(),
    "a small one": lambda: torch.ones(LARGE - 1),
    "an empty one": lambda: torch.ones(0),
    "an array": lambda: np.ones(LARGE),
    "none": lambda: None,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_stays_as_it_is(memory: Memory, name: str) -> None:
    values = [OTHERS[name]()]
    one = id(values[0])
    try:
        assert not place(values, memory)
        assert id(values[0]) == one
        allocator = leases.table().allocator(memory.arena)
        assert allocator is not None
        assert allocator.used_nbytes == 0
    finally:
        held.clear()


def test_what_lies_in_a_block_stays_there(memory: Memory) -> None:
    values: list[Any] = [torch.frombuffer(memory.allocate(EARLY_NBYTES).view, dtype=torch.float32)]
    assert not place(values, memory)
    assert type(values[0]) is torch.Tensor


def test_without_memory_it_stays_and_nobody_waits(memory: Memory) -> None:
    taken, values = memory.allocate(3 << 20), [torch.ones(2 << 18)]
    with pytest.raises(SharedMemoryExhausted):
        place(values, memory)
    assert values[0].numel() == 2 << 18
    del taken
    leases.table().collect()
    assert place(values, memory)


def test_a_debugger_that_looks_at_variables_adds_nothing_to_what_is_counted() -> None:
    def trace(frame: Any, event: str, argument: object) -> Any:
        frame.f_locals.get("values")
        return trace

    tensor, before = torch.ones(3), sys.gettrace()
    sys.settrace(trace)
    try:
        counted = placed._sole_references([torch.ones(3)])
        of_known = placed._sole_references([tensor])
    finally:
        sys.settrace(before)
    assert counted == placed._SOLE_REFERENCES
    assert of_known == (counted[0] + 1, counted[1])


# In a pool --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[tpool.Pool]:
    with tpool.Pool(1) as pool:
        pool.apply(tasks.identity, (1,))
        yield pool


CALLS: dict[str, Callable[[tpool.Pool, Any, list[int]], list[Any]]] = {
    "apply": lambda pool, function, numbers: [pool.apply(function, (number,)) for number in numbers],
    "map": lambda pool, function, numbers: pool.map(function, numbers, len(numbers)),
    "map, one by one": lambda pool, function, numbers: pool.map(function, numbers, 1),
    "imap": lambda pool, function, numbers: list(pool.imap(function, numbers)),
    "imap in chunks": lambda pool, function, numbers: list(pool.imap(function, numbers, 4)),
}


@pytest.mark.parametrize("call", CALLS)
def test_results_that_nobody_keeps_are_copied(pool: tpool.Pool, call: str) -> None:
    pool.apply(tasks.count_placed, (0,))
    results = CALLS[call](pool, tasks.make_counting_placed, list(range(1, 13)))
    assert [int(result[0]) for result in results] == list(range(1, 13))
    assert pool.apply(tasks.count_placed, (0,)) == 12


@pytest.mark.parametrize("call", CALLS)
def test_what_a_worker_keeps_is_one_memory_with_the_callers(pool: tpool.Pool, call: str) -> None:
    results = CALLS[call](pool, tasks.make_and_keep, list(range(1, 13)))
    pool.apply(tasks.fill_what_is_kept, (7,))
    assert all(bool(result.eq(7).all()) for result in results)
    assert pool.apply(tasks.fill_what_is_kept, (0,)) == 12


def test_results_on_one_memory_stay_so(pool: tpool.Pool) -> None:
    first, second, third = pool.map(tasks.make_parts, range(3), 3)
    first.fill_(5)
    assert bool(second.eq(5).all())
    assert bool(third.eq(5).all())
    first, second = pool.apply(tasks.make_parts, (0,)), pool.apply(tasks.make_parts, (0,))
    first.fill_(6)
    assert bool(second.eq(6).all())


def test_what_a_worker_knows_weakly_is_one_tensor_for_a_chunk(pool: tpool.Pool) -> None:
    first, second, third = pool.map(tasks.make_once_for_a_while, range(3), 3)
    assert first is second is third


def test_an_argument_that_is_the_result_is_not_copied(pool: tpool.Pool) -> None:
    sent = [torch.full((LARGE,), float(number)) for number in range(12)]
    for call in CALLS.values():
        for back, one in zip(call(pool, tasks.identity, sent), sent, strict=True):  # type: ignore[arg-type]
            assert back.data_ptr() == one.data_ptr()


def test_with_copies_nothing_is_placed_early() -> None:
    with tpool.Pool(1, sharing="copy") as pool:
        for call in CALLS.values():
            call(pool, tasks.make_counting_placed, [1, 2, 3])
        assert pool.apply(tasks.count_placed, (0,)) == 0
