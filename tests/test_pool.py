"""The pool through its public API, with real processes, under every start method."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time

import numpy as np
import pool_tasks as tasks
import pytest
import torch
from methods import METHODS, seldom_spawned
from support import run_script, wait_until

import tpool
from tpool.local import hunger

DEADLINE = 30


@pytest.fixture(scope="module", params=METHODS)
def pool(request):
    """One pool of two workers for all tests that leave it as they found it."""
    with tpool.Pool(2, context=request.param) as pool:
        # Everything that a pool starts in its time is there before the first test looks.
        wait_until(lambda: len(set(pool.map(tasks.get_pid, range(20), chunksize=1))) == 2, DEADLINE)
        pool.apply_async(tasks.identity, (1,), callback=str).wait(DEADLINE)
        yield pool


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


# The API ----------------------------------------------------------------------------------------------------------


def test_apply(pool):
    assert pool.apply(tasks.add, (1,), {"y": 2}) == 3
    assert pool.apply_async(tasks.add, (1, 2)).get(DEADLINE) == 3


@pytest.mark.parametrize("chunksize", [None, 1, 7, 1000])
def test_map(pool, chunksize):
    assert pool.map(tasks.double, range(100), chunksize) == [2 * x for x in range(100)]
    assert pool.map_async(tasks.double, range(100), chunksize).get(DEADLINE) == [2 * x for x in range(100)]
    assert pool.starmap(tasks.add, zip(range(50), range(50)), chunksize) == [2 * x for x in range(50)]
    assert pool.starmap_async(tasks.add, [(1, 2)], chunksize).get(DEADLINE) == [3]
    assert pool.map(tasks.double, [], chunksize) == []


@pytest.mark.parametrize("chunksize", [1, 10])
def test_imap(pool, chunksize):
    assert list(pool.imap(tasks.double, range(300), chunksize)) == [2 * x for x in range(300)]
    assert sorted(pool.imap_unordered(tasks.double, range(300), chunksize)) == [2 * x for x in range(300)]
    assert list(pool.imap(tasks.double, [])) == []


@pytest.mark.parametrize("chunksize", [1, 10])
def test_next_with_a_timeout(pool, chunksize, tmp_path):
    gate = tmp_path / "gate"
    iterator = pool.imap(tasks.wait_for_file, [str(gate)], chunksize)
    with pytest.raises(multiprocessing.TimeoutError):
        iterator.next(timeout=0.01)
    gate.touch()
    assert iterator.next(timeout=DEADLINE) > 0
    with pytest.raises(StopIteration):
        iterator.next(timeout=DEADLINE)


def test_get_with_a_timeout(pool, tmp_path):
    gate = tmp_path / "gate"
    result = pool.apply_async(tasks.wait_for_file, (str(gate),))
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.01)
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    assert not result.ready()
    gate.touch()
    result.wait(DEADLINE)
    assert result.ready()
    assert result.successful()
    assert result.get() == result.get()


def test_an_exception_arrives_as_itself_with_the_remote_traceback(pool):
    with pytest.raises(ValueError, match="odd: 3") as caught:
        pool.apply(tasks.raise_if_odd, (3,))
    assert isinstance(caught.value.__cause__, tpool.RemoteTraceback)
    assert 'raise ValueError(f"odd: {x}")' in str(caught.value.__cause__)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_base_exceptions_are_the_tasks_own(pool, error):
    with pytest.raises(type(error)):
        pool.apply(tasks.raise_exception, (error,))
    assert pool.apply(tasks.double, (1,)) == 2


def test_a_failed_map_raises_the_first_failure_and_runs_the_rest(pool, tmp_path):
    with pytest.raises(ValueError, match="odd"):
        pool.map(tasks.raise_if_odd, range(10), chunksize=2)


def test_one_bad_item_does_not_lose_the_others_of_its_chunk(pool):
    iterator = pool.imap(tasks.raise_if_odd, range(10), chunksize=5)
    seen = []
    for _ in range(10):
        try:
            seen.append(next(iterator))
        except ValueError as error:
            seen.append(str(error))
    assert seen == [x if x % 2 == 0 else f"odd: {x}" for x in range(10)]
    assert next(iterator, "end") == "end"


def test_an_input_that_raises(pool):
    def numbers():
        yield 1
        yield 2
        raise LookupError("no more numbers")

    iterator = pool.imap(tasks.double, numbers())
    assert next(iterator) == 2
    assert next(iterator) == 4
    with pytest.raises(LookupError, match="no more numbers"):
        next(iterator)
    assert next(iterator, "end") == "end"
    with pytest.raises(TypeError):
        pool.map(tasks.double, 5)
    with pytest.raises(TypeError):
        list(pool.imap(tasks.double, 5))


def test_input_is_drawn_only_as_results_are_consumed(pool):
    drawn = itertools.count()
    iterator = pool.imap(tasks.double, drawn)
    assert [next(iterator) for _ in range(100)] == [2 * x for x in range(100)]
    del iterator
    slow = itertools.count()
    iterator = pool.imap(tasks.identity, slow, buffersize=3)
    next(iterator)
    wait_until(lambda: next(slow) >= 4, DEADLINE)  # counts our own looks too: at most 4 were drawn
    assert next(slow) <= 10
    del iterator


def test_an_endless_input_of_slow_tasks_draws_a_few_per_worker(pool, tmp_path):
    count = 0

    def paths():
        nonlocal count
        while True:
            count += 1
            yield str(tmp_path / "gate")

    iterator = pool.imap_unordered(tasks.wait_for_file, paths())
    wait_until(lambda: count >= 8, DEADLINE)
    with pytest.raises(multiprocessing.TimeoutError):
        iterator.next(timeout=0.1)
    assert count == 8
    (tmp_path / "gate").touch()
    next(iterator)
    del iterator


def test_callbacks(pool):
    seen = []
    result = pool.apply_async(tasks.double, (4,), callback=seen.append)
    result.wait(DEADLINE)
    assert seen == [8]  # before the result is ready
    errors = []
    result = pool.map_async(tasks.raise_if_odd, [1], callback=seen.append, error_callback=errors.append)
    result.wait(DEADLINE)
    assert [str(error) for error in errors] == ["odd: 1"]
    assert seen == [8]


def test_a_callback_that_raises_harms_nobody(pool, caplog):
    def fail(value):
        raise RuntimeError("callback broke")

    assert pool.apply_async(tasks.double, (4,), callback=fail).get(DEADLINE) == 8
    assert pool.apply_async(tasks.double, (5,), callback=lambda value: None).get(DEADLINE) == 10
    assert "callback broke" in caplog.text


def test_a_callback_may_use_the_pool(pool):
    more = []
    done = threading.Event()

    def submit(value):
        more.append(pool.apply_async(tasks.double, (value,)))
        done.set()

    pool.apply_async(tasks.double, (4,), callback=submit).wait(DEADLINE)
    assert done.wait(DEADLINE)
    assert more[0].get(DEADLINE) == 16


def test_what_cannot_be_pickled(pool):
    with pytest.raises(TypeError, match="stays where it is"):
        pool.apply(tasks.identity, (tasks.Unpicklable(),))
    with pytest.raises(TypeError, match="stays where it is"):
        pool.map(tasks.identity, [1, tasks.Unpicklable()], chunksize=1)
    with pytest.raises(tpool.MaybeEncodingError, match="stays where it is"):
        pool.apply(tasks.return_unpicklable)
    iterator = pool.imap(tasks.identity, [1, tasks.Unpicklable(), 3])
    assert next(iterator) == 1
    with pytest.raises(TypeError, match="stays where it is"):
        next(iterator)
    assert next(iterator) == 3
    assert pool.apply(tasks.double, (1,)) == 2


def test_what_cannot_be_unpickled(pool):
    with pytest.raises(tpool.DecodeError, match="not in this process"):
        pool.apply(tasks.return_exploding)
    with pytest.raises(tpool.DecodeError, match="not in this process"):
        pool.apply(tasks.identity, (tasks.ExplodesOnLoad(),))
    with pytest.raises(tpool.DecodeError) as caught:
        pool.apply(tasks.raise_cannot_unpickle)
    assert "a story worth reading" in str(caught.value.__cause__)
    assert pool.apply(tasks.double, (1,)) == 2


def test_argument_errors(pool):
    for chunksize in (0, -1):
        with pytest.raises(ValueError, match="Chunksize must be 1"):
            pool.map(tasks.double, [1], chunksize=chunksize)
        with pytest.raises(ValueError, match="Chunksize must be 1"):
            pool.imap(tasks.double, [1], chunksize=chunksize)
    with pytest.raises(ValueError, match="buffersize"):
        pool.imap(tasks.double, [1], buffersize=0)
    with pytest.raises(ValueError, match="Number of processes must be at least 1"):
        tpool.Pool(0)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        tpool.Pool(1, initializer=3)
    with pytest.raises(ValueError, match="maxtasksperchild"):
        tpool.Pool(1, maxtasksperchild=0)
    with pytest.raises(ValueError, match="context must be one of"):
        tpool.Pool(1, context="threads")
    with pytest.raises(ValueError, match="is not a size"):
        tpool.Pool(1, memory="many")
    with pytest.raises(ValueError, match="sharing must be"):
        tpool.Pool(1, sharing="maybe")
    with pytest.raises(TypeError, match="preload must be a list"):
        tpool.Pool(1, preload="torch")
    with pytest.raises(NotImplementedError, match="cannot be passed between processes"):
        pickle.dumps(pool)


@seldom_spawned
def test_context_objects(method):
    with tpool.Pool(1, context=multiprocessing.get_context(method)) as pool:
        assert method.replace("server", "") in pool.apply(tasks.surroundings)["name"].lower()


# The life of a pool -----------------------------------------------------------------------------------------------


@seldom_spawned
def test_close_and_join(method):
    pool = tpool.Pool(2, context=method)
    result = pool.map_async(tasks.double, range(100))
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    pool.close()
    with pytest.raises(ValueError, match="not running"):
        pool.apply(tasks.double, (1,))
    with pytest.raises(ValueError, match="not running"), pool:
        pass
    pool.join()
    assert result.get() == [2 * x for x in range(100)]
    pool.join()
    pool.terminate()


def test_join_with_a_timeout(tmp_path):
    pool = tpool.Pool(1)
    pool.apply_async(tasks.wait_for_file, (str(tmp_path / "gate"),))
    pool.close()
    with pytest.raises(multiprocessing.TimeoutError):
        pool.join(timeout=0.05)
    (tmp_path / "gate").touch()
    pool.join(timeout=DEADLINE)


@seldom_spawned
def test_terminate_gives_every_waiting_call_an_end(method):
    with tpool.Pool(2, context=method) as pool:
        pool.apply(tasks.double, (1,))
        results = [pool.apply_async(tasks.sleep, (60,)) for _ in range(5)]
        mapped = pool.map_async(tasks.sleep, [60] * 5, chunksize=1)
        stream = pool.imap(tasks.sleep, itertools.repeat(60))
    for result in [*results, mapped]:
        with pytest.raises(tpool.PoolTerminatedError):
            result.get(DEADLINE)
    outcomes = []
    while outcomes[-1:] != ["end"]:
        try:
            outcomes.append(next(stream, "end"))
        except tpool.PoolTerminatedError:
            outcomes.append("terminated")
    assert outcomes[0] == "terminated"


def test_a_pool_dropped_while_running_warns_and_ends():
    pool = tpool.Pool(1)
    pid = pool.apply(os.getpid)
    with pytest.warns(ResourceWarning, match="unclosed running multiprocessing pool"):
        del pool
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), DEADLINE)


def test_a_result_keeps_its_pool():
    result = tpool.Pool(1).apply_async(tasks.double, (21,))
    with pytest.warns(ResourceWarning, match="unclosed running"):
        assert result.get(DEADLINE) == 42


def test_the_state_in_a_line():
    pool = tpool.Pool(1)
    assert repr(pool) == "<tpool.Pool state=RUN pool_size=1 busy=0 done=0>"
    pool.close()
    assert repr(pool) == "<tpool.Pool state=CLOSE pool_size=1 busy=0 done=0>"
    pool.terminate()
    assert repr(pool) == "<tpool.Pool state=TERMINATE pool_size=1 busy=0 done=0>"
    pool.join()


def test_using_the_pool_in_a_forked_child_is_refused(pool):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            pool.apply(tasks.double, (1,))
        except tpool.PoolEndedError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    assert "belongs to process" in text
    assert pool.apply(tasks.double, (1,)) == 2


# Workers ----------------------------------------------------------------------------------------------------------


@seldom_spawned
def test_surroundings(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TPOOL_TEST_VARIABLE", "seen")
    monkeypatch.syspath_prepend(str(tmp_path))
    with tpool.Pool(2, context=method) as pool:
        monkeypatch.setenv("TPOOL_TEST_VARIABLE", "too late")
        seen = pool.map(tasks.surroundings, range(8), chunksize=1)
    for one in seen:
        assert one["cwd"] == str(tmp_path)
        assert one["variable"] == "seen"
        assert one["path"] == sys.path
        assert one["argv"] == sys.argv
        assert one["parent"] == os.getpid()
        assert one["daemon"] is False
        assert one["threads"] == 1
        assert one["stdin"] == ""
        assert "PoolWorker-" in one["name"]
        assert one["info"].num_workers == 2
        assert one["info"].id in (0, 1)
    assert tpool.get_worker_info() is None


@seldom_spawned
def test_seeds_differ_by_worker(method):
    with tpool.Pool(2, context=method) as pool:
        seen = {one["info"].id: one for one in pool.map(tasks.surroundings, range(20), chunksize=1)}
        if len(seen) == 2:
            assert seen[0]["info"].seed != seen[1]["info"].seed


@seldom_spawned
def test_multiprocessing_objects_in_initargs(method):
    context = multiprocessing.get_context(method)
    objects = (context.Lock(), context.Event(), context.Queue(), context.Value("i", 0), 2)
    with tpool.Pool(2, tasks.use_mp_objects, objects, context=method) as pool:
        result = pool.map_async(tasks.talk, range(4), chunksize=1)
        assert sorted(objects[2].get(timeout=DEADLINE) for _ in range(2)) == [0, 1]
        objects[1].set()
        assert result.get(DEADLINE) == [True] * 4
        assert objects[3].value == 4
        for _ in range(2):
            objects[2].get(timeout=DEADLINE)
    objects[2].close()
    objects[2].join_thread()


def test_a_lock_of_the_fork_context_is_refused_with_the_cure():
    lock = multiprocessing.get_context("fork").Lock()
    with pytest.raises(RuntimeError, match="context='fork'"):
        tpool.Pool(1, tasks.set_state, (lock,))


@seldom_spawned
def test_the_initializer(method):
    with tpool.Pool(2, tasks.set_state, ("prepared",), context=method) as pool:
        assert set(pool.map(tasks.get_state, range(10), chunksize=1)) == {"prepared"}


@seldom_spawned
def test_each_worker_of_a_closed_pool_runs_its_initializer(method, tmp_path):
    pool = tpool.Pool(3, tasks.write_pid_to_directory, (str(tmp_path),), context=method)
    pool.close()
    pool.join(DEADLINE)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_closed_pool_waits_for_no_worker_that_starts_for_nothing():
    pool = tpool.Pool(1, context="spawn")  # which takes seconds to start
    pool.close()
    pool.join(DEADLINE)
    assert "was stopped while it started" in pool.report()


@seldom_spawned
def test_an_initializer_that_raises_ends_the_pool_with_its_error(method):
    with tpool.Pool(2, tasks.raise_if_not, (False,), context=method) as pool:
        result = pool.apply_async(tasks.double, (1,))
        with pytest.raises(RuntimeError, match="the initializer failed as asked") as caught:
            result.get(DEADLINE)
        assert "raise_if_not" in str(caught.value.__cause__)
        with pytest.raises(tpool.WorkerStartError) as later:
            wait_until(lambda: pool.apply(tasks.double, (1,)) and False, DEADLINE)
        assert later.value.__cause__ is caught.value


@seldom_spawned
def test_maxtasksperchild_counts_tasks_not_chunks(method):
    with tpool.Pool(1, maxtasksperchild=3, context=method) as pool:
        pids = pool.map(tasks.get_pid, range(12), chunksize=6)
        assert len(set(pids)) == 4
        pids = list(pool.imap(tasks.get_pid, range(6)))
        assert max(pids.count(pid) for pid in pids) <= 3


@seldom_spawned
def test_a_retired_worker_collects_its_garbage(method, tmp_path):
    end = tmp_path / "end"
    with tpool.Pool(1, maxtasksperchild=1, context=method) as pool:
        pool.apply(tasks.keep_cycle, (str(end),))
        pool.apply(tasks.get_pid)
        assert not end.exists()  # kept by a global: alive to the end
    with tpool.Pool(1, maxtasksperchild=2, context=method) as pool:
        pool.apply(tasks.keep_cycle, (str(end),))
        pool.apply(tasks.drop_kept)
        wait_until(end.exists, DEADLINE)


@pytest.mark.leaves("the worker's own zygote stays for ten seconds")
def test_a_task_may_make_its_own_pool(pool):
    assert pool.apply(tasks.use_nested_pool, ([1, 2, 3],)) == [2, 4, 6]


@pytest.mark.leaves("the worker's own zygote stays for ten seconds")
def test_tensors_pass_through_nested_pools(pool):
    assert torch.equal(pool.apply(tasks.nested_tensor, (7,)), tasks.make_tensor(7))
    tensor = torch.zeros(10_000)
    result = pool.apply(tasks.resend_in_nested_pool, (tensor,))
    assert torch.equal(result, torch.ones(10_000))
    assert torch.equal(tensor, torch.ones(10_000))  # one memory, two hops away


@seldom_spawned
def test_tasks_that_wait_for_each_other_do_not_deadlock(method, tmp_path):
    with tpool.Pool(3, context=method) as pool:
        pool.map(tasks.identity, range(1000), chunksize=1)  # so that tasks are believed to be short
        meet = functools.partial(tasks.wait_at, str(tmp_path), 3, 20)
        assert pool.map(meet, range(3), chunksize=1) == [0, 1, 2]


def test_a_killed_worker_fails_its_task_only(method):
    with tpool.Pool(2, context=method) as pool:
        results = [pool.apply_async(tasks.kill_self_if, ((i, i == 7),)) for i in range(20)]
        for i, result in enumerate(results):
            if i != 7:
                assert result.get(DEADLINE) == i
        with pytest.raises(
            tpool.WorkerLostError, match=r"killed by SIGKILL while it ran task 0 of apply\(kill_self_if\)"
        ) as e:
            results[7].get(DEADLINE)
        assert e.value.exitcode == -signal.SIGKILL
        assert str(e.value.pid) in str(e.value)
        assert pool.map(tasks.double, range(10)) == [2 * x for x in range(10)]
        assert pool.stats().workers_lost == 1


@seldom_spawned
def test_a_killed_worker_in_streams_and_maps(method):
    with tpool.Pool(2, context=method) as pool:
        outcomes = []
        iterator = pool.imap(tasks.kill_self_if, ((i, i == 500) for i in range(1000)))
        for _ in range(1000):
            try:
                outcomes.append(next(iterator))
            except tpool.WorkerLostError:
                outcomes.append("lost")
        assert outcomes == [i if i != 500 else "lost" for i in range(1000)]
        with pytest.raises(tpool.WorkerLostError):
            pool.map(tasks.kill_self_if, [(i, i == 5) for i in range(20)])
        assert pool.map(tasks.double, range(10)) == [2 * x for x in range(10)]


# Tensors ----------------------------------------------------------------------------------------------------------


def test_a_workers_write_is_seen_by_the_caller(pool):
    plain = torch.zeros(1000)
    view = torch.zeros(40, 50)[3:20, ::2]
    parameter = torch.nn.Parameter(torch.zeros(100))
    shared = torch.zeros(1000).share_memory_()
    for tensor in (plain, view, parameter, shared):
        pool.apply(tasks.add_one_in_place, (tensor,))
        assert bool((tensor == 1).all())
        pool.apply(tasks.add_one_in_place, (tensor,))
        assert bool((tensor == 2).all())
    assert bool((view._base[0] == 0).all())


def test_sender_and_receiver_share_a_module(pool):
    module = torch.nn.Linear(3, 3)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    pool.apply(tasks.add_one_in_place, (module.weight,))
    assert bool((module.weight == 1).all())


@pytest.mark.parametrize("nbytes", [4, 4096, 1_000_000, 20_000_000])
def test_tensors_both_ways(pool, nbytes):
    results = pool.map(tasks.double, [torch.full((nbytes // 4,), float(i)) for i in range(6)], chunksize=1)
    for i, result in enumerate(results):
        assert result.shape == (nbytes // 4,)
        assert bool((result == 2 * i).all())


def test_results_outlive_their_worker():
    with tpool.Pool(1, maxtasksperchild=1) as pool:
        results = pool.map(tasks.make_tensor, [float(i) for i in range(60)], chunksize=1)
    assert all(bool((result == i).all()) for i, result in enumerate(results))


def test_a_result_sent_on_is_not_copied(pool):
    result = pool.apply(tasks.make_tensor, (1.0, 1_000_000))
    address = result.data_ptr()
    assert pool.apply(tasks.fill, (result, 5.0)).data_ptr() == address
    assert result.data_ptr() == address
    assert bool((result == 5).all())


def test_numpy_and_bytes_through_the_arena(pool):
    before = pool.stats().piped_nbytes
    array = np.arange(1_000_000)
    assert np.array_equal(pool.apply(tasks.double, (array,)), array * 2)
    data = os.urandom(1_000_000)
    assert pool.apply(tasks.identity, (data,)) == data
    assert pool.stats().piped_nbytes - before < 100_000


def private_nbytes(pid):
    with open(f"/proc/{pid}/smaps_rollup") as stream:
        return sum(int(line.split()[1]) * 1024 for line in stream if line.startswith("Private_"))


def test_a_worker_has_little_memory_of_its_own():
    """It shares the zygote's; what each would load or make for itself, the zygote has to have before."""
    with tpool.Pool(1) as pool:
        assert pool.apply(torch.sum, (torch.ones(1024),)) == 1024
        # 7.1 to 8.3 MB where it was measured, by the environment; with numpy.random of its own 11.6 to 14.
        assert private_nbytes(pool.apply(os.getpid)) <= 10_000_000


