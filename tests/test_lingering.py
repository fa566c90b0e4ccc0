"""A worker stays as long as CUDA memory that it made is in use; here something stands in that needs no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from methods import SELDOM_SPAWN
from support import process_info, wait_until

import tpool
from tpool.tensors import reducers
from tpool.tensors.arrivals import leased

DEADLINE = 20


class OnDevice:
    """Sent as CUDA memory is: what arrives dies with the process that made it."""


def arrived(pid: int) -> torch.Tensor:
    return torch.tensor([pid])


def reduce_on_device(obj: OnDevice, sender: Any) -> Any:
    return leased, (sender.token(), arrived, (os.getpid(),))


def install() -> None:
    reducers._HANDLERS[OnDevice] = reduce_on_device


def make(_: Any = None) -> OnDevice:
    return OnDevice()


def make_many(count: int) -> list[OnDevice]:
    return [OnDevice() for _ in range(count)]


def gone(pid: int) -> bool:
    info = process_info(pid)
    return info is None or not info.alive


def alive(tensor: torch.Tensor) -> bool:
    return not gone(int(tensor))


@pytest.fixture(params=SELDOM_SPAWN)
def pool(request: pytest.FixtureRequest) -> Iterator[tpool.Pool]:
    with tpool.Pool(1, install, maxtasksperchild=1, context=request.param) as pool:
        yield pool


def test_retired_workers_stay_as_long_as_their_results_and_hold_up_nobody(pool: tpool.Pool) -> None:
    results = pool.map(make, range(3), chunksize=1)
    pids = [int(result) for result in results]
    assert len(set(pids)) == 3
    pool.apply(os.getpid)  # so that the last of them has retired, too
    assert all(map(alive, results))
    view = results[1].view(torch.uint8)[1:]
    del results[:2]
    wait_until(lambda: gone(pids[0]), DEADLINE, "the worker whose result was dropped to go")
    assert not gone(pids[1])  # for the view
    assert not gone(pids[2])
    del view
    wait_until(lambda: gone(pids[1]), DEADLINE, "the worker whose last view was dropped to go")
    assert alive(results[0])


def test_the_end_of_a_pool_waits_for_none_that_lingers(pool: tpool.Pool) -> None:
    results = pool.map(make, range(2), chunksize=1)
    pids = [int(result) for result in results]
    pool.close()
    pool.join()
    assert all(map(gone, pids))


def test_a_result_that_nobody_has_taken_is_in_use() -> None:
    with tpool.Pool(1, install, maxtasksperchild=1) as pool:
        waiting = pool.apply_async(make_many, (2,))
        dropped = pool.apply_async(make_many, (2,))
        pids = [int(pool.apply(make)), pool.apply(os.getpid)]
        assert dropped.ready()
        del dropped
        one, two = waiting.get(DEADLINE)
        assert int(one) == int(two)
        assert alive(one)
        del one
        assert alive(two)
        pids.append(int(two))
        del two, waiting
        wait_until(lambda: all(map(gone, pids)), DEADLINE)


def test_a_worker_whose_results_are_gone_does_not_linger() -> None:
    with tpool.Pool(1, install, maxtasksperchild=2) as pool:
        pid = int(pool.apply(make))
        assert pool.apply(os.getpid) == pid
        wait_until(lambda: gone(pid), DEADLINE)
        assert pool.apply(os.getpid) != pid


def test_a_lingering_worker_that_is_killed_is_reaped() -> None:
    with tpool.Pool(1, install, maxtasksperchild=1, context="fork") as pool:
        result = pool.apply(make)
        assert pool.apply(os.getpid) != int(result)
        os.kill(int(result), 9)
        wait_until(lambda: gone(int(result)), DEADLINE)
        assert pool.apply(os.getpid)
