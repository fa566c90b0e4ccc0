"""Lists of tensors of one dtype and shape travel as one object; and arrive as if they had not."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from codec_peer import Peering, codec_for, new_arena
from hypothesis import given, settings
from hypothesis import strategies as st

from tpool.errors import SharedMemoryExhausted, TransportError
from tpool.tensors import leases, reducers_alike, storages
from tpool.tensors.pickler import Codec

MODES = [("share", True), ("copy", True), ("share", False)]


@pytest.fixture
def as_one(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each list that was taken for alike: whether it travelled as one object."""
    seen: list[bool] = []
    places = reducers_alike._places

    def noted(*args: Any) -> Any:
        seen.append((found := places(*args)) is not None)
        return found

    monkeypatch.setattr(reducers_alike, "_places", noted)
    return seen


def travel(peering: Peering, mode: tuple[str, bool], obj: Any, act: str = "echo") -> Any:
    sharing, can_swap = mode
    codec: Codec = codec_for(peering.arena, sharing, can_swap)  # type: ignore[arg-type]
    return codec.loads(peering.ask("", codec.dumps(obj), sharing=sharing, can_swap=can_swap, act=act))


def alike(count: int, *size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.full(size, number, dtype=dtype) for number in range(count)]


def check_arrived(sent: list[torch.Tensor], back: Any) -> None:
    assert type(back) is list
    for one, other in zip(sent, back, strict=True):
        assert (one.dtype, one.shape, one.stride(), one.requires_grad) == (
            other.dtype,
            other.shape,
            other.stride(),
            other.requires_grad,
        )
        assert vars(one) == vars(other)
        assert torch.equal(one, other)


@given(
    count=st.integers(1, 70),
    size=st.lists(st.integers(0, 7), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.int8, torch.bool, torch.complex64]),
    mode=st.sampled_from(MODES),
)
@settings(deadline=None, max_examples=60)
def test_whatever_the_size(peering: Peering, count: int, size: list[int], dtype: torch.dtype, mode: Any) -> None:
    sent = alike(count, *size, dtype=dtype)
    check_arrived([each.clone() for each in sent], travel(peering, mode, sent))


@pytest.mark.parametrize("mode", MODES[:2], ids=str)
@pytest.mark.parametrize("numel", [2, 1000, 3000, 100_000])  # in slabs, and with blocks of their own
def test_many_travel_as_one_object(peering: Peering, as_one: list[bool], mode: Any, numel: int) -> None:
    sent = alike(20, numel)
    check_arrived([each.clone() for each in sent], travel(peering, mode, sent))
    assert as_one == [True]


def with_grad(tensors: list[torch.Tensor]) -> None:
    tensors[11].requires_grad_()


def with_attribute(tensors: list[torch.Tensor]) -> None:
    tensors[11].name_of_it = "eleven"  # type: ignore[attr-defined]


def with_a_class_as_attribute(tensors: list[torch.Tensor]) -> None:
    tensors[11].kind = torch.Tensor  # type: ignore[attr-defined]


def with_other_dtype(tensors: list[torch.Tensor]) -> None:
    tensors[11] = torch.zeros(2, 6, dtype=torch.float64)


def with_other_shape(tensors: list[torch.Tensor]) -> None:
    tensors[11] = torch.zeros(3, 4)


def transposed(tensors: list[torch.Tensor]) -> None:
    tensors[11] = torch.arange(12.0).view(6, 2).t()


def with_part_of_a_storage(tensors: list[torch.Tensor]) -> None:
    tensors[11] = torch.arange(24.0)[:12].view(2, 6)


def negated(tensors: list[torch.Tensor]) -> None:
    tensors[11] = torch._neg_view(torch.ones(2, 6))


def shared_by_torch(tensors: list[torch.Tensor]) -> None:
    tensors[11].share_memory_()


def large_and_one_shared_by_torch(tensors: list[torch.Tensor]) -> None:
    tensors[:] = alike(20, 5000)
    shared_by_torch(tensors)


def large_and_one_with_part_of_a_storage(tensors: list[torch.Tensor]) -> None:
    tensors[:] = alike(20, 5000)
    tensors[11] = torch.arange(10_000.0)[:5000]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "odd",
    [
        with_grad,
        with_attribute,
        with_a_class_as_attribute,
        with_other_dtype,
        with_other_shape,
        transposed,
        with_part_of_a_storage,
        negated,
        shared_by_torch,
        large_and_one_shared_by_torch,
        large_and_one_with_part_of_a_storage,
    ],
)
def test_one_that_is_not_alike_arrives_as_it_was(peering: Peering, as_one: list[bool], mode: Any, odd: Any) -> None:
    sent = alike(20, 2, 6)
    odd(sent)
    check_arrived(list(sent), travel(peering, mode, sent))
    assert True not in as_one


