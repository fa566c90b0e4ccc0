"""Time limits, retries and killing what is cancelled; with real processes, through the public API."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import signal
import threading

import pool_tasks as tasks
import pytest
from support import wait_until

import tpool

DEADLINE = 30
LIMIT = 0.2


@pytest.fixture
def pool():
    """A pool for each test: the workers that replace the killed ones would look like something left behind."""
    with tpool.Pool(2) as pool:
        yield pool


# Time limits ------------------------------------------------------------------------------------------------------


def test_a_task_that_runs_for_too_long_is_killed(pool, tmp_path):
    before = pool.stats().tasks_timed_out
    result = pool.apply_async(tasks.wait_for_file, (str(tmp_path / "never"),), timeout=LIMIT)
    with pytest.raises(
        tpool.TaskTimeoutError, match=r"task 0 of apply\(wait_for_file\) ran for longer than its timeout of 0\.2 s"
    ):
        result.get(DEADLINE)
    assert isinstance(result.exception(), TimeoutError)
    assert isinstance(result.exception(), tpool.TpoolError)
    assert pool.apply(tasks.double, (1,), timeout=LIMIT * 100) == 2
    assert pool.stats().tasks_timed_out == before + 1


def test_the_worker_is_gone(pool, tmp_path):
    seen = tmp_path / "pid"
    with pytest.raises(tpool.TaskTimeoutError):
        pool.apply(tasks.tell_pid_and_hang, (str(seen),), timeout=10 * LIMIT)
    pid = int(seen.read_text())
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), DEADLINE)


def test_others_are_untouched(pool):
    items = [(i, i in (3, 40)) for i in range(80)]
    outcomes = []
    iterator = pool.imap(tasks.hang_if, items, timeout=10 * LIMIT)  # the others have time on a busy machine, too
    for _ in items:
        try:
            outcomes.append(next(iterator))
        except tpool.TaskTimeoutError:
            outcomes.append("late")
    assert outcomes == ["late" if late else i for i, late in items]


def test_the_time_of_a_task_does_not_count_its_wait(pool, tmp_path):
    gate = tmp_path / "gate"
    busy = [pool.submit(tasks.wait_for_file, str(gate)) for _ in range(2)]
    queued = pool.apply_async(tasks.double, (1,), timeout=LIMIT)
    assert concurrent.futures.wait([queued], timeout=2 * LIMIT).not_done == {queued}
    gate.touch()
    assert queued.get(DEADLINE) == 2
    concurrent.futures.wait(busy, DEADLINE)


def test_a_map_with_a_time_limit(pool):
    assert pool.map(tasks.double, range(50), timeout=DEADLINE) == [2 * x for x in range(50)]
    with pytest.raises(tpool.TaskTimeoutError):
        pool.map(tasks.hang_if, [(1, False), (2, True)], timeout=LIMIT)
    with pytest.raises(tpool.TaskTimeoutError):
        pool.starmap(tasks.identity_slowly, [(1, 60)], timeout=LIMIT)
    assert sorted(pool.imap_unordered(tasks.double, range(5), timeout=DEADLINE)) == [0, 2, 4, 6, 8]


def test_the_pools_limit_and_a_calls_own():
    with tpool.Pool(1, timeout=LIMIT) as pool:
        with pytest.raises(tpool.TaskTimeoutError):
            pool.submit(tasks.sleep, 60).get(DEADLINE)
        assert pool.apply(tasks.sleep, (3 * LIMIT,), timeout=None) == 3 * LIMIT
        with pytest.raises(tpool.TaskTimeoutError):
            pool.executor().submit(tasks.sleep, 60).result(DEADLINE)
        assert pool.executor(timeout=DEADLINE).submit(tasks.sleep, 3 * LIMIT).result(DEADLINE) == 3 * LIMIT


def test_a_limit_and_maxtasksperchild():
    with tpool.Pool(1, maxtasksperchild=2, timeout=DEADLINE) as pool:
        pids = pool.map(tasks.get_pid, range(6))
        assert max(pids.count(pid) for pid in pids) <= 2


# Retries ----------------------------------------------------------------------------------------------------------


def test_a_task_whose_worker_is_lost_is_tried_again(pool, tmp_path):
    before = pool.stats().tasks_retried
    assert pool.apply(tasks.die_until, (str(tmp_path / "log"), 3), retries=2) == 3
    assert pool.stats().tasks_retried == before + 2


def test_a_task_that_kills_worker_after_worker_is_given_up_with_its_story(pool):
    with pytest.raises(tpool.WorkerLostError) as caught:
        pool.apply(tasks.kill_self, retries=2)
    story = str(caught.value)
    assert story.count("was killed by SIGKILL") == 3
    assert "in attempt 3, the last (before that: worker " in story
    assert caught.value.exitcode == -signal.SIGKILL
    assert pool.apply(tasks.double, (1,)) == 2


def test_exceptions_of_given_types_are_tried_again(pool, tmp_path):
    arguments = (str(tmp_path / "log"), 3, ConnectionError("try later"))
    assert pool.apply(tasks.fail_until, arguments, retries=2, retry_on=OSError) == 3
    arguments = (str(tmp_path / "again"), 3, ConnectionError("try later"))
    with pytest.raises(ConnectionError, match="try later") as caught:
        pool.apply(tasks.fail_until, arguments, retries=1, retry_on=(ValueError, ConnectionError))
    assert "fail_until" in str(caught.value.__cause__)
    assert "faltering.py" not in str(caught.value.__cause__)
    assert (tmp_path / "again").read_text() == "xx"


def test_other_exceptions_are_not(pool, tmp_path):
    for number, kinds in enumerate([{}, {"retry_on": KeyError}]):
        log = tmp_path / str(number)
        with pytest.raises(ValueError, match="no use"):
            pool.apply(tasks.fail_until, (str(log), 9, ValueError("no use")), retries=5, **kinds)
        assert log.read_text() == "x"


def test_exceptions_of_the_callers_own_classes(pool, tmp_path):
    class Flaky(Exception):
        pass

    def flaky(path):
        if tasks.count_attempt(path) < 2:
            raise Flaky("once")
        return "done"

    assert pool.apply(flaky, (str(tmp_path / "log"),), retries=1, retry_on=Flaky) == "done"


def test_a_task_that_ran_for_too_long_is_tried_again_if_asked(pool, tmp_path):
    log = str(tmp_path / "log")
    kinds = (tpool.WorkerLostError, tpool.TaskTimeoutError)
    assert pool.apply(tasks.hang_until, (log, 2), timeout=2 * LIMIT, retries=1, retry_on=kinds) == 2
    with pytest.raises(tpool.TaskTimeoutError, match=r"in attempt 2, the last \(before that: worker \d+ was killed"):
        pool.apply(tasks.sleep, (60,), timeout=LIMIT, retries=1, retry_on=TimeoutError)
    with pytest.raises(tpool.TaskTimeoutError) as caught:
        pool.apply(tasks.sleep, (60,), timeout=LIMIT, retries=1)
    assert "attempt" not in str(caught.value)


def test_retries_in_maps_and_streams(pool, tmp_path):
    def unsteady(number):
        if number % 5 == 0:
            return number, tasks.die_until(str(tmp_path / f"{name}-{number}"), 2)
        return number, 1

    expected = [(number, 2 if number % 5 == 0 else 1) for number in range(12)]
    name = "map"
    assert pool.map(unsteady, range(12), retries=1) == expected
    name = "imap"
    assert list(pool.imap(unsteady, range(12), retries=1)) == expected


def test_a_chunk_is_tried_again_as_a_whole(pool, tmp_path):
    def flaky(number):
        count = tasks.count_attempt(str(tmp_path / str(number)))
        if number == 2 and count < 2:
            raise OSError("try later")
        return count

    assert pool.map(flaky, range(4), 2, retries=1, retry_on=OSError) == [1, 1, 2, 2]


def test_the_pools_retries_and_a_calls_own(tmp_path):
    with tpool.Pool(1, retries=1) as pool:
        assert pool.apply(tasks.die_until, (str(tmp_path / "log"), 2)) == 2
        with pytest.raises(tpool.WorkerLostError):
            pool.apply(tasks.kill_self, retries=0)
        assert pool.executor().submit(tasks.die_until, str(tmp_path / "other"), 2).result(DEADLINE) == 2


# Cancelling what runs -----------------------------------------------------------------------------------------------


def test_cancel_and_kill(pool, tmp_path):
    gate = str(tmp_path / "never")
    lost = pool.stats().workers_lost
    result = pool.submit(tasks.wait_for_file, gate)
    wait_until(result.running, DEADLINE)
    assert not result.cancel()
    assert result.cancel(kill=True)
    with pytest.raises(tpool.TaskCancelledError):
        result.get()
    assert pool.map(tasks.double, range(10)) == [2 * x for x in range(10)]
    assert pool.stats().workers_lost == lost


def test_cancel_and_kill_a_map(pool, tmp_path):
    result = pool.map_async(tasks.wait_for_file, [str(tmp_path / "never")] * 10, chunksize=1)
    wait_until(result.running, DEADLINE)
    assert result.cancel(kill=True)
    assert result.cancelled()
    assert pool.apply(tasks.double, (4,)) == 8


def test_killing_harms_no_other_job(pool, tmp_path):
    """Short tasks of a stream stand behind each other in the workers while others are killed."""
    stream = pool.imap_unordered(tasks.double, itertools.count())
    for _ in range(200):
        next(stream)
    for _ in range(5):
        victim = pool.submit(tasks.wait_for_file, str(tmp_path / "never"))
        wait_until(victim.running, DEADLINE)
        assert victim.cancel(kill=True)
        for _ in range(200):
            next(stream)  # raises if one of them was lost
    del stream


def test_many_threads_cancel(pool, tmp_path):
    results = [pool.submit(tasks.wait_for_file, str(tmp_path / "never")) for _ in range(12)]
    threads = [threading.Thread(target=result.cancel, kwargs={"kill": True}) for result in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert all(result.cancelled() for result in results)


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"timeout": 0}, ValueError, "more than 0 seconds"),
        ({"timeout": -1}, ValueError, "more than 0 seconds"),
        ({"timeout": float("nan")}, ValueError, "more than 0 seconds"),
        ({"timeout": "1s"}, TypeError, "a number of seconds or None, not '1s'"),
        ({"timeout": True}, TypeError, "a number of seconds"),
        ({"retries": -1}, ValueError, "0 or more"),
        ({"retries": 1.5}, TypeError, "a count, such as 3"),
        ({"retries": OSError}, TypeError, "which exceptions: retry_on="),
        ({"retry_on": "OSError"}, TypeError, "a class of exceptions or several"),
        ({"retry_on": OSError("no class")}, TypeError, "a class of exceptions or several"),
        ({"retry_on": int}, TypeError, "a class of exceptions or several"),
    ],
)
def test_bad_values(pool, bad, kind, message):
    with pytest.raises(kind, match=message):
        tpool.Pool(1, **bad)
    with pytest.raises(kind, match=message):
        pool.executor(**bad)
    for call in (pool.map, pool.map_async, pool.starmap, pool.starmap_async, pool.imap, pool.imap_unordered):
        with pytest.raises(kind, match=message):
            call(tasks.double, [1], **bad)
    for call in (pool.apply, pool.apply_async):
        with pytest.raises(kind, match=message):
            call(tasks.double, (1,), **bad)