ROUND_TRIPS = """
    import os

    import torch

    import pool_tasks as tasks
    import tpool


    def resident_nbytes(pid):
        with open(f"/proc/{pid}/smaps_rollup") as stream:
            found = dict(line.split(":") for line in stream if line.startswith(("Rss", "Anonymous")))
        return {name: int(value.split()[0]) * 1024 for name, value in found.items()}


    def growth(since, now):
        return [{name: later[name] - first[name] for name in first} for first, later in zip(since, now, strict=True)]


    torch.set_num_threads(1)  # a tensor of this size else wakes OpenMP's, which then spin on the worker's core
    with tpool.Pool(1) as pool:
        pids = pool.apply(os.getpid), os.getpid()

        def go(rounds):
            # With a window of its own: how far else is drawn ahead depends on how long a task happens to take.
            for _ in pool.imap(tasks.double, (torch.ones(250_000) for _ in range(rounds)), buffersize=4):
                pass

        go(200)
        used = pool.apply(tasks.memory_in_use), tasks.memory_in_use()
        resident = [resident_nbytes(pid) for pid in pids]
        go(2_000)
        used = growth(used, (pool.apply(tasks.memory_in_use), tasks.memory_in_use()))
        resident = growth(resident, [resident_nbytes(pid) for pid in pids])
    assert all(one["Rss"] < 10_000_000 for one in resident), resident  # 2.9 MB were seen, shared
    assert all(one["Anonymous"] < 1_000_000 for one in resident), resident
    assert all(one["malloc"] < 500_000 for one in used), used  # at most 5,500 were seen
    assert all(one["objects"] < 1_000 for one in used), used  # one of each round would be 2,000; 35 were seen
    assert all(one["mappings"] < 10 for one in used), used
"""