OTHER_KINDS = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(3, device="meta"),
    "one number": lambda: torch.tensor(5.0),
}


@pytest.mark.filterwarnings("ignore")  # of prototypes
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_tensors_of_other_kinds(peering: Peering, as_one: list[bool], mode: Any, place: int, kind: str) -> None:
    """Not every kind has a shape, or a number of bytes."""
    for others in (alike(9, 3), [OTHER_KINDS[kind]() for _ in range(9)]):
        others.insert(place, OTHER_KINDS[kind]())
        back = travel(peering, mode, others)
        assert [each.layout for each in back] == [each.layout for each in others]
        assert [each.dtype for each in back] == [each.dtype for each in others]
        assert len(back) == 10
    if kind != "one number":
        assert True not in as_one


def test_a_list_that_is_sent_leaves_nothing_on_its_tensors(peering: Peering) -> None:
    """Not even an empty ``__dict__``, which the caller's tensors would keep."""
    sent = alike(20, 5000)
    payload = codec_for(peering.arena, "share").dumps(sent)
    assert len(payload.blocks) == 20
    new = torch.zeros(5)
    for those, like in ((sent, new), ([tensor.untyped_storage() for tensor in sent], new.untyped_storage())):
        assert set(map(type, gc.get_referents(*those))) == set(map(type, gc.get_referents(like)))


def test_an_attribute_that_leads_back_to_the_list(peering: Peering) -> None:
    sent = alike(10, 3)
    sent[4].others = sent  # type: ignore[attr-defined]
    back = travel(peering, ("share", True), sent)
    assert back[4].others is back


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_gradient_arrives(peering: Peering, mode: Any) -> None:
    sent = alike(20, 3)
    sent[7].requires_grad_().grad = torch.full((3,), 5.0)
    assert torch.equal(travel(peering, mode, sent)[7].grad, torch.full((3,), 5.0))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("numel", [12, 5000])
def test_tensors_that_share_memory_do_so_where_they_arrive(peering: Peering, mode: Any, numel: int) -> None:
    base = torch.zeros(numel)
    sent = [*alike(10, numel), base, base[:], base.view(numel)]
    back = travel(peering, mode, sent)
    assert back[10].untyped_storage()._cdata == back[11].untyped_storage()._cdata == back[12].untyped_storage()._cdata
    back[10][3] = 9
    assert back[11][3] == back[12][3] == 9
    assert back[8][3] == 8  # and no others


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_same_tensor_twice_is_one_where_it_arrives(peering: Peering, mode: Any) -> None:
    sent = alike(10, 12)
    back = travel(peering, mode, [*sent, sent[4]])
    assert back[10] is back[4]


@pytest.mark.parametrize("numel", [12, 5000])
def test_the_receivers_writes_are_seen_and_a_resend_moves_nothing(peering: Peering, numel: int) -> None:
    sent = alike(40, numel)
    travel(peering, ("share", True), sent, act="write")
    assert all(bool(tensor.eq(99).all()) for tensor in sent)
    addresses = [tensor.data_ptr() for tensor in sent]
    travel(peering, ("share", True), sent)
    assert [tensor.data_ptr() for tensor in sent] == addresses


@pytest.mark.parametrize("numel", [12, 5000])
def test_what_was_received_is_sent_on_from_where_it_lies(peering: Peering, as_one: list[bool], numel: int) -> None:
    mode = ("share", True)
    there = travel(peering, mode, alike(40, numel))
    addresses = [tensor.data_ptr() for tensor in there]
    check_arrived(alike(40, numel), travel(peering, mode, there))
    assert [tensor.data_ptr() for tensor in there] == addresses
    assert as_one == [True, True]


def test_a_subclass_or_a_parameter_among_them(peering: Peering) -> None:
    sent = [*alike(10, 12), torch.nn.Parameter(torch.ones(12))]
    back = travel(peering, ("share", True), sent)
    assert [type(each) for each in back] == [type(each) for each in sent]


