"""Every kind, from one process to another and back, through the codec alone; and what the two modes promise."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from typing import Any

import kinds
import numpy as np
import pytest
import torch
from codec_peer import Peering, codec_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import KINDS, Kind, quiet, same

from tpool.errors import UnsupportedTensorError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(ComplexHalf|quantize|prototype|beta state|TypedStorage|nvariant|jit).*"
)

MODES = {"share": ("share", True), "share without swap": ("share", False), "copy": ("copy", True)}


@pytest.fixture(scope="module")
def peering() -> Iterator[Peering]:
    peering = Peering()
    yield peering
    peering.close()
    kinds.forget_scratch()


def travel(peering: Peering, obj: Any, mode: str, kind: str = "", act: str = "echo") -> Any:
    """There and back: what the child answers, decoded."""
    sharing, can_swap = MODES[mode]
    codec = codec_for(peering.arena, sharing, can_swap)
    with quiet():
        received = peering.ask(kind, codec.dumps(obj), sharing=sharing, can_swap=can_swap, act=act)
        return codec.loads(received)


def marked(kind: Kind) -> Any:
    marks = []
    if kind.cuda:
        marks = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
    elif "by name" in kind.name:
        marks = [pytest.mark.leaves("torch starts a process that outlives the tensors it names")]
    return pytest.param(kind, id=kind.name, marks=marks)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [marked(kind) for kind in KINDS if kind.status != "refused"])
def test_kind_arrives_and_returns(peering: Peering, kind: Kind, mode: str) -> None:
    with quiet():
        arrived = travel(peering, kind.make(), mode, kind.name)
        kind.check(kind.make(), arrived)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [marked(kind) for kind in KINDS if kind.status == "refused"])
def test_kind_is_refused(peering: Peering, kind: Kind, mode: str) -> None:
    sharing, can_swap = MODES[mode]
    with pytest.raises(UnsupportedTensorError, match=re.escape(kind.note)):
        codec_for(peering.arena, sharing, can_swap).dumps([kind.make()])


# What "share" means ------------------------------------------------------------------------------------------------


SHARED = {
    "a tensor": lambda: torch.zeros(3),
    "a view": lambda: torch.zeros(10)[3:7],
    "a transposed tensor": lambda: torch.zeros(3, 4).t(),
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(3)),
    "a tensor shared through torch": lambda: torch.zeros(3).share_memory_(),
    "a tensor from numpy": lambda: torch.from_numpy(np.zeros(3)),
}


@pytest.mark.parametrize("mode", ["share", "share without swap"])
@pytest.mark.parametrize("make", [make for name, make in SHARED.items() if "numpy" not in name])
def test_a_write_of_the_receiver_is_seen_by_the_sender(peering: Peering, make: Any, mode: str) -> None:
    tensor = make()
    travel(peering, tensor, mode, act="write")
    assert tensor.detach().eq(99).all()


def test_a_tensor_from_numpy_is_shared_and_the_array_stays_as_it_was(peering: Peering) -> None:
    array = np.zeros(3)
    tensor = torch.from_numpy(array)
    travel(peering, tensor, "share", act="write")
    assert tensor.eq(99).all()
    assert array.tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3).to_sparse_csr()])
def test_the_values_of_a_sparse_tensor_are_shared(peering: Peering, make: Any) -> None:
    tensor = make()
    travel(peering, tensor.values(), "share", act="write")
    assert tensor.values().eq(99).all()


def test_what_comes_back_is_the_same_memory(peering: Peering) -> None:
    tensor = torch.arange(1000.0)
    back = travel(peering, tensor[10:], "share")
    assert back.data_ptr() == tensor[10:].data_ptr()
    back[0] = -1
    assert tensor[10] == -1


def test_a_received_tensor_is_sent_on_without_a_copy(peering: Peering) -> None:
    arrived = travel(peering, 1000, "share", act="fresh")
    address = arrived.data_ptr()
    again = travel(peering, arrived, "share")
    assert again.data_ptr() == arrived.data_ptr() == address


def test_a_storage_sent_twice_has_one_memory_at_the_receiver(peering: Peering) -> None:
    tensor = torch.zeros(5)
    travel(peering, tensor, "share", act="keep")
    travel(peering, tensor, "share", act="write")
    kept = travel(peering, None, "share", act="kept")
    assert kept.eq(99).all()
    del kept
    travel(peering, None, "share", act="forget")


@pytest.mark.parametrize("mode", MODES)
def test_a_shared_file_stays_the_same_file(peering: Peering, mode: str, tmp_path: Any) -> None:
    file = tmp_path / "numbers"
    file.write_bytes(bytes(16))
    tensor = torch.from_file(str(file), shared=True, size=4)
    travel(peering, tensor, mode, act="write")
    assert np.fromfile(file, dtype=np.float32).tolist() == [99] * 4
    back = travel(peering, tensor, mode)
    back[0] = 1
    assert tensor[0] == 1


def test_a_private_file_is_never_written(peering: Peering, tmp_path: Any) -> None:
    file = tmp_path / "numbers"
    file.write_bytes(bytes(16))
    tensor = torch.from_file(str(file), shared=False, size=4)
    travel(peering, tensor, "share", act="write")
    assert tensor.eq(99).all()
    assert file.read_bytes() == bytes(16)


# What "copy" means -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SHARED if "through torch" not in name])
def test_copy_leaves_the_senders_tensor_alone(peering: Peering, name: str) -> None:
    tensor = SHARED[name]()
    address = tensor.data_ptr()
    travel(peering, tensor, "copy", act="write")
    assert tensor.detach().eq(0).all()
    assert tensor.data_ptr() == address


def test_copy_keeps_what_the_user_shared_on_purpose(peering: Peering) -> None:
    tensor = torch.zeros(3).share_memory_()
    travel(peering, [tensor, tensor[1:]], "copy", act="write")
    assert tensor.eq(99).all()


def test_copy_also_copies_what_lies_in_shared_memory_already(peering: Peering) -> None:
    tensor = torch.zeros(3)
    travel(peering, tensor, "share")
    travel(peering, tensor, "copy", act="write")
    assert tensor.eq(0).all()


def test_a_result_in_mode_copy_leaves_the_workers_tensor_alone(peering: Peering) -> None:
    travel(peering, torch.zeros(3), "copy", act="keep")
    travel(peering, None, "copy", act="kept").fill_(5)
    assert travel(peering, None, "copy", act="kept").eq(0).all()
    travel(peering, None, "copy", act="forget")


def test_copy_sends_only_the_bytes_of_a_view(peering: Peering) -> None:
    base = torch.arange(1_000_000.0)
    payload = codec_for(peering.arena, "copy").dumps([base[500_000:500_100], base[7]])
    assert sorted(block.nbytes for block in payload.blocks) == [32, 400]


# Lifetime ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_block_is_given_back(peering: Peering, mode: str) -> None:
    def live() -> tuple[int, int]:
        far = peering.child_lives()
        peering.table.collect()
        peering.child_lives()  # what we gave back on the way is settled there now
        return len(peering.table._entries), far

    gc.collect()
    before = live()
    tensors = [torch.arange(100.0), torch.arange(5000.0)[10:], torch.eye(4).to_sparse()]
    arrived = travel(peering, [*tensors, np.arange(5000.0)], mode)
    same(tensors, arrived[:3])
    assert live() != before or mode == "share without swap"
    del arrived, tensors
    assert live() == before
    peering.table.check([peering.link.peer])


def test_100_000_small_tensors_in_one_message(peering: Peering) -> None:
    tensors = list(torch.arange(300_000.0).reshape(100_000, 3).clone().unbind())
    own = [tensor.clone() for tensor in tensors[:50_000]]
    arrived = travel(peering, own + tensors[50_000:], "share", act="stack")
    assert torch.equal(arrived, torch.stack(tensors))


# Any structure of views --------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.int64, torch.uint8, torch.bool, torch.bfloat16, torch.complex64, torch.float64]


@st.composite
def views(draw: st.DrawFn) -> list[torch.Tensor]:
    """Tensors of random dtypes, shapes, strides and offsets on a few storages, with random bits."""
    tensors = []
    for _ in range(draw(st.integers(1, 3))):
        nbytes = draw(st.integers(1, 64)) * 16
        storage = torch.randint(0, 2, (nbytes,), dtype=torch.uint8).untyped_storage()
        for _ in range(draw(st.integers(1, 3))):
            tensors.append(draw(one_view(storage)))
    return tensors


@st.composite
def one_view(draw: st.DrawFn, storage: torch.UntypedStorage) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    room = storage.nbytes() // dtype.itemsize - 1
    offset = draw(st.integers(0, room))
    room -= offset
    size, stride = [], []
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.integers(0, 5))
        longest = min(room // step if step else 4, 6)
        length = draw(st.integers(0, longest + 1))
        room -= max(length - 1, 0) * step
        size.append(length)
        stride.append(step)
    tensor = torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
    if dtype.is_complex and draw(st.booleans()):
        tensor = tensor.conj()
    if dtype.is_floating_point and draw(st.booleans()):
        tensor = torch._neg_view(tensor)
    return tensor


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tensors=views())
def test_any_structure_of_views_arrives(peering: Peering, mode: str, tensors: list[torch.Tensor]) -> None:
    addresses = [tensor.untyped_storage()._cdata for tensor in tensors]
    expected = [tensor.clone() for tensor in tensors]
    arrived = travel(peering, tensors, mode)
    for one, original, other in zip(expected, tensors, arrived, strict=True):
        assert (original.dtype, original.shape, original.stride()) == (other.dtype, other.shape, other.stride())
        assert (original.is_conj(), original.is_neg()) == (other.is_conj(), other.is_neg())
        assert torch.equal(one, other)
        assert torch.equal(one, original)
    if mode != "copy":
        assert [tensor.storage_offset() for tensor in tensors] == [tensor.storage_offset() for tensor in arrived]
        theirs = [tensor.untyped_storage()._cdata for tensor in arrived]
        assert [[a == b for b in theirs] for a in theirs] == [[a == b for b in addresses] for a in addresses]