def test_round_trips_grow_nobodys_memory():
    # glibc keeps what was freed, twice as much as the largest mapping that it ever gave back: 12 MB were seen, and it
    # would be more in a process that had larger tensors before. Nobody's growth; so it is told to keep nothing.
    nothing = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run_script(ROUND_TRIPS, 120, nothing).expect_success()


def test_the_first_items_of_a_stream_leave_memory_for_their_results():
    with tpool.Pool(2, memory="96MB") as pool:  # eight items, as many as are drawn ahead, are as much
        results = pool.imap(tasks.double, (torch.full((3_000_000,), float(value)) for value in range(20)))
        assert [float(result[0]) for result in results] == [2.0 * value for value in range(20)]


def test_a_feeder_waits_for_memory_while_workers_start(tmp_path):
    path = str(tmp_path / "go")
    os.mkfifo(path)
    with tpool.Pool(1, tasks.open_if_path, (path,), memory="64MB") as pool:
        results = pool.imap(tasks.double, (torch.ones(3_000_000) for _ in range(10)))
        since = time.monotonic()
        wait_until(lambda: time.monotonic() > since + 1, DEADLINE)  # longer than it takes to give up hope
        with open(path, "w"):
            assert [float(result[0]) for result in results] == [2.0] * 10


def test_memory_in_the_garbage_of_workers_is_found_when_it_is_short():
    """By the worker that needs some, and by the one that is asked for some."""
    with tpool.Pool(1, memory="64MB") as pool:
        for _ in range(6):  # 20 MB each
            assert len(pool.apply(tasks.leave_in_cycle, (5_000_000,))) == 5_000_000
        assert pool.apply(len, (torch.ones(14_000_000),)) == 14_000_000


