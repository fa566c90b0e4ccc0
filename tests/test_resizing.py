"""A live pool grows and shrinks; with real processes, through the public API."""

from __future__ import annotations

import os
import resource

import pool_tasks as tasks
import pytest
import torch
from support import wait_until

import tpool

DEADLINE = 60


def pids(pool):
    return {worker.pid for worker in pool.stats().workers if worker.pid is not None}


def has_workers(pool, count):
    wait_until(lambda: len(pids(pool)) == count, DEADLINE, f"{count} workers")
    return pids(pool)


def wait_idle(pool, count):
    wait_until(lambda: pool.report(stacks=False).count(": idle") == count, DEADLINE, f"{count} idle workers")


# Growing ----------------------------------------------------------------------------------------------------------


def test_new_workers_join_what_is_under_way(tmp_path):
    with tpool.Pool(1) as pool:
        result = pool.starmap_async(tasks.meet, [(str(tmp_path), 3)] * 3, chunksize=1)
        wait_until(lambda: list(tmp_path.iterdir()), DEADLINE)
        pool.resize(3)
        assert len(set(result.get(DEADLINE))) == 3
        assert [worker.id for worker in pool.stats().workers] == [0, 1, 2]
        assert "pool_size=3" in repr(pool)


def test_what_new_workers_are_given():
    with tpool.Pool(1, tasks.set_state, (7,), devices=["cpu", "meta"]) as pool:
        (first,) = set(pool.map(tasks.info_and_threads, range(3), chunksize=1))
        pool.resize(2)
        found = {first}

        def both():
            found.update(pool.map(tasks.info_and_threads, range(8), chunksize=1))
            return len(found) == 2

        wait_until(both, DEADLINE)
        threads = [max(1, len(os.sched_getaffinity(0)) // count) for count in (1, 2)]
        assert sorted(found) == [(0, 1, threads[0], "cpu"), (1, 2, threads[1], "meta")]
        assert set(pool.map(tasks.get_state, range(8), chunksize=1)) == {7}


def test_defaults_follow():
    with tpool.Pool(1) as pool:
        pool.map(tasks.double, range(64))
        assert pool.stats().tasks_done == 4
        pool.resize(4)
        pool.map(tasks.double, range(64))
        assert pool.stats().tasks_done == 4 + 16
        pool.resize(2)
        pool.map(tasks.double, range(64))
        assert pool.stats().tasks_done == 4 + 16 + 8


def test_an_initializer_that_fails_later(tmp_path):
    with tpool.Pool(1, tasks.fail_if_exists, (str(tmp_path / "bad"),)) as pool:
        assert pool.apply(tasks.double, (2,)) == 4
        (tmp_path / "bad").touch()
        pool.resize(2)
        wait_until(lambda: pool._handler.ended, DEADLINE)
        with pytest.raises(tpool.WorkerStartError):
            pool.apply(tasks.double, (2,))


# Shrinking --------------------------------------------------------------------------------------------------------


def test_the_idle_go_first_and_what_runs_is_finished(tmp_path):
    with tpool.Pool(3) as pool:
        wait_idle(pool, 3)
        result = pool.apply_async(tasks.tell_pid_and_wait, (str(tmp_path / "pid"), str(tmp_path / "gate")))
        busy = int(wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), DEADLINE))
        pool.resize(1)
        assert has_workers(pool, 1) == {busy}
        assert not result.ready()
        (tmp_path / "gate").touch()
        result.get(DEADLINE)
        assert pool.apply(tasks.get_pid) == busy
        assert pool.report(stacks=False).count("worker ") - pool.report(stacks=False).count("before it") == 1
        assert pool._repr_html_().count("<tr>") == 2
        assert pool.stats().workers_lost == 0


def test_the_busy_end_their_tasks_and_get_no_others(tmp_path):
    with tpool.Pool(3) as pool:
        wait_idle(pool, 3)
        result = pool.map_async(tasks.wait_for_file, [str(tmp_path / "gate")] * 3, chunksize=1)
        rest = pool.map_async(tasks.get_pid, range(50), chunksize=1)
        wait_until(lambda: pool.report(stacks=False).count("runs task") == 3, DEADLINE)
        pool.resize(1)
        (tmp_path / "gate").touch()
        assert len(set(result.get(DEADLINE))) == 3
        (left,) = has_workers(pool, 1)
        assert set(rest.get(DEADLINE)) == {left}


