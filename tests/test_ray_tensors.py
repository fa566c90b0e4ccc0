"""Tensors on Ray: every kind arrives or is refused by name, memory is the receiver's own, the store stays flat."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import kinds
import pytest
import torch
from kinds import KINDS, quiet
from ray_support import REASON, expect_nothing_left
from support import wait_until
from test_kinds_pool import failures, fetch, send

import tpool

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.leaves(REASON),
    pytest.mark.timeout(200),
    pytest.mark.filterwarnings("ignore:.*(ComplexHalf|quantize|prototype|beta state|TypedStorage|nvariant|jit).*"),
]
DEADLINE = 60


@pytest.fixture(scope="module")
def pool(local_ray: Any) -> Iterator[tpool.Pool]:
    """One worker."""
    threads = set(threading.enumerate())
    with tpool.Pool(1, engine="ray") as pool:
        yield pool
        pool.apply(kinds.forget_scratch)
    kinds.forget_scratch()
    expect_nothing_left(threads)


# torch's own manager of named memory is a process that nobody ends.
CHOSEN = [kind for kind in KINDS if not kind.cuda and "by name" not in kind.name]


def test_every_kind_arrives_or_is_refused(pool: tpool.Pool) -> None:
    with quiet():
        assert "\n".join(failures(pool, CHOSEN, send, fetch)) == ""


@pytest.mark.slow  # on a busy machine torch's own manager of names may be gone when such a tensor is made
def test_named_memory_arrives(pool: tpool.Pool) -> None:
    with quiet():
        assert "\n".join(failures(pool, [kind for kind in KINDS if "by name" in kind.name], send, fetch)) == ""


def test_large_aliases_stay_aliases_and_readers_copy_nothing(pool: tpool.Pool) -> None:
    base = torch.arange(1_000_000.0)
    whole, part, mapped = pool.apply(meet, (base, base[500_000:]))
    assert mapped >= base.nbytes, "the worker did not read the store's own pages"
    assert part.equal(base[500_000:])
    whole[500_000] = -1
    assert part[0] == -1
    assert base[500_000] == 500_000


def meet(base: torch.Tensor, part: torch.Tensor) -> Any:
    with open("/proc/self/smaps") as file:
        sections = file.read().split("\n\n")[0].splitlines()
    sizes, private = [], False
    for line in sections:
        fields = line.split()
        if "-" in fields[0] and len(fields) >= 5:
            private = "plasma" in line and fields[1][3] == "p"
        elif private and fields[0] == "Size:":
            sizes.append(int(fields[1]) * 1024)
    return base, part, sum(sizes)


def store_nbytes(ray: Any) -> int:
    """What lies in the object store of this machine."""
    used = ray.cluster_resources()["object_store_memory"] - ray.available_resources().get("object_store_memory", 0)
    return int(used)


@pytest.mark.parametrize("rounds", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_rounds_leave_the_store_flat(pool: tpool.Pool, local_ray: Any, rounds: int) -> None:
    held = local_ray.put(bytes(20 << 20))
    wait_until(lambda: store_nbytes(local_ray) >= 20 << 20, DEADLINE, "the store's numbers to tell of an object")
    del held

    def go(count: int) -> None:
        for _ in range(count):
            assert len(pool.apply(torch.neg, (torch.ones(1 << 18),))) == 1 << 18

    go(5)
    wait_until(lambda: store_nbytes(local_ray) < 4 << 20, DEADLINE, "the store to be empty")
    go(rounds)
    # 200 MB and more went through; what Ray frees, it frees a moment later.
    wait_until(lambda: store_nbytes(local_ray) < 4 << 20, DEADLINE, "the store to be as it was")


@pytest.mark.slow
def test_results_larger_than_the_store_arrive(pool: tpool.Pool) -> None:
    results = pool.map_async(torch.ones, [16 << 20] * 8, chunksize=1)  # 512 MB, through 400
    assert [int(result[-1]) for result in results.get(DEADLINE)] == [1] * 8