def test_who_found_memory_in_its_own_garbage_waits_no_longer(monkeypatch):
    """Or it is told, in the task after next, that there is no hope; though the caller was about to drop a result."""
    monkeypatch.setattr(hunger, "TRIM_SECONDS", 0.1)
    with tpool.Pool(1, memory="64MB") as pool:
        told = [*["nothing"] * 4000, "garbage", "tensor", *["nothing"] * 3, "nap", "tensor", *["nothing"] * 10]
        results = pool.imap(tasks.do_what_it_says, told)
        kept = []
        for what in told:
            result = next(results)  # enumerate() would hold the one before
            if what == "tensor" and not kept:
                kept.append(result)
            elif what == "nap":
                timer = threading.Timer(0.2, kept.clear)
                timer.start()
            del result
        timer.join()


def test_a_stream_whose_results_are_all_kept_says_that_memory_is_short():
    with tpool.Pool(1, memory="64MB") as pool:
        kept = []
        with pytest.raises(tpool.SharedMemoryExhausted):
            for result in pool.imap(tasks.identity, (torch.ones(3_000_000) for _ in range(10))):
                kept.append(result)
        assert len(kept) >= 3


def test_an_ordered_stream_goes_beyond_the_budget_for_the_result_it_waits_for(tmp_path):
    path = str(tmp_path / "go")
    os.mkfifo(path)
    with tpool.Pool(2, memory="64MB") as pool:
        results = pool.imap(tasks.make_tensor_after, [(path, 16_000_000), *[(None, 16_000_000)] * 3])
        # The three fill the budget, and only the first one, which has no memory left, would let them go.
        wait_until(lambda: pool.stats().tasks_done == 3, DEADLINE)
        with open(path, "w"):
            assert [result.nbytes for result in results] == [16_000_000] * 4


