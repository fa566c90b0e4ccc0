"""Many tensors and large ones: few descriptors, a small ``/dev/shm``, more than two gigabytes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import run_script

import tpool

# Each costs a few seconds for a fresh interpreter, and what is tested here hardly depends on the start method.
METHODS = [
    "forkserver",
    pytest.param("fork", marks=pytest.mark.slow),
    pytest.param("spawn", marks=pytest.mark.slow),
]

# Few descriptors ---------------------------------------------------------------------------------------------------

FEW = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    import torch, tpool

    def total(tensors):
        return float(torch.stack(tensors).sum())

    def full(value):
        return torch.full((8,), float(value))

    def batch(count):
        return [full(value) for value in range(count)]

    for sharing in ("share", "copy"):
        with tpool.Pool(2, context=sys.argv[1], sharing=sharing) as pool:
            sent = batch(600)
            assert pool.apply(total, (sent,)) == 8 * sum(range(600))
            assert pool.apply(total, (sent,)) == 8 * sum(range(600))
            kept = pool.map(full, range(600), chunksize=1) + pool.apply(batch, (600,))
            kept += pool.imap(full, range(600))
            assert [one[7].item() for one in kept] == 3 * [*range(600)]
        assert [one[7].item() for one in kept] == 3 * [*range(600)]
"""


@pytest.mark.parametrize("method", METHODS)
def test_600_tensors_in_one_message_and_600_results_at_256_descriptors(method: str) -> None:
    run_script(FEW, 60, args=(method,)).expect_success()


# Many tensors ------------------------------------------------------------------------------------------------------


def many_tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((3,), float(number)) for number in range(count)]


def stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["share", "copy"])
def test_100_000_tensors_of_their_own_as_one_argument_and_as_one_result(sharing: str) -> None:
    sent = many_tensors(100_000)
    with tpool.Pool(1, sharing=sharing) as pool:
        assert torch.equal(pool.apply(stacked, (sent,)), torch.stack(sent))
        assert torch.equal(torch.stack(pool.apply(many_tensors, (100_000,))), torch.stack(sent))


# A small /dev/shm --------------------------------------------------------------------------------------------------

INTO_SMALL_SHM = """
    import os, sys
    if sys.argv[-1] != "inside":
        mount = 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"'
        command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
        os.execvp(command[0], [*command, sys.executable, *sys.argv, "inside"])
"""

SMALL_SHM = """
    import shutil
    import torch, tpool

    def double(tensor):
        return tensor * 2

    assert shutil.disk_usage("/dev/shm").total <= 16 << 20
    for sharing in ("share", "copy"):
        with tpool.Pool(2, context=sys.argv[1], sharing=sharing) as pool:
            results = pool.map(double, [torch.full((12 << 20,), float(i)) for i in range(3)])
            assert [one[-1].item() for one in results] == [0, 2, 4]
            assert os.listdir("/dev/shm") == []
        assert [one[0].item() for one in results] == [0, 2, 4]
        assert os.listdir("/dev/shm") == []
"""


def why_no_small_shm() -> str:
    """Why this user cannot have a ``/dev/shm`` of its own; empty if it can."""
    if shutil.which("unshare") is None:
        return "there is no unshare"
    tried = run_script(INTO_SMALL_SHM, 30)
    return tried.stderr.strip() if tried.returncode else ""


@pytest.mark.parametrize("method", METHODS)
def test_tensors_larger_than_dev_shm_leave_nothing_in_it(method: str) -> None:
    if why := why_no_small_shm():
        pytest.skip(f"no small /dev/shm can be mounted: {why}")
    run_script(INTO_SMALL_SHM + SMALL_SHM, 60, args=(method,)).expect_success()


# More than two gigabytes -------------------------------------------------------------------------------------------

LARGE_NBYTES = (2 << 30) + (256 << 20)
# The sender's own memory, the shared memory, and what the kernel and others need.
NEEDED_NBYTES = 3 * LARGE_NBYTES


@pytest.fixture
def large_pool() -> Iterator[tpool.Pool]:
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    if int(available.split()[1]) * 1024 < NEEDED_NBYTES:
        pytest.skip(f"less than {NEEDED_NBYTES >> 20} MiB of memory available")
    with tpool.Pool(1) as pool:
        yield pool


def ends(array: Any) -> tuple[int, int, int]:
    return len(array), int(array[0]), int(array[-1])


def large_tensor(last: int) -> torch.Tensor:
    tensor = torch.zeros(LARGE_NBYTES, dtype=torch.uint8)
    tensor[-1] = last
    return tensor


def large_array(last: int) -> np.ndarray[Any, Any]:
    return large_tensor(last).numpy()


def echo(obj: Any) -> Any:
    return obj


@pytest.mark.slow
def test_a_tensor_of_more_than_2_gb_as_argument(large_pool: tpool.Pool) -> None:
    tensor = large_tensor(7)
    assert large_pool.apply(ends, (tensor,)) == (LARGE_NBYTES, 0, 7)
    assert large_pool.apply(echo, (tensor,)).data_ptr() == tensor.data_ptr()


@pytest.mark.slow
def test_a_tensor_of_more_than_2_gb_as_result(large_pool: tpool.Pool) -> None:
    assert ends(large_pool.apply(large_tensor, (7,))) == (LARGE_NBYTES, 0, 7)


@pytest.mark.slow
def test_an_array_of_more_than_2_gb_as_argument_and_result(large_pool: tpool.Pool) -> None:
    array = large_array(7)
    assert large_pool.apply(ends, (array,)) == (LARGE_NBYTES, 0, 7)
    del array
    assert ends(large_pool.apply(large_array, (7,))) == (LARGE_NBYTES, 0, 7)