def while_memory_is_waited_for(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[None]:
    """Call ``act`` the first time that memory is asked for; the list has one item once that was done."""
    done: list[None] = []

    def after(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def allocate_after(*arguments: Any, **options: Any) -> Any:
            if not done:
                done.append(None)
                act()
            return allocate(*arguments, **options)

        return allocate_after

    for name in ("allocate", "exchange_some"):
        monkeypatch.setattr(leases.Memory, name, after(getattr(leases.Memory, name)))
    return done


@pytest.mark.parametrize("numel", [100, 10_000])
@pytest.mark.parametrize("becomes", [0, 1, 50_000])
@pytest.mark.parametrize("which", [0, 11])
def test_a_storage_that_changes_its_size_while_memory_is_waited_for(
    peering: Peering, monkeypatch: pytest.MonkeyPatch, numel: int, becomes: int, which: int
) -> None:
    """As a signal handler, a finalizer or another thread may do: no memory is read or written that is not there."""
    codec = codec_for(peering.arena, "share")
    sent = alike(20, numel)
    done = while_memory_is_waited_for(monkeypatch, lambda: sent[which].untyped_storage().resize_(4 * becomes))
    payload = None
    with contextlib.suppress(RuntimeError, TransportError):  # torch has no tensor beyond its storage
        payload = codec.dumps(sent)
    assert done
    monkeypatch.undo()
    unchanged = [at for at in range(10) if at != which]
    check_arrived([alike(10, numel)[at] for at in unchanged], [sent[at] for at in unchanged])
    if payload is not None:
        assert torch.equal(sent[12], torch.full((numel,), 12.0))


@pytest.mark.parametrize("sizes", [(50_000,), (0, 20_000)])
def test_a_lone_storage_that_changes_its_size_while_memory_is_waited_for(
    peering: Peering, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    codec = codec_for(peering.arena, "share")
    sent = torch.zeros(10_000)
    while_memory_is_waited_for(monkeypatch, lambda: [sent.untyped_storage().resize_(nbytes) for nbytes in sizes])
    with pytest.raises(TransportError, match="was resized, or shared"):
        codec.dumps(sent)
    assert sent.untyped_storage().nbytes() == sizes[-1]


@pytest.mark.parametrize("numel", [100, 10_000])
@pytest.mark.parametrize("which", [0, 11])
def test_a_storage_that_somebody_else_sends_while_memory_is_waited_for(
    peering: Peering, monkeypatch: pytest.MonkeyPatch, numel: int, which: int
) -> None:
    codec = codec_for(peering.arena, "share")
    sent = alike(20, numel)
    others: list[Any] = []
    while_memory_is_waited_for(monkeypatch, lambda: others.append(codec.dumps(sent[which])))
    payload = codec.dumps(sent)
    monkeypatch.undo()
    codec.loads(peering.ask("", payload, act="write"))
    assert all(bool(tensor.eq(99).all()) for tensor in sent)
    assert float(codec.loads(peering.ask("", others[0]))[0]) == 99


def test_an_interrupt_keeps_no_blocks_of_those_that_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    arena, ledger = new_arena(budget=1 << 30)
    codec = Codec(leases.Memory(arena, lambda seconds: False))
    allocator = leases.table().allocator(arena)
    assert allocator is not None
    codec.dumps(alike(20, 25_000))
    move, calls = storages.move_storage, itertools.count()

    def move_interrupted(*arguments: Any) -> bool:
        if next(calls) == 2:
            assert allocator.blocks_in_use > 10
            raise KeyboardInterrupt
        return move(*arguments)

    monkeypatch.setattr(storages, "move_storage", move_interrupted)
    sent = alike(20, 25_000)
    try:
        with pytest.raises(KeyboardInterrupt) as interrupt:
            codec.dumps(sent)
        leases.table().collect()
        assert allocator.blocks_in_use <= 3
        del interrupt, sent
        leases.table().collect()
        assert allocator.blocks_in_use == 0
    finally:
        leases.table().remove(arena)
        ledger.close()


def test_a_list_that_torch_shares_needs_no_memory_of_ours() -> None:
    arena, ledger = new_arena(budget=1 << 20)
    memory = leases.Memory(arena, lambda seconds: False)
    try:
        kept = [memory.allocate(nbytes) for nbytes in (900_000, 60_000)]
        with pytest.raises(SharedMemoryExhausted):
            memory.allocate(1 << 17)
        payload = Codec(memory).dumps([torch.zeros(100).share_memory_() for _ in range(10)])
        assert len(payload.fds) == 10
        assert not payload.blocks
        del kept
    finally:
        leases.table().collect()
        leases.table().remove(arena)
        ledger.close()
