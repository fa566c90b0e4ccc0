"""Every kind, from one process to another and back, through the codec alone; and what the two modes promise."""

from __future__ import annotations

import gc
import itertools
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from codec_peer import Peering, codec_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kinds import KINDS, Kind, quiet, same

from tpool.errors import UnsupportedTensorError
from tpool.tensors import arrivals

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(ComplexHalf|quantize|prototype|beta state|TypedStorage|nvariant|jit).*"
)

MODES = {"share": ("share", True), "share without swap": ("share", False), "copy": ("copy", True)}


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

# Quantized dtypes aside, which need a quantizer.
DTYPES = [dtype for name, dtype in arrivals.DTYPES.items() if not name.startswith("q")]


@dataclass
class View:
    """A tensor to be made on one of a few storages."""

    storage: int
    dtype: torch.dtype
    offset: int
    size: list[int]
    stride: list[int]
    conj: bool
    neg: bool
    requires_grad: bool

    def on(self, storages: list[torch.UntypedStorage]) -> torch.Tensor:
        tensor = torch.empty(0, dtype=self.dtype).set_(storages[self.storage], self.offset, self.size, self.stride)
        tensor = tensor.conj() if self.conj else tensor
        tensor = torch._neg_view(tensor) if self.neg else tensor
        return tensor.requires_grad_(self.requires_grad)


@st.composite
def structures(draw: st.DrawFn) -> tuple[list[int], list[View]]:
    """The sizes of storages, and views of random dtypes, shapes, strides, offsets and bits on them."""
    sizes = draw(st.lists(st.integers(0, 64).map(lambda n: 16 * n), min_size=1, max_size=3))
    return sizes, [draw(views(number, nbytes)) for number, nbytes in enumerate(sizes) for _ in range(draw(TO_3))]


TO_3 = st.integers(1, 3)


@st.composite
def views(draw: st.DrawFn, storage: int, nbytes: int) -> View:
    dtype = draw(st.sampled_from(DTYPES))
    room = nbytes // dtype.itemsize - 1
    offset = draw(st.integers(0, max(room, 0)))
    room -= offset
    size, stride = [], []
    for _ in range(draw(st.integers(0, 3))):
        step = draw(st.integers(0, 5))
        longest = min(room // step if step else 4, 6) if room >= 0 else -1
        length = draw(st.integers(0, longest + 1))
        room -= max(length - 1, 0) * step
        size.append(length)
        stride.append(step)
    if room < 0 and 0 not in size:  # no room for a single element
        size, stride = [0], [1]
    number = dtype.is_complex or dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    conj, neg, grad = (draw(st.booleans()) for _ in range(3))
    neg = neg and number and dtype is not torch.complex32  # torch cannot read such a tensor
    return View(storage, dtype, offset, size, stride, conj and dtype.is_complex, neg, grad and number)


def span(tensor: torch.Tensor) -> range:
    """The bytes of its storage from a tensor's first to its last."""
    if not tensor.numel():
        return range(0)
    start = tensor.storage_offset() * tensor.element_size()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return range(start, start + (last + 1) * tensor.element_size())


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(structure=structures())
def test_any_structure_of_views_arrives(peering: Peering, mode: str, structure: tuple[list[int], list[View]]) -> None:
    sizes, chosen = structure
    contents = [bytes((7 * number + i) % 251 for i in range(nbytes)) for number, nbytes in enumerate(sizes)]
    with quiet():
        storages = [torch.UntypedStorage(list(content)) for content in contents]
        tensors = [view.on(storages) for view in chosen]
        expected = [view.on([torch.UntypedStorage(list(content)) for content in contents]) for view in chosen]
        arrived = travel(peering, tensors, mode)
        same(expected, arrived)
        same(expected, tensors)
    for (i, one), (j, other) in itertools.combinations(enumerate(chosen), 2):
        if one.storage != other.storage:
            continue
        together = arrived[i].untyped_storage()._cdata == arrived[j].untyped_storage()._cdata
        spans = span(tensors[i]), span(tensors[j])
        overlap = max(one.start for one in spans) < min(one.stop for one in spans)
        assert together or (mode == "copy" and not overlap)
        if overlap:
            distance = tensors[i].data_ptr() - tensors[j].data_ptr()
            assert arrived[i].data_ptr() - arrived[j].data_ptr() == distance
    if mode != "copy":
        assert [tensor.storage_offset() for tensor in tensors] == [tensor.storage_offset() for tensor in arrived]
