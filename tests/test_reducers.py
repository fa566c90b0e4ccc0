"""What happens to storages and tensors at the sender: what moves, what is copied, what is parked, what is refused."""

from __future__ import annotations

import copyreg
import os
import pickle
import threading
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codec_peer import codec_for, new_arena
from kinds import quiet, same
from support import run_script

from tpool.errors import DecodeError, UnsupportedTensorError
from tpool.tensors import arrivals, leases, moving, reducers, torch_private
from tpool.tensors.arena import Arena
from tpool.tensors.payload import Payload, Received
from tpool.tensors.storages import Outgoing, Overlap

needs_swap = pytest.mark.skipif(not torch_private.CAN_SWAP, reason="this torch cannot move a storage in place")


@pytest.fixture(scope="module")
def arena() -> Iterator[Arena]:
    arena, ledger = new_arena()
    yield arena
    leases.table().collect()
    leases.table().remove(arena)
    ledger.close()


@pytest.fixture
def memory(arena: Arena) -> leases.Memory:
    return leases.Memory(arena, lambda seconds: False)


def receive(payload: Payload) -> Received:
    """As if it had travelled: the same blocks, descriptors of our own."""
    return Received(payload.data, list(payload.blocks), [os.dup(fd) for fd in payload.fds])


def travel(arena: Arena, obj: Any, sharing: str = "share", can_swap: bool = True) -> Any:
    codec = codec_for(arena, sharing, can_swap)
    return codec.loads(receive(codec.dumps(obj)))


def parked(tensor: torch.Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "_tpool_parked")


# The path that must be short ---------------------------------------------------------------------------------------


def test_a_dense_tensor_is_reduced_to_an_index_a_dtype_and_a_shape(memory: leases.Memory) -> None:
    outgoing = Outgoing(memory)
    assert reducers.reduce(torch.zeros(3, 4), outgoing) == (arrivals.whole_tensor, (0, "float32", 3, 4))
    assert reducers.reduce(torch.zeros(10)[4:], outgoing) == (
        arrivals.strided_tensor,
        (1, "float32", 4, (6,), (1,)),
    )


@pytest.mark.parametrize("obj", [1, "x", [1], {}, print, int, torch.Size([1]), torch.float32, np.zeros(2), object()])
def test_what_is_not_ours_is_left_to_others(memory: leases.Memory, obj: Any) -> None:
    assert reducers.reduce(obj, Outgoing(memory)) is NotImplemented


def test_a_rebuilt_tensor_is_no_view_of_something_unknown(arena: Arena) -> None:
    for tensor in travel(arena, [torch.zeros(3, 4), torch.zeros(3, 4).t(), torch.zeros(7)[2:], torch.tensor(1.0)]):
        assert not tensor._is_view()
        assert tensor._base is None


def test_a_default_device_and_default_dtype_change_nothing(arena: Arena) -> None:
    objects = [torch.arange(6.0).reshape(2, 3).t(), torch.eye(3).to_sparse(), torch.arange(3.0)]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            arrived = travel(arena, objects)
    finally:
        torch.set_default_dtype(torch.float32)
    same(objects, arrived)


def test_a_stream_cannot_be_read_without_its_blocks(arena: Arena) -> None:
    payload = codec_for(arena, "share").dumps((torch.zeros(3),))
    assert isinstance(payload.data, bytes)
    with pytest.raises(DecodeError, match="together with its shared memory"):
        pickle.loads(payload.data)
    for marker in arrivals.MARKERS.values():
        with pytest.raises(DecodeError):
            marker(*range(marker.__code__.co_argcount))


# Moving ------------------------------------------------------------------------------------------------------------


@needs_swap
def test_the_second_send_moves_nothing(arena: Arena) -> None:
    tensor = torch.arange(100.0)
    codec = codec_for(arena, "share")
    first = codec.dumps(tensor)
    address = tensor.data_ptr()
    second = codec.dumps([tensor, tensor[3:]])
    assert tensor.data_ptr() == address == first.blocks[0].arena.address + first.blocks[0].offset
    assert [(b.offset, b.nbytes) for b in second.blocks] == [(b.offset, b.nbytes) for b in first.blocks]


