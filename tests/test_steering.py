"""What each worker is given: threads, CPUs, a device, memory; with real processes, through the public API."""

from __future__ import annotations

import logging
import os

import pool_tasks as tasks
import pytest
import torch
from methods import seldom_spawned
from support import wait_until

import tpool
from tpool.local import weight
from tpool.local.cpus import available_cpus
from tpool.local.seat import THREAD_VARIABLES

DEADLINE = 30
CPUS = sorted(os.sched_getaffinity(0))


def ask_both(pool, function):
    """What the function gives in worker 0 and in worker 1."""
    found = {}

    def both():
        found.update(pool.map(function, range(8), chunksize=1))
        return len(found) == 2

    wait_until(both, DEADLINE)
    return found[0], found[1]


# Threads ----------------------------------------------------------------------------------------------------------


def test_threads_by_default():
    with tpool.Pool(1) as pool:
        assert pool.apply(torch.get_num_threads) == available_cpus()
    with tpool.Pool(1, context="fork") as pool:
        assert pool.apply(torch.get_num_threads) == 1


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_threads_that_are_given(method):
    with tpool.Pool(1, context=method, threads=3) as pool:
        assert pool.apply(torch.get_num_threads) == 3
        assert pool.apply(os.getenv, ("OMP_NUM_THREADS",)) == "3"


def threads_of_libraries():
    """(how many threads the OpenMP and BLAS libraries of this process use, how many libraries there are)."""
    import sklearn.cluster  # brings along scipy's BLAS and an OpenMP of its own
    import threadpoolctl

    assert sklearn.cluster
    info = threadpoolctl.threadpool_info()
    assert {library["user_api"] for library in info} == {"blas", "openmp"}
    return {library["num_threads"] for library in info}, len(info)


@pytest.mark.parametrize(("method", "threads"), [("forkserver", 1), ("forkserver", 2), ("fork", 1)])
@pytest.mark.skipif(len(CPUS) < 2, reason="libraries give no process more threads than CPUs")
def test_threads_of_every_library(method, threads):
    with tpool.Pool(1, context=method, threads=threads) as pool:
        assert pool.apply(torch.get_num_threads) == threads
        found, libraries = pool.apply(threads_of_libraries)
        assert found == {threads}
        assert libraries >= 3


def test_workers_by_default_share_the_cpus_in_every_library(monkeypatch):
    """Numpy's BLAS is loaded before workers are told apart; it has one thread, which is never too many."""
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with tpool.Pool(available_cpus()) as pool:
        assert pool.apply(threads_of_libraries)[0] == {1}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with tpool.Pool(1) as pool:
        assert pool.apply(os.getenv, ("OMP_NUM_THREADS",)) == "7"
        assert pool.apply(os.getenv, ("OPENBLAS_NUM_THREADS",)) == str(available_cpus())


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "threads must be 1 or more, not 0", {"threads": 0}),
        (TypeError, "threads must be a number", {"threads": "2"}),
        (ValueError, "threads must be 1 with context='fork'", {"threads": 2, "context": "fork"}),
        (TypeError, "affinity must be True", {"affinity": 0.5}),
        (TypeError, "affinity must be True", {"affinity": "01"}),
        (ValueError, r"affinity names CPUs \[100000\]; this process may use", {"affinity": [100000]}),
        (ValueError, "at least one CPU", {"affinity": []}),
        (ValueError, "at least one CPU", {"affinity": [set()]}),
        (TypeError, r"devices must be a list, not 'cuda:0'; write \['cuda:0'\]", {"devices": "cuda:0"}),
        (ValueError, "devices must name at least one", {"devices": []}),
        (ValueError, "'cuda:O' is no device of torch", {"devices": ["cuda:O"]}),
        (ValueError, "'gpu' is no device of torch", {"devices": ["gpu"]}),
        (ValueError, "max_memory 'much' is not a size", {"max_memory": "much"}),
        (ValueError, "max_memory must be 1 or more bytes", {"max_memory": 0}),
        (ValueError, "max_cuda_memory 'lots' is not a size", {"max_cuda_memory": "lots"}),
        (ValueError, "max_cuda_memory must be 1 or more bytes", {"max_cuda_memory": -1}),
    ],
)
def test_bad_values(error, match, arguments):
    with pytest.raises(error, match=match):
        tpool.Pool(1, **arguments)