def cpu_ticks(pid):
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/status") as stream:
            total += sum(int(line.split()[1]) for line in stream if "ctxt_switches" in line)
    return total


@seldom_spawned
def test_an_idle_pool_sleeps(method):
    with tpool.Pool(2, context=method) as pool:
        pids = sorted(set(pool.map(tasks.get_pid, range(50), chunksize=1)))
        handler = next(thread for thread in threading.enumerate() if thread.name.endswith("-handler"))

        def switches():
            with open(f"/proc/self/task/{handler.native_id}/status") as stream:
                ours = sum(int(line.split()[1]) for line in stream if "ctxt_switches" in line)
            return ours, [cpu_ticks(pid) for pid in pids]

        previous = None

        def settled():
            nonlocal previous
            previous, last = switches(), previous
            return previous == last

        wait_until(settled, DEADLINE)
        before = switches()
        threading.Event().wait(1.0)  # the test is that nothing happens in this time
        assert switches() == before


def test_nothing_in_dev_shm(pool):
    before = set(os.listdir("/dev/shm"))
    pool.map(tasks.double, [torch.ones(100_000) for _ in range(20)])
    pids = {os.getpid(), *pool.map(tasks.get_pid, range(20), chunksize=1)}
    made = set(os.listdir("/dev/shm")) - before
    assert not [name for name in made if any(str(pid) in name for pid in pids)]  # others make entries, too