@needs_swap
def test_views_and_saved_tensors_follow(arena: Arena) -> None:
    weight = torch.arange(4.0, requires_grad=True)
    view = weight.detach()[1:]
    loss = (weight * weight).sum()
    codec_for(arena, "share").dumps(weight)
    with torch.no_grad():
        weight += 1
        weight -= 1
    view[0] = 1.0
    assert view.data_ptr() == weight.data_ptr() + 4
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()
    loss = (weight * weight).sum()
    codec_for(arena, "share").dumps(weight)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [0, 2, 4, 6]


@needs_swap
def test_a_failed_allocation_leaves_the_tensor_as_it_was(memory: leases.Memory) -> None:
    class Exhausted:
        def exchange(self, nbytes: int) -> Any:
            raise MemoryError

    tensor = torch.arange(10.0)
    address = tensor.data_ptr()
    with pytest.raises(MemoryError):
        reducers.reduce(tensor, Outgoing(Exhausted()))  # type: ignore[arg-type]
    assert tensor.data_ptr() == address
    assert reducers.reduce(tensor, Outgoing(memory))[1][0] == 0


@needs_swap
def test_threads_that_send_one_tensor_at_once_move_it_once(arena: Arena) -> None:
    for _ in range(20):
        tensor = torch.full((1 << 16,), 7.0)
        barrier, payloads = threading.Barrier(4), []

        def send(tensor: torch.Tensor = tensor, barrier: Any = barrier, payloads: Any = payloads) -> None:
            codec = codec_for_thread(arena)
            barrier.wait(10)
            payloads.append(codec(tensor))

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len({(outgoing.blocks[0].offset) for outgoing in payloads}) == 1
        assert tensor.eq(7).all()


def codec_for_thread(arena: Arena) -> Any:
    """Like a codec, without the patch that the test codec needs (which is no business of threads)."""
    outgoing = Outgoing(leases.Memory(arena, lambda seconds: False))

    def send(tensor: torch.Tensor) -> Outgoing:
        reducers.reduce(tensor, outgoing)
        return outgoing

    return send


# Nothing is torn from memory that somebody may know -----------------------------------------------------------------


@needs_swap
def test_the_old_memory_of_a_lone_tensor_is_freed(arena: Arena) -> None:
    tensor = torch.arange(1000.0)
    codec_for(arena, "share").dumps(tensor)
    assert not parked(tensor)
    bare = torch.arange(1000.0).untyped_storage()
    codec_for(arena, "share").dumps(bare)
    assert not hasattr(bare, "_tpool_parked")


@needs_swap
@pytest.mark.parametrize(
    "know",
    {
        "numpy": lambda tensor: tensor.numpy(),
        "numpy of a view": lambda tensor: tensor[10:].numpy(),
        "dlpack": np.from_dlpack,
        "dlpack of a view": lambda tensor: np.from_dlpack(tensor[10:]),
        "memoryview": lambda tensor: memoryview(tensor.numpy()),
    }.items(),
    ids=lambda item: item[0],
)
def test_arrays_taken_before_the_send_stay_readable(arena: Arena, know: Any) -> None:
    tensor = torch.full((1 << 20,), 3.0)
    array = np.asarray(know[1](tensor))
    codec_for(arena, "share").dumps(tensor)
    assert parked(tensor)
    tensor.fill_(4)
    assert (array == 3).all()


@needs_swap
def test_parked_memory_dies_with_its_storage(arena: Arena) -> None:
    array = np.arange(100.0)
    alive = weakref.ref(array)
    tensor = torch.from_numpy(array)
    view = tensor[3:]
    del array
    codec_for(arena, "share").dumps(tensor)
    del tensor
    assert alive() is not None
    del view
    assert alive() is None


