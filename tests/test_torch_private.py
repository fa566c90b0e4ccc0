"""What tpool knows of torch's insides, one test for each name in ``torch_private``."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tpool.tensors import torch_private

pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype|quantize).*")
needs_swap = pytest.mark.skipif(not torch_private.CAN_SWAP, reason="this torch cannot move a storage in place")


def test_all_that_is_public_is_tested() -> None:
    tests = Path(__file__).read_text()
    untested = [name for name in torch_private.__all__ if f"torch_private.{name}" not in tests]
    assert not untested


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.view_as_complex(torch.zeros(2, 2)).conj(),
        lambda: torch._neg_view(torch.zeros(2)),
        lambda: torch.empty(2, device="meta"),
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.eye(2).to_mkldnn(),
        lambda: torch.nested.nested_tensor([torch.zeros(2)]),
        lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        lambda: torch._efficientzerotensor((2,)),
        lambda: torch._to_functional_tensor(torch.zeros(2)),
    ],
)
def test_dispatch_keys_tell_plain_tensors_from_all_others(make: Any) -> None:
    assert torch_private.dispatch_keys(torch.zeros(2, 3).t()) == torch_private.PLAIN_KEYS
    assert torch_private.dispatch_keys(torch.zeros(2, requires_grad=True)) == torch_private.PLAIN_KEYS
    assert torch_private.dispatch_keys(make()) != torch_private.PLAIN_KEYS


def test_transformed_by_names_the_transformation() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.transformed_by(x))
        return x.sum()

    torch.vmap(look)(torch.zeros(2, 3))
    torch.func.grad(look)(torch.zeros(3))
    look(torch._to_functional_tensor(torch.zeros(2)))
    look(torch._efficientzerotensor((2,)))
    look(torch.zeros(2))
    assert [words.split()[0] if words else None for words in seen] == [
        "torch.vmap",
        "torch.func.grad",
        "functionalization",
        "forward-mode",
        None,
    ]


class Loud(torch.Tensor):
    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_no_torch_function_silences_a_subclass() -> None:
    tensor = torch_private.make_subclass(Loud, torch.zeros(2), False)
    before = Loud.calls
    with torch_private.no_torch_function():
        tensor.stride()
    assert Loud.calls == before
    tensor.stride()
    assert Loud.calls == before + 1


def test_make_subclass_shares_the_memory_and_is_no_view() -> None:
    data = torch.zeros(2)
    tensor = torch_private.make_subclass(Loud, data, True)
    assert type(tensor) is Loud
    assert tensor.requires_grad
    assert not tensor._is_view()
    assert tensor.data_ptr() == data.data_ptr()


def test_set_conj_and_set_neg_set_the_bits_in_place() -> None:
    tensor = torch.view_as_complex(torch.ones(2, 2)).clone()
    torch_private.set_conj(tensor)
    torch_private.set_neg(tensor)
    assert tensor.is_conj()
    assert tensor.is_neg()
    assert not tensor._is_view()
    assert tensor[0].item() == -(1 - 1j)


def test_is_lazy() -> None:
    assert torch_private.is_lazy(torch.nn.UninitializedParameter)
    assert torch_private.is_lazy(torch.nn.UninitializedBuffer)
    assert not torch_private.is_lazy(torch.nn.Parameter)


class Slotted(torch.Tensor):
    __slots__ = ("slot",)


class WithSetstate(torch.Tensor):
    def __setstate__(self, state: Any) -> None:
        self.restored = state


def test_object_state_holds_attributes_and_slots() -> None:
    tensor = torch_private.make_subclass(Slotted, torch.zeros(2), False)
    tensor.slot, tensor.attribute = 1, 2
    other = torch_private.make_subclass(Slotted, torch.zeros(2), False)
    torch_private.set_object_state(other, torch_private.object_state(tensor))
    assert (other.slot, other.attribute) == (1, 2)


def test_set_object_state_calls_a_setstate_of_the_subclass() -> None:
    tensor = torch_private.make_subclass(WithSetstate, torch.zeros(2), False)
    torch_private.set_object_state(tensor, {"a": 1})
    assert tensor.restored == {"a": 1}


# Who knows a storage -----------------------------------------------------------------------------------------------


def test_storage_id_names_the_storage() -> None:
    base = torch.zeros(4)
    assert torch_private.storage_id(base) == torch_private.storage_id(base[1:]) == base.untyped_storage()._cdata
    assert torch_private.storage_id(base) != torch_private.storage_id(base.clone())


@needs_swap
def test_a_lone_tensor_is_the_only_owner_of_its_storage() -> None:
    assert torch_private.COUNTS_USES
    tensor = torch.zeros(4)
    storage = tensor.untyped_storage()
    assert torch_private.only_owner(storage, tensor)
    assert not torch_private.only_owner(storage, None)
    assert torch_private.storage_uses(storage) == torch_private.sole_storage_uses(1)
    del tensor
    assert torch_private.only_owner(storage, None)
    assert torch_private.storage_uses(storage) == torch_private.sole_storage_uses(0)


@needs_swap
def test_a_tensor_that_has_left_the_storage_is_not_its_owner() -> None:
    """Or what an export still reads would be freed: the export counts where the tensor did."""
    tensor = torch.zeros(4)
    storage = tensor.untyped_storage()
    array = np.from_dlpack(tensor.detach())  # which knows nothing of the tensor
    tensor.data = torch.ones(4)
    assert torch_private.storage_uses(storage) == torch_private.sole_storage_uses(1)
    assert not torch_private.only_owner(storage, tensor)
    assert array.tolist() == [0.0] * 4


@needs_swap
def test_views_count() -> None:
    tensor = torch.zeros(4)
    views = [tensor[i:] for i in range(3)]
    assert torch_private.storage_uses(tensor.untyped_storage()) == torch_private.sole_storage_uses(4)
    assert not torch_private.only_owner(tensor.untyped_storage(), tensor)
    assert torch_private.known_to_python([tensor, *views])
    assert not torch_private.known_to_python([tensor, *views[1:]])


@needs_swap
def test_an_export_by_dlpack_shows_on_the_tensor() -> None:
    tensor = torch.zeros(4)
    array = np.from_dlpack(tensor)
    assert not torch_private.known_to_python([tensor])
    assert not torch_private.only_owner(tensor.untyped_storage(), tensor)
    del array
    assert torch_private.known_to_python([tensor])
    assert torch_private.tensor_uses(tensor) == torch_private.tensor_uses(torch.zeros(1))


@needs_swap
def test_an_exported_view_that_is_gone_still_shows_among_the_objects_of_the_garbage_collector() -> None:
    """So counting all tensors finds an export even when the exported tensor can no longer be reached."""
    base = torch.zeros(4)
    array = np.from_dlpack(base[1:])
    tensors = [
        t
        for t in gc.get_objects()
        if type(t) is torch.Tensor and torch_private.storage_id(t) == base.untyped_storage()._cdata
    ]
    counted = torch_private.storage_uses(base.untyped_storage()) == torch_private.sole_storage_uses(len(tensors))
    assert not (counted and torch_private.known_to_python(tensors))
    del array


def test_numpy_marks_a_storage() -> None:
    tensor = torch.zeros(4)
    assert tensor.untyped_storage().resizable()
    tensor[1:].numpy()
    assert not tensor.untyped_storage().resizable()


@needs_swap
def test_attributes_of_a_storage_live_as_long_as_the_storage() -> None:
    tensor = torch.zeros(4)
    tensor.untyped_storage().mark = "here"
    gc.collect()
    view = tensor[1:]
    del tensor
    assert view.untyped_storage().mark == "here"


@needs_swap
def test_swap_data_takes_every_view_along() -> None:
    base = torch.zeros(4)
    view = base[1:]
    other = torch.arange(4.0)
    torch_private.swap_data(base.untyped_storage(), other.untyped_storage())
    assert view.tolist() == [1, 2, 3]
    assert other.tolist() == [0] * 4


def test_typed_storage_and_back(recwarn: pytest.WarningsRecorder) -> None:
    untyped = torch.arange(3.0).untyped_storage()
    typed = torch_private.typed_storage(untyped, torch.float32)
    assert torch_private.untyped_storage(typed) is untyped
    assert typed.dtype is torch.float32
    assert not recwarn


# What torch shares -------------------------------------------------------------------------------------------------


def test_shared_by_fd(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    fd = torch_private.share_by_fd(tensor.untyped_storage())
    assert torch_private.shared_by(tensor.untyped_storage()) == "fd"
    assert torch_private.shared_fd(tensor.untyped_storage()) == fd
    other = torch_private.storage_from_fd(fd, 12)
    other[0] = 1
    assert tensor.untyped_storage()[0] == 1
    assert torch_private.shared_fd(other) != fd


@pytest.mark.leaves("torch starts a process that outlives the tensors it names")
def test_shared_by_name() -> None:
    storage = torch.arange(3.0).untyped_storage()
    manager, name = torch_private.shared_name(storage)
    assert torch_private.shared_by(storage) == "name"
    assert Path(f"/dev/shm{name.decode()}").exists()
    other = torch_private.storage_from_name(manager, name, 12)
    other[0] = 1
    assert storage[0] == 1
    del storage, other
    assert not Path(f"/dev/shm{name.decode()}").exists()
    with pytest.raises(RuntimeError):
        torch_private.storage_from_name(manager, name, 12)


def test_mapped_files(tmp_path: Path) -> None:
    file = tmp_path / "a file\nwith spaces"
    file.write_bytes(bytes(16))
    shared = torch.from_file(str(file), shared=True, size=4).untyped_storage()
    private = torch.from_file(str(file), shared=False, size=4).untyped_storage()
    assert torch_private.shared_by(shared) == "file"
    assert torch_private.shared_by(private) == "private file"
    assert torch_private.file_of_mapping(shared) == str(file)
    assert torch_private.file_of_mapping(private) is None
    file.rename(tmp_path / "moved")
    assert torch_private.file_of_mapping(shared) == str(tmp_path / "moved")
    os.unlink(tmp_path / "moved")
    assert torch_private.file_of_mapping(shared) is None
    assert torch_private.file_of_mapping(torch.zeros(1).untyped_storage()) is None


# Layouts -----------------------------------------------------------------------------------------------------------


def test_quantizers() -> None:
    tensor: Any = torch_private.quantized_per_tensor(torch.qint8, 0.5, 3)
    assert (tensor.dtype, tensor.q_scale(), tensor.q_zero_point()) == (torch.qint8, 0.5, 3)
    scales, zeros = torch.tensor([0.5, 0.25]), torch.tensor([1, 2])
    tensor = torch_private.quantized_per_channel(torch.quint8, (2, 3), scales, zeros, 0)
    assert (tensor.shape, tensor.q_per_channel_axis()) == ((2, 3), 0)
    assert tensor.q_per_channel_scales().tolist() == [0.5, 0.25]


def test_strided_nested_shares_the_buffer() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, 3), torch.ones(1, 3)])
    parts = torch_private.strided_nested_parts(nested)
    again = torch_private.strided_nested(*parts)
    assert [t.tolist() for t in again.unbind()] == [t.tolist() for t in nested.unbind()]
    assert not again._is_view()
    parts[0][0] = 5
    assert again.unbind()[0][0, 0] == nested.unbind()[0][0, 0] == 5