def test_many_threads_use_one_pool(pool):
    failures = []

    def use(number):
        try:
            for _ in range(10):
                tensors = [torch.full((100,), float(number)) for _ in range(20)]
                for result in pool.map(tasks.double, tensors):
                    assert bool((result == 2 * number).all())
                assert list(pool.imap(tasks.double, range(30))) == [2 * x for x in range(30)]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_leases_that_die_in_cycles_do_not_deadlock(pool):
    import gc

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for number in range(100):
            result = pool.apply(tasks.double, (torch.full((2000,), float(number)),))
            cycle = [result]
            cycle.append(cycle)
            assert bool((result == 2 * number).all())
    finally:
        gc.set_threshold(*threshold)


def test_a_large_map_is_not_in_the_way_of_a_small_call(pool):
    big = pool.map_async(tasks.sleep, [0.02] * 200, chunksize=1)
    start = time.monotonic()
    assert pool.apply(tasks.double, (1,)) == 2
    assert time.monotonic() - start < 1.0
    assert not big.ready()
    big.wait(DEADLINE)


@seldom_spawned
def test_pools_in_turn_all_end(method):
    """A worker's end is told by two messengers, in either order; the pool once waited for ever for the second."""
    for _ in range(20 if method != "spawn" else 2):
        with tpool.Pool(2, context=method) as pool:
            assert pool.map(tasks.double, range(4), chunksize=1) == [0, 2, 4, 6]