@needs_swap
def test_reading_under_numpy_does_not_crash_the_interpreter() -> None:
    """torch's own share_memory_() frees large memory under the array, and reading it ends the process."""
    folder = str(Path(__file__).parent)
    run_script(
        f"""
        import sys; sys.path.insert(0, {folder!r})
        import numpy as np, torch
        from codec_peer import codec_for, new_arena
        arena, ledger = new_arena()
        tensor = torch.full((1 << 23,), 3.0)
        arrays = [tensor.numpy(), np.from_dlpack(torch.full((1 << 23,), 3.0))]
        exported = torch.full((1 << 23,), 3.0)
        arrays.append(np.from_dlpack(exported))
        arrays.append(np.from_dlpack(exported[5:]))
        for sharing, can_swap in (("share", False), ("share", True)):
            for obj in (tensor, exported):
                codec_for(arena, sharing, can_swap).dumps(obj)
        assert all((array == 3).all() for array in arrays)
        """,
        timeout=60,
    ).expect_success()


@needs_swap
@pytest.mark.parametrize("more", [0, 10])  # so many travel as one object
def test_many_bytes_with_several_tensors_are_looked_at_closely(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    monkeypatch.setattr(moving, "PARKED_LIMIT_NBYTES", 40_000)
    rows = [torch.zeros(2, 2500) for _ in range(4 + more)]
    views = [row[1] for row in rows[:4]]
    exported = np.from_dlpack(views[1])
    hidden = np.from_dlpack(rows[2][1])  # of a tensor that only the export knows
    array = rows[3].numpy()
    codec_for(arena, "share").dumps(rows)
    assert [parked(row) for row in rows] == [False, True, True, True] + more * [False]
    del exported, hidden, array


@needs_swap
def test_a_state_dict_does_not_double_the_memory(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "PARKED_LIMIT_NBYTES", 1)
    model = torch.nn.Linear(300, 300)
    codec_for(arena, "share").dumps(model.state_dict())
    assert not parked(model.weight)
    assert not parked(model.bias)


def test_without_the_swap_what_numpy_knows_is_copied_and_stays(arena: Arena) -> None:
    tensor = torch.arange(10.0)
    array = tensor.numpy()
    arrived = travel(arena, tensor, can_swap=False)
    same(tensor, arrived)
    arrived.fill_(7)
    assert array.tolist() == tensor.tolist() == list(range(10))


def test_without_the_swap_others_move_into_memory_of_torch(arena: Arena) -> None:
    tensor = torch.arange(10.0)
    arrived = travel(arena, [tensor, tensor[2:]], can_swap=False)
    assert tensor.is_shared()
    arrived[0].fill_(7)
    assert tensor.eq(7).all()
    assert arrived[1].eq(7).all()


# What torch shares -------------------------------------------------------------------------------------------------


@pytest.mark.leaves("torch starts a process that outlives the tensors it names")
def test_a_named_tensor_whose_name_is_gone_still_arrives(arena: Arena) -> None:
    tensor = torch.arange(10.0)
    tensor.untyped_storage()._share_filename_cpu_()
    assert torch_private.shared_by(tensor.untyped_storage()) == "name"
    codec = codec_for(arena, "share")
    payload = codec.dumps(tensor)
    assert payload.fds
    received = receive(payload)
    del payload, tensor  # the last of this name
    same(torch.arange(10.0), codec.loads(received))


def test_a_mapped_file_that_was_renamed_or_deleted(arena: Arena, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(bytes(16))
    tensor = torch.from_file(str(tmp_path / "old"), shared=True, size=4)
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "old").write_bytes(b"\1" * 16)  # another file of the old name
    travel(arena, tensor).fill_(5)
    assert tensor.eq(5).all()
    assert np.fromfile(tmp_path / "new", dtype=np.float32).tolist() == [5] * 4
    (tmp_path / "new").unlink()
    with pytest.raises(UnsupportedTensorError, match="deleted"):
        travel(arena, tensor)


def test_descriptors_of_a_dropped_message_are_closed(arena: Arena, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(16))
    tensor = torch.from_file(str(tmp_path / "file"), shared=True, size=4)
    before = sorted(os.listdir("/proc/self/fd"))
    payload = codec_for(arena, "share").dumps(tensor)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    del payload
    assert sorted(os.listdir("/proc/self/fd")) == before


# Regions -----------------------------------------------------------------------------------------------------------


def test_views_apart_are_sent_apart_and_one_inside_another_is_sent_once(memory: leases.Memory) -> None:
    base = torch.arange(1000.0).untyped_storage()
    outgoing = Outgoing(memory, "copy")
    assert outgoing.place_region(base, 512, 1024) == (0, 512)
    assert outgoing.place_region(base, 600, 700) == (0, 512)
    assert outgoing.place_region(base, 2050, 2060) == (1, 2048)
    assert [block.nbytes for block in outgoing.blocks] == [512, 12]


def test_overlapping_views_make_a_second_try_with_the_whole_storage(memory: leases.Memory) -> None:
    base = torch.arange(1000.0).untyped_storage()
    outgoing = Outgoing(memory, "copy")
    outgoing.place_region(base, 512, 1024)
    with pytest.raises(Overlap):
        outgoing.place_region(base, 1000, 1100)
    outgoing = outgoing.again()
    assert outgoing.place_region(base, 512, 1024) == (0, 0)
    assert outgoing.place_region(base, 1000, 1100) == (0, 0)
    assert outgoing.place(base) == 0
    assert [block.nbytes for block in outgoing.blocks] == [4000]


def test_a_storage_after_a_view_of_it_makes_a_second_try(memory: leases.Memory) -> None:
    base = torch.arange(1000.0).untyped_storage()
    outgoing = Outgoing(memory, "copy")
    outgoing.place_region(base, 512, 1024)
    with pytest.raises(Overlap):
        outgoing.place(base)
    assert outgoing.again().place(base) == 0


# Dress -------------------------------------------------------------------------------------------------------------


def test_hooks_are_warned_about_as_torch_does(arena: Arena) -> None:
    tensor = torch.zeros(3, requires_grad=True)
    tensor.register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match="backward hook"):
        arrived = travel(arena, tensor)
    same(tensor.detach(), arrived.detach())


