"""The pool on Ray through its public API: what holds for local workers holds for actors."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pool_tasks as tasks
import pytest
import torch
from ray_support import REASON, actor_pids, expect_nothing_left
from support import process_info, wait_until

import tpool
from tpool.ray import starting

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.leaves(REASON), pytest.mark.timeout(120)]

DEADLINE = 60
ENGINE = tpool.RayEngine(num_cpus=1)


@pytest.fixture(scope="module")
def pool(local_ray: Any) -> Iterator[tpool.Pool]:
    """One pool of two workers for all tests that leave it as they found it."""
    threads = set(threading.enumerate())
    with tpool.Pool(2, engine=ENGINE) as pool:
        wait_until(lambda: len(set(pool.map(tasks.get_pid, range(20), chunksize=1))) == 2, DEADLINE)
        yield pool
    expect_nothing_left(threads)


# The API ------------------------------------------------------------------------------------------------------------


def test_one_call(pool: tpool.Pool) -> None:
    assert pool.apply(tasks.add, (1,), {"y": 2}) == 3
    assert pool.apply_async(tasks.add, (1, 2)).get(DEADLINE) == 3
    assert pool.submit(tasks.add, 1, y=2).result(DEADLINE) == 3


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_map(pool: tpool.Pool, chunksize: int | None) -> None:
    assert pool.map(tasks.double, range(100), chunksize) == [2 * x for x in range(100)]
    assert pool.starmap(tasks.add, zip(range(50), range(50)), chunksize) == [2 * x for x in range(50)]
    assert pool.map_async(tasks.double, range(9), chunksize).get(DEADLINE) == [2 * x for x in range(9)]
    assert sorted(pool.map_unordered(tasks.double, range(9), chunksize)) == [2 * x for x in range(9)]
    assert pool.map(tasks.double, [], chunksize) == []


@pytest.mark.parametrize("chunksize", [1, 10])
def test_imap(pool: tpool.Pool, chunksize: int) -> None:
    assert list(pool.imap(tasks.double, range(300), chunksize)) == [2 * x for x in range(300)]
    assert sorted(pool.imap_unordered(tasks.double, range(300), chunksize)) == [2 * x for x in range(300)]


def test_input_is_drawn_only_as_results_are_consumed(pool: tpool.Pool) -> None:
    drawn = itertools.count()
    iterator = pool.imap(tasks.identity, drawn, buffersize=3)
    assert [next(iterator) for _ in range(10)] == list(range(10))
    del iterator
    assert next(drawn) < 20


def test_many_short_tasks_arrive_once_and_in_order(pool: tpool.Pool) -> None:
    assert list(pool.imap(tasks.identity, range(5_000))) == list(range(5_000))


def test_an_exception_arrives_as_itself_with_the_remote_traceback(pool: tpool.Pool) -> None:
    with pytest.raises(ValueError, match="odd: 3") as caught:
        pool.apply(tasks.raise_if_odd, (3,))
    assert isinstance(caught.value.__cause__, tpool.RemoteTraceback)
    text = str(caught.value.__cause__)
    assert 'raise ValueError(f"odd: {x}")' in text
    assert "tasks.py" not in text.replace("pool_tasks.py", ""), "our own frames are told"


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_base_exceptions_are_the_tasks_own(pool: tpool.Pool, error: BaseException) -> None:
    with pytest.raises(type(error)):
        pool.apply(tasks.raise_exception, (error,))
    assert pool.apply(tasks.double, (1,)) == 2


def test_what_cannot_travel_is_that_calls_own_failure(pool: tpool.Pool) -> None:
    with pytest.raises(TypeError, match="stays where it is"):
        pool.apply(tasks.identity, (tasks.Unpicklable(),))
    with pytest.raises(tpool.MaybeEncodingError):
        pool.apply(tasks.return_unpicklable)
    with pytest.raises(tpool.DecodeError, match="not in this process"):
        pool.apply(tasks.return_exploding)
    with pytest.raises(tpool.DecodeError, match="traceback above"):
        pool.apply(tasks.raise_cannot_unpickle)
    with pytest.raises(tpool.TransportError, match="a worker on Ray"), multiprocessing.Pipe()[0] as end:
        pool.apply(tasks.identity, (end,))


def test_functions_of_main_share_one_namespace(pool: tpool.Pool) -> None:
    source = "def remember(x):\n    global seen\n    seen = x\n\ndef recall():\n    return seen\nseen = None\n"
    main = sys.modules["__main__"]
    exec(source, vars(main))
    try:
        with tpool.Pool(1, engine=ENGINE) as single:
            single.apply(main.remember, (7,))
            assert single.apply(main.recall) == 7
    finally:
        for name in ("remember", "recall", "seen"):
            delattr(main, name)


def test_what_is_seen_of_a_pool(pool: tpool.Pool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    result = pool.apply_async(tasks.wait_for_file, (str(gate),))
    wait_until(lambda: "wait_for_file" in pool.report().partition("runs task")[2], DEADLINE)
    assert "busy=1" in repr(pool)
    gate.touch()
    result.get(DEADLINE)
    stats = pool.stats()
    assert stats.tasks_done == sum(worker.tasks_done for worker in stats.workers) > 0
    assert {worker.pid for worker in stats.workers} == actor_pids()


def test_progress_is_shown(pool: tpool.Pool) -> None:
    seen: list[tpool.Progress] = []
    pool.map(tasks.double, range(10), progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].finished) == (10, 10, True)


def test_an_object_is_put_once(pool: tpool.Pool) -> None:
    table = pool.put(torch.ones(1_000_000))
    assert pool.map(tasks.first, [table] * 8, chunksize=1) == [1.0] * 8
    before = [pool.apply_async(tasks.first, (table,)) for _ in range(2)]
    table.update(torch.full((1_000_000,), 2.0))
    assert [result.get(DEADLINE) for result in before] == [1.0, 1.0]
    assert pool.apply(tasks.first, (table,)) == 2.0
    watched = pool.put(tasks.Watched())
    assert pool.map(tasks.count_watched, [watched] * 4, chunksize=1) == [1] * 4
    del watched
    wait_until(lambda: set(pool.map(tasks.count_watched, [None] * 8, chunksize=1)) == {0}, DEADLINE)


def test_batches_of_a_big_tensor(pool: tpool.Pool) -> None:
    data = torch.arange(40_000.0).reshape(1000, 40)
    assert pool.map_batches(torch.neg, data, batch_size=128).equal(-data)
    out = torch.empty(1000, 40)
    assert pool.map_batches(torch.neg, data, batch_size=300, out=out) is out
    assert out.equal(-data)
    assert pool.empty(3, 4).shape == (3, 4)


@pytest.mark.slow
def test_the_same_random_numbers_as_local_workers(pool: tpool.Pool) -> None:
    with tpool.Pool(1, engine=ENGINE, seed=3) as on_ray, tpool.Pool(1, seed=3) as local:
        assert on_ray.map(tasks.draw, range(5)) == local.map(tasks.draw, range(5))


# Tensors ------------------------------------------------------------------------------------------------------------

SIZES = [4_000, 400_000, 8_000_000]


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_worker_writes_into_what_it_received_and_nobody_else_sees_it(pool: tpool.Pool, nbytes: int) -> None:
    tensor = torch.ones(nbytes // 4)
    sent = pool.put(tensor)
    for _ in range(2):  # the second time the store still has what the first must not have changed
        assert pool.apply(sum_of_copy_after_adding_one, (sent,)) == 2.0 * len(tensor)
        assert pool.apply(sum_after_adding_one, (tensor,)) == 2.0 * len(tensor)
    assert tensor.sum() == len(tensor)


def sum_of_copy_after_adding_one(tensor: torch.Tensor) -> float:
    return sum_after_adding_one(tensor.clone())


def sum_after_adding_one(tensor: torch.Tensor) -> float:
    tensor += 1
    return float(tensor.sum())


@pytest.mark.parametrize("nbytes", SIZES)
def test_results_are_the_callers_to_write(pool: tpool.Pool, nbytes: int) -> None:
    results = pool.map(tasks.make_tensor, [1.0, 2.0], chunksize=1)
    assert [float(result.sum()) for result in results] == [1024.0, 2048.0]
    made = [pool.apply(tasks.make_zeros, (nbytes,)) for _ in range(2)]
    made[0] += 1
    assert (int(made[0].sum()), int(made[1].sum())) == (nbytes, 0)
    array = pool.apply(np.zeros, (nbytes // 8,))
    array += 1
    assert array.sum() == nbytes // 8


def test_a_send_is_a_snapshot(pool: tpool.Pool, tmp_path: Path) -> None:
    gate, tensor = tmp_path / "gate", torch.ones(300_000)
    view = tensor.numpy()
    blockers = [pool.apply_async(tasks.wait_for_file, (str(gate),)) for _ in range(2)]
    sums = [pool.apply_async(torch.sum, (tensor,)) for _ in range(2)]
    view += 1  # no counter of torch's sees this
    sums.append(pool.apply_async(torch.sum, (tensor,)))
    gate.touch()
    assert [int(each.get(DEADLINE)) for each in [*blockers, *sums]][2:] == [300_000, 300_000, 600_000]


def test_results_outlive_the_pool(pool: tpool.Pool) -> None:
    with tpool.Pool(1, engine=ENGINE) as single:
        result = single.apply_async(tasks.make_zeros, (2_000_000,))
        taken = single.apply(tasks.make_zeros, (2_000_000,))
        result.wait(DEADLINE)
        single.close()
        single.join()
    assert int(result.get().sum()) == int(taken.sum()) == 0


# Losses -------------------------------------------------------------------------------------------------------------


def test_a_killed_worker_fails_its_task_alone(pool: tpool.Pool) -> None:
    items = [(number, number == 7) for number in range(30)]
    results = [pool.apply_async(tasks.kill_self_if, (item,)) for item in items]
    for number, result in enumerate(results):
        if number == 7:
            with pytest.raises(tpool.WorkerLostError, match="Ray says"):
                result.get(DEADLINE)
        else:
            assert result.get(DEADLINE) == number
    assert pool.stats().workers_lost == 1


def test_a_task_among_many_short_ones_that_kills_its_worker_fails_alone(pool: tpool.Pool) -> None:
    lost_before = pool.stats().workers_lost
    done = pool.imap_unordered(tasks.kill_self_if, [(number, number == 3_000) for number in range(4_000)])
    seen, errors = [], 0
    while True:
        try:
            seen.append(next(done))
        except StopIteration:
            break
        except tpool.WorkerLostError:
            errors += 1
    assert (errors, sorted(seen)) == (1, [n for n in range(4_000) if n != 3_000])
    assert pool.stats().workers_lost == lost_before + 1


def test_a_lost_task_is_tried_again(pool: tpool.Pool, tmp_path: Path) -> None:
    assert pool.apply(tasks.die_until, (str(tmp_path / "tries"), 2), retries=2) == 2
    path = str(tmp_path / "failures")
    assert pool.apply(tasks.fail_until, (path, 3, OSError("again")), retries=2, retry_on=OSError) == 3


def test_a_time_limit_ends_its_task_alone(pool: tpool.Pool) -> None:
    results = pool.map_async(tasks.hang_if, [(number, number == 2) for number in range(6)], timeout=1.0)
    with pytest.raises(tpool.TaskTimeoutError):
        results.get(DEADLINE)
    assert pool.map(tasks.double, range(6)) == [0, 2, 4, 6, 8, 10]


def test_a_running_call_is_cancelled(pool: tpool.Pool, tmp_path: Path) -> None:
    result = pool.submit(tasks.tell_pid_and_hang, str(tmp_path / "pid"))
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), DEADLINE)
    assert result.cancel(kill=True)
    with pytest.raises(tpool.TaskCancelledError):
        result.result(DEADLINE)


def test_tasks_behind_a_long_one_are_taken_back(pool: tpool.Pool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    items: list[Any] = [*range(2_000), str(gate), *range(300)]
    os.mkfifo(gate)
    done = pool.imap_unordered(tasks.open_if_path, items)
    seen = [next(done) for _ in range(2_300)]  # all but the one that waits
    with open(gate, "w"):
        assert next(done) == str(gate)
    assert sorted(seen) == sorted([*range(2_000), *range(300)])


# Workers ------------------------------------------------------------------------------------------------------------


def test_the_life_of_a_worker(local_ray: Any, tmp_path: Path) -> None:
    with tpool.Pool(
        1, tasks.open_log, (str(tmp_path),), maxtasksperchild=3, worker_exit=tasks.close_log, engine=ENGINE
    ) as pool:
        pids = pool.map(tasks.note, range(5), chunksize=1)
        assert len(set(pids)) == 2
        pool.close()
        pool.join(DEADLINE)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {str(pids[0]): "0 1 2 closed ", str(pids[3]): "3 4 closed "}


def test_an_initializer_that_raises_ends_the_pool(local_ray: Any) -> None:
    with (
        tpool.Pool(1, tasks.raise_if_not, (False,), engine=ENGINE) as pool,
        pytest.raises(RuntimeError, match="failed as asked"),
    ):
        pool.map(tasks.double, range(4))


@pytest.mark.slow
def test_a_worker_that_grows_too_heavy_is_replaced(local_ray: Any) -> None:
    with tpool.Pool(1, max_memory=1, engine=ENGINE) as pool:
        assert len(set(pool.map(tasks.get_pid, range(2), chunksize=1))) == 2
        assert pool.stats().workers_lost == 0


def test_the_surroundings_of_a_worker(pool: tpool.Pool) -> None:
    directory, path, info, threads = pool.apply(surroundings)
    assert directory == os.getcwd()
    assert set(sys.path) <= {*path, ""}
    assert (info.id in (0, 1), info.num_workers, threads) == (True, 2, 1)


def surroundings() -> Any:
    return os.getcwd(), list(sys.path), tpool.get_worker_info(), torch.get_num_threads()


def test_options_that_mean_nothing_on_ray_are_refused(local_ray: Any) -> None:
    for option in ({"context": "fork"}, {"memory": "1GB"}, {"sharing": "share"}, {"affinity": True},
                   {"devices": ["cpu"]}, {"forward_logs": True}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.*engine='ray'"):
            tpool.Pool(1, engine="ray", **option)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be 'local', 'ray'"):
        tpool.Pool(1, engine="spark")
    with pytest.raises(TypeError, match="must be 'local', 'ray'"):
        tpool.Pool(1, engine=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="connected to Ray at"):
        tpool.Pool(1, engine=tpool.RayEngine(address="127.0.0.1:1"))


def test_a_pool_is_as_large_as_the_cluster(local_ray: Any) -> None:
    with tpool.Pool(engine=tpool.RayEngine(num_cpus=2)) as pool:
        assert "pool_size=2" in repr(pool)
    with pytest.raises(ValueError, match="room for none"):
        tpool.Pool(engine=tpool.RayEngine(num_gpus=1))


def test_waiting_for_resources_ends(local_ray: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = tpool.RayEngine(num_cpus=1000, start_timeout=0.2)
    with (
        tpool.Pool(1, engine=engine) as pool,
        pytest.raises(tpool.WorkerStartError, match=r"each needs 1000 CPU.*of 4 CPU"),
    ):
        pool.map(tasks.double, [1])


def test_progress_tells_what_workers_wait_for(local_ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "TELL_SECONDS", 0.1)
    seen: list[tpool.Progress] = []
    alone = tpool.RayEngine(num_cpus=0, resources={"node:__internal_head__": 1})  # of which there is one
    with tpool.Pool(1, engine=alone) as first:
        assert first.apply(tasks.double, (1,)) == 2
        with tpool.Pool(1, engine=alone) as second:
            result = second.map_async(tasks.double, [1, 2], progress=seen.append)
            wait_until(lambda: seen and seen[-1].waiting, DEADLINE)
            assert seen[-1].waiting.startswith(
                "1 of 1 workers wait for resources: each needs 1 node:__internal_head__, and free"
            )
            assert (seen[-1].done, seen[-1].finished) == (0, False)
            first.terminate()
            assert result.get(DEADLINE) == [2, 4]
            wait_until(lambda: seen[-1].finished, DEADLINE)
            assert seen[-1].waiting == ""


# The end ------------------------------------------------------------------------------------------------------------


def test_terminate_ends_running_tasks(local_ray: Any, tmp_path: Path) -> None:
    threads, actors = set(threading.enumerate()), actor_pids()
    pool = tpool.Pool(1, engine=ENGINE)
    result = pool.apply_async(tasks.tell_pid_and_hang, (str(tmp_path / "pid"),))
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), DEADLINE)
    pool.terminate()
    with pytest.raises(tpool.PoolTerminatedError):
        result.get(DEADLINE)
    pool.join()
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: process_info(pid) is None, DEADLINE)
    del pool
    expect_nothing_left(threads, actors)


def test_ctrl_c_ends_a_map(pool: tpool.Pool) -> None:
    # Ignored where the tests were started in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.map(tasks.sleep, [0.05] * 400, chunksize=1)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < DEADLINE
    assert pool.apply(tasks.double, (1,)) == 2