# CPUs -------------------------------------------------------------------------------------------------------------


@seldom_spawned
@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_a_cpu_for_each_worker(method):
    with tpool.Pool(2, context=method, affinity=True) as pool:
        assert ask_both(pool, tasks.cpus_of_worker) == ({CPUS[0]}, {CPUS[1]})


def test_cpus_that_are_given():
    with tpool.Pool(2, affinity=[CPUS, CPUS[-1]]) as pool:
        assert ask_both(pool, tasks.cpus_of_worker) == (set(CPUS), {CPUS[-1]})
    with tpool.Pool(2, affinity=[CPUS[0]]) as pool:
        assert ask_both(pool, tasks.cpus_of_worker) == ({CPUS[0]}, {CPUS[0]})
    assert os.sched_getaffinity(0) == set(CPUS)


# Devices ----------------------------------------------------------------------------------------------------------


def test_devices_in_turn():
    with tpool.Pool(2, devices=["cpu", "meta"]) as pool:
        assert ask_both(pool, tasks.device_of_worker) == (("cpu", "cpu"), ("meta", "meta"))
        tensor = torch.ones(100000)
        assert all(value.sum() == 100000 for value in pool.map(tasks.identity, [tensor] * 8, chunksize=1))
    with tpool.Pool(1) as pool:
        assert pool.apply(tasks.device_of_worker, (0,)) == (0, (None, "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ValueError, match="'cuda:1' cannot be used, as torch finds no CUDA GPU here"):
        tpool.Pool(2, devices=["cuda:1"])


# Memory -----------------------------------------------------------------------------------------------------------


@seldom_spawned
def test_a_worker_that_keeps_too_much_is_replaced(method, caplog):
    with tpool.Pool(1, context=method) as pool:
        begins_with = pool.apply(weight.private_nbytes)  # its part of all that this process is, where that is forked
    limit = begins_with + (500 << 20)
    with caplog.at_level(logging.WARNING, "tpool"), tpool.Pool(1, context=method, max_memory=limit) as pool:
        first = pool.apply(tasks.get_pid)
        kept = pool.map(tasks.keep, [400 << 20, 10, 400 << 20, 10, 10], chunksize=1)
        assert kept == [first] * 3 + [kept[3]] * 2
        assert kept[3] != first
        (worker,) = pool.stats().workers
        assert worker.restarts == 1
        assert "left, as its private memory of" in worker.losses[0]
        assert pool.stats().workers_lost == 0
    assert not caplog.records


def test_shared_memory_does_not_count():
    with tpool.Pool(1, max_memory="700MB") as pool:
        first = pool.apply(tasks.get_pid)
        big = pool.empty(180 << 20, dtype=torch.float32)
        assert pool.apply(tasks.fill_and_tell_pid, (big, 1.0)) == first
        assert pool.apply(tasks.get_pid) == first
        assert big[-1] == 1


def test_tasks_behind_it_go_to_the_next_worker():
    with tpool.Pool(2, max_memory="1B") as pool:
        assert pool.map(tasks.double, range(12), chunksize=1) == [2 * x for x in range(12)]
        assert pool.apply(tasks.double, (3,)) == 6
        assert pool.stats().workers_lost == 0


def test_growth_on_gpus_with_a_stand_in_for_torchs_allocator(caplog):
    """Two GPUs, of which each task reserves 100 MB more on one: together they may have 250 MB."""
    with (
        caplog.at_level(logging.WARNING, "tpool"),
        tpool.Pool(1, tasks.stand_in_for_cuda, (10**8,), max_cuda_memory="250MB") as pool,
    ):
        pids = pool.map(tasks.reserve_more, [0, 1, 0, 1, 1, 0, 0], chunksize=1)
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
        (worker,) = pool.stats().workers
        assert [loss.partition(" left, as ")[2] for loss in worker.losses] == [
            "its CUDA memory of 300 MB was too much"
        ] * 2
        assert pool.stats().workers_lost == 0
    assert not caplog.records


def test_a_limit_on_gpus_does_not_make_a_worker_use_one():
    with tpool.Pool(1, max_cuda_memory=1) as pool:
        first = pool.apply(tasks.get_pid)
        assert pool.map(tasks.uses_cuda, range(3), chunksize=1) == [False] * 3
        assert pool.apply(tasks.get_pid) == first