def test_non_leaf_tensors_and_parameters_are_refused(arena: Arena) -> None:
    leaf = torch.nn.Parameter(torch.zeros(3))
    for tensor in (leaf * 2, (leaf * 2).as_subclass(torch.nn.Parameter), leaf[1:], leaf.to_sparse()):
        with pytest.raises(UnsupportedTensorError, match=r"detach\(\)"):
            travel(arena, [tensor])


def test_tensors_inside_a_transformation_are_refused(arena: Arena) -> None:
    def send(x: torch.Tensor) -> torch.Tensor:
        with pytest.raises(UnsupportedTensorError, match=r"torch\.(vmap|func\.grad)"):
            travel(arena, x)
        return x.sum()

    torch.vmap(send)(torch.zeros(2, 3))
    torch.func.grad(send)(torch.zeros(3))


def test_dtensors_are_refused_by_name(arena: Arena) -> None:
    """By name, so that torch.distributed need not be imported; here a class of that name stands in."""
    cls = types.new_class("DTensor", (torch.Tensor,))
    cls.__module__ = "torch.distributed.tensor"
    with pytest.raises(UnsupportedTensorError, match="to_local"):
        travel(arena, torch.zeros(3).as_subclass(cls))


def test_an_inference_tensor_arrives_as_a_normal_one(arena: Arena) -> None:
    with torch.inference_mode():
        tensor = torch.arange(6.0).reshape(2, 3)
        view = tensor.t()[1:]
    arrived = travel(arena, [tensor, view])
    assert [t.tolist() for t in arrived] == [tensor.tolist(), view.tolist()]
    assert not arrived[0].is_inference()


class Registered(torch.Tensor):
    pass


def test_a_reducer_that_the_user_registered_wins(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, Registered, lambda tensor: (str, ("reduced by the user",)))
    assert travel(arena, torch.zeros(3).as_subclass(Registered)) == "reduced by the user"


def test_a_lazy_module_can_be_used_after_it_arrived(arena: Arena) -> None:
    with quiet():
        module = travel(arena, torch.nn.LazyLinear(3))
        assert module(torch.zeros(2, 4)).shape == (2, 3)


def test_resize_raises_after_a_move(arena: Arena) -> None:
    tensor = torch.zeros(3)
    travel(arena, tensor)
    with pytest.raises(RuntimeError, match="resiz"):
        tensor.resize_(100)
