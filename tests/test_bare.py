"""Messages that are one tensor travel without a pickle; and arrive as if they had one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from codec_peer import Peering, codec_for, new_arena
from hypothesis import given, settings
from hypothesis import strategies as st

from tpool.errors import DecodeError, SharedMemoryExhausted
from tpool.tensors import bare, leases
from tpool.tensors.pickler import Codec, Received

MODES = [("share", True), ("copy", True), ("share", False)]
DTYPES = [torch.float32, torch.int8, torch.bool, torch.complex64, torch.bfloat16, torch.float8_e4m3fn]


def codec_of(peering: Peering, mode: tuple[str, bool]) -> Codec:
    return codec_for(peering.arena, *mode)  # type: ignore[arg-type]


def travel(peering: Peering, mode: tuple[str, bool], obj: Any, act: str = "echo") -> Any:
    codec = codec_of(peering, mode)
    return codec.loads(peering.ask("", codec.dumps(obj), sharing=mode[0], can_swap=mode[1], act=act))


def is_bare(payload: Any) -> bool:
    return type(payload.data) is bytes and payload.data[-1] in (bare.BARE, bare.LISTED)


@given(
    size=st.lists(st.integers(0, 5), max_size=10),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    listed=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_whatever_the_size(peering: Peering, size: list[int], dtype: torch.dtype, mode: Any, listed: bool) -> None:
    tensor = torch.randint(2, size).to(dtype)
    before = tensor.clone()
    back = travel(peering, mode, [tensor] if listed else tensor)
    if listed:
        assert type(back) is list
        (back,) = back
    assert (back.dtype, back.shape, back.stride()) == (dtype, before.shape, before.stride())
    assert torch.equal(back.view(torch.uint8) if size else back, before.view(torch.uint8) if size else before)


@pytest.mark.parametrize("mode", MODES[:2], ids=str)
@pytest.mark.parametrize("size", [(), (2,), (3, 4), (2, 3, 4, 5, 2, 2, 2, 2), (100_000,)])
def test_what_needs_no_pickle(peering: Peering, mode: Any, size: tuple[int, ...]) -> None:
    codec = codec_of(peering, mode)
    payload = codec.dumps(torch.zeros(size))
    assert is_bare(payload)
    assert len(payload.blocks) == 1
    assert is_bare(codec.dumps([torch.zeros(size)]))


class Own(torch.Tensor):
    pass


def with_attribute() -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.name_of_it = "four"  # type: ignore[attr-defined]
    return tensor


def with_grad() -> torch.Tensor:
    tensor = torch.zeros(4, requires_grad=True)
    tensor.grad = torch.full((4,), 5.0)
    return tensor


OTHERS = {
    "a view": lambda: torch.arange(12.0)[3:7],
    "turned": lambda: torch.arange(12.0).view(3, 4).t(),
    "a dimension of 1": lambda: torch.zeros(3, 1, 4),
    "nine dimensions": lambda: torch.zeros([2] * 9),
    "empty": lambda: torch.zeros(0, 3),
    "requires grad": lambda: torch.zeros(4, requires_grad=True),
    "a gradient": with_grad,
    "an attribute": with_attribute,
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(4)),
    "a subclass": lambda: torch.zeros(4).as_subclass(Own),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conjugate": lambda: torch.zeros(4, dtype=torch.complex64).conj(),
    "meta": lambda: torch.zeros(4, device="meta"),
    "shared by torch": lambda: torch.zeros(4).share_memory_(),
    "two": lambda: [torch.zeros(4), torch.zeros(4)],
    "a tuple": lambda: (torch.zeros(4),),
    "none": list,
}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_needs_one(peering: Peering, mode: Any, listed: bool, kind: str) -> None:
    obj: Any = OTHERS[kind]()
    obj = [obj] if listed else obj
    assert not is_bare(codec_of(peering, mode).dumps(obj))
    if kind != "a subclass":  # the other end knows no class of this module
        back = travel(peering, mode, obj)
        for one, other in zip(back if listed else [back], obj if listed else [obj], strict=True):
            assert type(one) is type(other)
            if isinstance(other, torch.Tensor) and other.device.type == "cpu" and other.layout is torch.strided:
                assert one.stride() == other.stride()
                assert one.requires_grad == other.requires_grad
                assert vars(one) == vars(other)
                assert torch.equal(one, other)


def test_a_list_that_leads_back_to_itself(peering: Peering) -> None:
    tensor = torch.zeros(4)
    sent = [tensor]
    tensor.list_of_it = sent  # type: ignore[attr-defined]
    back = travel(peering, ("share", True), sent)
    assert back[0].list_of_it is back


def test_one_that_lies_in_a_slab(peering: Peering) -> None:
    codec = codec_of(peering, ("share", True))
    tensors = [torch.full((50,), float(number)) for number in range(40)]
    kept = codec.dumps(tensors)
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert not is_bare(codec.dumps(tensors[7]))
    assert travel(peering, ("share", True), tensors[7])[3] == 7
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert kept.blocks


def test_the_receivers_writes_are_seen_and_a_resend_moves_nothing(peering: Peering) -> None:
    tensor = torch.zeros(4000)
    travel(peering, ("share", True), tensor, act="write")
    assert bool(tensor.eq(99).all())
    address = tensor.data_ptr()
    back = travel(peering, ("share", True), tensor)
    assert back.data_ptr() == tensor.data_ptr() == address


def test_in_mode_copy_the_tensor_stays_where_it_is(peering: Peering) -> None:
    tensor = torch.zeros(4000)
    address = tensor.data_ptr()
    travel(peering, ("copy", True), tensor, act="write")
    assert tensor.data_ptr() == address
    assert bool(tensor.eq(0).all())


def test_without_memory_it_raises_once_and_keeps_nothing() -> None:
    arena, ledger = new_arena(budget=1 << 20)
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return False

    codec = Codec(leases.Memory(arena, wait))
    try:
        kept = codec.dumps(torch.zeros(600_000, dtype=torch.uint8))
        with pytest.raises(SharedMemoryExhausted, match="drop tensors"):
            codec.dumps(torch.zeros(600_000, dtype=torch.uint8))
        assert len(waits) == 1
        del kept
        leases.table().collect()
        assert codec.dumps(torch.zeros(900_000, dtype=torch.uint8)).blocks
    finally:
        leases.table().collect()
        leases.table().remove(arena)
        ledger.close()


@pytest.mark.parametrize("damage", [b"", b"\x01", b"\x09\x01", b"\x02\x01", b"\x00\x01"])
def test_what_is_no_tensor_is_refused(peering: Peering, damage: bytes) -> None:
    codec = codec_of(peering, ("share", True))
    payload = codec.dumps(torch.zeros(4))
    with pytest.raises(DecodeError):
        codec.loads(Received(damage, list(payload.blocks)))
    with pytest.raises(DecodeError):
        codec.loads(Received(payload.data, []))
