"""What each sharing mode promises, through real pools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import tpool

MODES = ["share", "copy"]

kept: list[Any] = []


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, tpool.Pool]]:
    """A pool of one worker for each mode."""
    with tpool.Pool(1, sharing="share") as share, tpool.Pool(1, sharing="copy") as copy:
        for pool in (share, copy):
            pool.apply(look)  # what a pool starts in its time is there before the first test looks
        yield {"share": share, "copy": copy}


@pytest.fixture
def copying(pools: dict[str, tpool.Pool]) -> tpool.Pool:
    return pools["copy"]


@pytest.fixture
def sharing(pools: dict[str, tpool.Pool]) -> tpool.Pool:
    return pools["share"]


# In the worker -----------------------------------------------------------------------------------------------------


def write(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.detach().fill_(99)


def keep(obj: Any) -> Any:
    kept[:] = [obj]
    return obj


def look() -> Any:
    return [one.tolist() for one in kept]


def write_kept() -> None:
    kept[0].fill_(99)


def write_first_read_second(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    first.fill_(99)
    return second.tolist()


def make_and_keep(value: float) -> torch.Tensor:
    return keep(torch.full((1000,), value))


def add_one(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1


# Copy --------------------------------------------------------------------------------------------------------------


def seen_by_numpy(tensor: torch.Tensor) -> torch.Tensor:
    tensor.numpy()
    return tensor


TENSORS = {
    "a tensor": lambda: torch.zeros(1000),
    "a view": lambda: torch.zeros(40, 50)[3:20, ::2],
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(10)),
    "a tensor on an array": lambda: torch.from_numpy(np.zeros(10)),
    "a tensor that an array sees": lambda: seen_by_numpy(torch.zeros(10)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_what_a_worker_writes_stays_in_the_worker(copying: tpool.Pool, name: str) -> None:
    tensor = TENSORS[name]()
    before = (tensor.data_ptr(), tensor.is_shared(), tensor.untyped_storage().resizable())
    copying.apply(write, (tensor,))
    assert copying.map(write, [tensor, tensor]) == [None, None]
    assert tensor.detach().eq(0).all()
    assert (tensor.data_ptr(), tensor.is_shared(), tensor.untyped_storage().resizable()) == before


def test_an_array_stays_an_alias_of_the_tensor_that_was_sent(copying: tpool.Pool) -> None:
    array = np.zeros(5)
    tensor = torch.from_numpy(array)
    copying.apply(write, (tensor,))
    array[0] = 7
    assert tensor.tolist() == [7, 0, 0, 0, 0]


def test_what_the_caller_writes_after_sending_does_not_reach_the_worker(copying: tpool.Pool) -> None:
    tensor = torch.zeros(3)
    copying.apply(keep, (tensor,))
    tensor.fill_(5)
    assert copying.apply(look) == [[0, 0, 0]]


def test_a_result_that_the_worker_keeps_is_its_own(copying: tpool.Pool) -> None:
    result = copying.apply(make_and_keep, (1.0,))
    copying.apply(write_kept)
    assert result.eq(1).all()
    result.fill_(5)
    assert copying.apply(look) == [[99] * 1000]


def test_memory_that_is_used_again_changes_nothing_that_was_kept(copying: tpool.Pool) -> None:
    results = [copying.apply(make_and_keep, (float(i),)) for i in range(50)]
    del results[::2]  # their blocks are handed out again
    results += [copying.apply(make_and_keep, (float(i),)) for i in range(100, 125)]
    expected = [*range(1, 50, 2), *range(100, 125)]
    assert [set(result.tolist()) for result in results] == [{float(i)} for i in expected]


def test_a_view_sends_its_own_bytes_only(copying: tpool.Pool) -> None:
    base = torch.arange(1_000_000.0)
    before = copying.stats().moved_nbytes
    arrived = copying.apply(add_one, (base[500_000:500_100],))
    assert torch.equal(arrived, base[500_001:500_101])
    assert copying.stats().moved_nbytes - before < 2000


def test_a_result_that_is_a_view_sends_its_own_bytes_only(copying: tpool.Pool) -> None:
    before = copying.stats().moved_nbytes
    assert copying.apply(torch.narrow, (torch.arange(300_000.0)[:10], 0, 2, 3)).tolist() == [2, 3, 4]
    assert copying.stats().moved_nbytes - before < 2000


def test_what_was_shared_on_purpose_still_goes_by_handle(copying: tpool.Pool) -> None:
    tensor = torch.zeros(3).share_memory_()
    address = tensor.data_ptr()
    copying.apply(write, (tensor,))
    assert tensor.eq(99).all()
    assert tensor.data_ptr() == address
    module = torch.nn.Linear(2, 2).share_memory()
    copying.apply(write, tuple(module.parameters()))
    assert all(bool(parameter.eq(99).all()) for parameter in module.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_in_two_arguments_is_one(pools: dict[str, tpool.Pool], mode: str) -> None:
    tensor = torch.zeros(4)
    assert pools[mode].apply(write_first_read_second, (tensor, tensor[1:])) == [99, 99, 99]
    assert (
        pools[mode].apply(write_first_read_second, (tensor[2:], tensor))
        == [0 if mode == "copy" else 99] * 2 + [99] * 2
    )
    assert bool(tensor.eq(0 if mode == "copy" else 99).all())


# Share -------------------------------------------------------------------------------------------------------------


def test_a_storage_sent_twice_in_separate_calls_is_one_memory(sharing: tpool.Pool) -> None:
    tensor = torch.zeros(6)
    sharing.apply(keep, (tensor[:3],))
    sharing.apply(write, (tensor,))
    assert sharing.apply(look) == [[99] * 3]


def test_a_result_that_the_worker_keeps_is_shared(sharing: tpool.Pool) -> None:
    result = sharing.apply(make_and_keep, (1.0,))
    sharing.apply(write_kept)
    assert result.eq(99).all()
    result.fill_(5)
    assert sharing.apply(look) == [[5] * 1000]


def test_a_tensor_on_an_array_moves_and_the_array_stays_readable(sharing: tpool.Pool) -> None:
    array = np.zeros(5)
    tensor = torch.from_numpy(array)
    sharing.apply(write, (tensor,))
    assert tensor.eq(99).all()
    assert array.tolist() == [0] * 5


def test_a_shared_model_is_trained_by_all(sharing: tpool.Pool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    sharing.apply(write, tuple(model.parameters()))
    assert all(bool(parameter.eq(99).all()) for parameter in model.parameters())


@pytest.mark.parametrize("sharing", ["shared", 1, True])
def test_other_modes_are_refused(sharing: Any) -> None:
    with pytest.raises(ValueError, match="sharing must be 'share' or 'copy'"):
        tpool.Pool(1, sharing=sharing)