def test_nothing_is_lost_and_order_is_kept_while_the_size_changes():
    with tpool.Pool(2) as pool:
        results = pool.imap(tasks.double, range(20_000))
        for index, value in enumerate(results):
            assert value == 2 * index
            if index % 1000 == 0:
                pool.resize(1 + index // 1000 % 4)
        assert index == 19_999
        assert pool.stats().workers_lost == 0
        pool.resize(1)
        has_workers(pool, 1)


def test_a_worker_lost_on_its_way_out_is_not_replaced(tmp_path):
    with tpool.Pool(2) as pool:
        wait_idle(pool, 2)
        gates = [tmp_path / "0", tmp_path / "1"]
        results = [pool.apply_async(tasks.wait_and_kill_self, (str(gate),)) for gate in gates]
        wait_until(lambda: pool.report(stacks=False).count("runs task") == 2, DEADLINE)
        before = pids(pool)
        pool.resize(1)
        (leaving,) = (int(pool._engine.look().slots[1].pid),)  # of the busy, who has the highest place
        for gate in gates:
            gate.touch()
        for result in results:
            with pytest.raises(tpool.WorkerLostError):
                result.get(DEADLINE)
        wait_until(lambda: pids(pool) and not pids(pool) & before, DEADLINE)
        assert leaving in before
        assert len(pids(pool)) == 1
        assert pool.apply(tasks.double, (1,)) == 2


def test_a_lent_worker_can_be_the_one_to_go():
    with tpool.Pool(2) as pool:
        wait_idle(pool, 2)
        wait_until(lambda: pool.apply(tasks.double, (1,)) and pool._engine._lending._lent, DEADLINE)
        pool.resize(1)
        has_workers(pool, 1)
        assert [pool.apply(tasks.double, (x,)) for x in range(20)] == [2 * x for x in range(20)]
        wait_until(lambda: pool.apply(tasks.double, (1,)) and pool._engine._lending._lent, DEADLINE)
        pool.resize(2)
        has_workers(pool, 2)
        pool.resize(1)
        has_workers(pool, 1)
        assert pool.apply(tasks.double, (3,)) == 6


def test_worker_exit_runs_and_tasks_are_counted(tmp_path):
    with tpool.Pool(3, tasks.open_log, (str(tmp_path),), maxtasksperchild=5, worker_exit=tasks.close_log) as pool:
        wait_idle(pool, 3)
        pool.resize(1)
        has_workers(pool, 1)
        assert len(list(tmp_path.iterdir())) == 2
        pool.resize(2)
        assert pool.map(tasks.double, range(40), chunksize=1) == [2 * x for x in range(40)]


def test_the_end_in_the_middle_of_it(tmp_path):
    with tpool.Pool(2) as pool:
        wait_idle(pool, 2)
        results = [pool.apply_async(tasks.wait_for_file, (str(tmp_path / "gate"),)) for _ in range(2)]
        wait_until(lambda: pool.report(stacks=False).count("runs task") == 2, DEADLINE)
        pool.resize(1)
        pool.resize(4)
        pool.resize(1)
        pool.close()
        (tmp_path / "gate").touch()
        pool.join(DEADLINE)
        assert all(result.successful() for result in results)
        with pytest.raises(tpool.PoolEndedError):
            pool.resize(2)


# Memory -----------------------------------------------------------------------------------------------------------


def test_results_outlive_the_place_and_its_memory_is_given_back():
    with tpool.Pool(3, memory="64MB") as pool:
        wait_idle(pool, 3)
        made = pool.map(tasks.make_tensor, [1.0, 2.0, 3.0] * 2, chunksize=1)
        big = pool.map(tasks.make_zeros, [1 << 20] * 9, chunksize=1)
        del big
        pool.resize(1)
        has_workers(pool, 1)
        wait_until(lambda: sum(w.memory_nbytes for w in pool.stats().workers if w.pid is None) <= 1 << 16, DEADLINE)
        assert [float(tensor[-1]) for tensor in made] == [1.0, 2.0, 3.0] * 2
        # What is left has room for what three had, and more than that is refused as ever.
        assert pool.apply(tasks.make_zeros, (40 << 20,)).nbytes == 40 << 20
        pool.resize(3)
        wait_idle(pool, 3)
        more = pool.map(tasks.make_tensor, [4.0] * 12, chunksize=1)
        assert [float(tensor[-1]) for tensor in made] == [1.0, 2.0, 3.0] * 2
        assert all((tensor == 4.0).all() for tensor in more)


def test_new_workers_share_the_budget():
    with tpool.Pool(1, memory="32MB") as pool:
        pool.resize(3)
        wait_idle(pool, 3)
        with pytest.raises(tpool.SharedMemoryExhausted):
            kept = pool.map(tasks.make_zeros, [8 << 20] * 6, chunksize=1)
            del kept
        assert pool.map(tasks.double, [torch.ones(4)] * 3, chunksize=1)[0].sum() == 8


# Bad values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "size"),
    [
        (ValueError, r"at least 1 worker, not 0; close\(\) it", 0),
        (TypeError, "processes must be a number of workers, not None", None),
        (TypeError, "processes must be a number of workers, not True", True),
        (ValueError, r"this pool can grow to \d+ workers, not to 5000", 5000),
    ],
)
def test_bad_sizes(error, match, size):
    with tpool.Pool(1) as pool:
        with pytest.raises(error, match=match):
            pool.resize(size)
        assert "pool_size=1" in repr(pool)
        assert pool.apply(tasks.double, (2,)) == 4


def test_without_room_nothing_changes():
    with tpool.Pool(1) as pool:
        wait_idle(pool, 1)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3, hard))
        try:
            with pytest.raises(tpool.PlatformError, match=r"no room for 20 workers.*Too many open files.*ulimit -n"):
                pool.resize(20)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "pool_size=1" in repr(pool)
        pool.resize(2)
        has_workers(pool, 2)
