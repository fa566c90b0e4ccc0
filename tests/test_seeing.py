"""What a pool tells of itself; with real processes, through the public API."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import time

import pool_tasks as tasks
import pytest
import torch
from methods import METHODS
from support import wait_until

import tpool
from tpool import report
from tpool.local import stacks
from tpool.roster import Worker, WorkerState
from tpool.task import Slot, WorkerId

DEADLINE = 30


@pytest.fixture
def pool():
    with tpool.Pool(2) as pool:
        yield pool


def hung_pid(path):
    wait_until(lambda: path.exists() and path.read_text(), DEADLINE)
    return int(path.read_text())


# The report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_hung_worker_tells_where(method, tmp_path):
    with tpool.Pool(2, context=method) as pool:
        pool.submit(tasks.tell_pid_and_hang, str(tmp_path / "pid"))
        pid = hung_pid(tmp_path / "pid")
        page = wait_until(lambda: "in tell_pid_and_hang" in (page := pool.report()) and page, DEADLINE)
        assert re.search(rf"pid {pid}: runs task 0 of apply\(tell_pid_and_hang\), for \d+\.\d s", page)
        page = wait_until(lambda: ": idle" in (page := pool.report()) and page, DEADLINE)
        assert "in tell_pid_and_hang" in page
        assert "local/worker.py" not in page
        assert pool.apply(tasks.double, (2,)) == 4


def test_a_worker_that_holds_the_interpreter_lock_in_c(pool, tmp_path):
    result = pool.submit(tasks.tell_pid_and_spin_in_c, str(tmp_path / "pid"))
    hung_pid(tmp_path / "pid")
    wait_until(lambda: "in tell_pid_and_spin_in_c" in pool.report(), DEADLINE)
    result.cancel(kill=True)


@pytest.mark.parametrize("busy", [tasks.call_functions, tasks.call_functions_in_threads, tasks.work_in_c_and_python])
def test_asking_kills_nobody(busy, tmp_path):
    """faulthandler alone killed one in 150 to 250 that it asked, and one in 60 where threads came and went."""
    with tpool.Pool(1) as pool:
        gate = tmp_path / "gate"
        result = pool.submit(busy, str(gate))
        wait_until(lambda: f"in {busy.__name__}" in pool.report(), DEADLINE)
        end = time.monotonic() + 3
        told = 0
        while time.monotonic() < end:
            told += f"in {busy.__name__}" in pool.report()
        gate.touch()
        result.result(DEADLINE)
        assert told > 10
        assert pool.stats().restarts == 0


def test_a_thread_beside_the_main_one_is_told(pool, tmp_path):
    result = pool.submit(tasks.wait_beside_a_thread, str(tmp_path / "gate"))
    page = wait_until(lambda: "in wait_for_file" in (page := pool.report()) and page, DEADLINE)
    assert "in wait_beside_a_thread" in page
    (tmp_path / "gate").touch()
    result.result(DEADLINE)


def test_a_worker_in_c_that_no_signal_brings_back(pool, tmp_path):
    result = pool.submit(tasks.lock_twice_in_c, str(tmp_path / "pid"))
    hung_pid(tmp_path / "pid")
    in_c = "Main thread, in C code (most recent call first):"  # it tells its pid shortly before it is there
    page = wait_until(lambda: in_c in (page := pool.report()) and page, DEADLINE)
    assert "in lock_twice_in_c" in page
    result.cancel(kill=True)


def test_asking_disturbs_nothing(tmp_path):
    with tpool.Pool(1) as pool:
        gate = tmp_path / "gate"
        result = pool.submit(tasks.wait_for_file, str(gate))
        for _ in range(5):
            wait_until(lambda: "in wait_for_file" in pool.report(), DEADLINE)
        gate.touch()
        result.result(DEADLINE)
        assert pool.stats().restarts == 0


def test_a_direct_call_is_seen(tmp_path):
    with tpool.Pool(1) as pool:
        wait_until(lambda: pool.apply(tasks.double, (1,)) and pool._engine._lending._lent, DEADLINE)
        pages = []

        def look():
            hung_pid(tmp_path / "pid")
            pages.append(wait_until(lambda: "in tell_pid_and_wait" in (page := pool.report()) and page, DEADLINE))
            (tmp_path / "gate").touch()

        thread = tasks.start_thread(look)
        pool.apply(tasks.tell_pid_and_wait, (str(tmp_path / "pid"), str(tmp_path / "gate")))
        thread.join()
        assert "runs apply(tell_pid_and_wait), for" in pages[0] or "of apply(tell_pid_and_wait), for" in pages[0]


def test_a_stopped_worker(pool, tmp_path):
    result = pool.submit(tasks.tell_pid_and_hang, str(tmp_path / "pid"))
    pid = hung_pid(tmp_path / "pid")
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: "its process is stopped (SIGSTOP)" in pool.report(), DEADLINE)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: "in tell_pid_and_hang" in pool.report(), DEADLINE)
    result.cancel(kill=True)


def test_an_initializer_that_hangs(tmp_path):
    with tpool.Pool(1, tasks.tell_pid_and_hang, (str(tmp_path / "pid"),)) as pool:
        hung_pid(tmp_path / "pid")
        page = wait_until(lambda: "in tell_pid_and_hang" in (page := pool.report()) and page, DEADLINE)
        assert ": starting" in page


def test_a_report_without_stacks_and_after_the_end(pool, tmp_path):
    pool.submit(tasks.tell_pid_and_hang, str(tmp_path / "pid"))
    hung_pid(tmp_path / "pid")
    page = pool.report(stacks=False)
    assert "runs task 0" in page
    assert "File" not in page
    pool.terminate()
    assert pool.report().count("there is no worker") == 2


def test_in_a_line_and_as_a_table(pool, tmp_path):
    assert repr(pool) == "<tpool.Pool state=RUN pool_size=2 busy=0 done=0>"
    pool.submit(tasks.tell_pid_and_hang, str(tmp_path / "pid"))
    hung_pid(tmp_path / "pid")
    assert repr(pool) == "<tpool.Pool state=RUN pool_size=2 busy=1 done=0>"
    table = pool._repr_html_()
    assert table.count("<tr>") == 3
    assert "<caption>&lt;tpool.Pool state=RUN" in table
    assert "runs task 0 of apply(tell_pid_and_hang)" in table


def test_a_worker_whose_state_changes_under_the_look(pool):
    pool.apply(tasks.double, (1,))

    class Changing(Worker):
        """Is in another state at each look."""

        states = itertools.cycle([WorkerState.STARTING, WorkerState.READY])
        state = property(lambda self: next(self.states), lambda self, state: None)

    worker = Changing(WorkerId(99), Slot(0))
    seen = [report._doing(0, worker, pool._handler, pool._engine.look()).what for _ in range(3)]
    assert set(seen) == {"starting", "idle"}


def test_a_table_of_a_pool_that_grows(pool):
    before = pool.stats()
    pool.resize(3)
    wait_until(lambda: len(pool.stats().workers) == 3, DEADLINE)
    handler, look = pool._handler, pool._engine.look()
    assert report.html_table("", handler, look, before).count("<tr>") == 3
    assert report.html_table("", handler, look, pool.stats()).count("<tr>") == 4


# The numbers ------------------------------------------------------------------------------------------------------


def test_numbers_by_worker(pool):
    pool.map(tasks.sleep, [0.01] * 20, chunksize=1)
    pool.map(tasks.double, range(1000), chunksize=1)
    now = pool.stats()
    assert [worker.id for worker in now.workers] == [0, 1]
    assert now.tasks_done == sum(worker.tasks_done for worker in now.workers) == 1020
    assert 0.2 <= now.busy_seconds == sum(worker.busy_seconds for worker in now.workers)
    assert all(worker.idle_seconds > 0 for worker in now.workers)
    assert now.piped_nbytes == sum(worker.piped_nbytes for worker in now.workers) > 0
    assert {worker.pid for worker in now.workers} == set(pool.map(tasks.get_pid, range(40), chunksize=1))


def test_numbers_of_memory(pool):
    tensor = torch.zeros(1 << 20)
    results = pool.map(tasks.double, [tensor] * 2, chunksize=1)
    now = pool.stats()
    assert now.memory_nbytes >= tensor.nbytes
    assert sum(worker.memory_nbytes for worker in now.workers) >= 2 * tensor.nbytes
    assert now.moved_nbytes >= 4 * tensor.nbytes
    assert now.memory_peak_nbytes >= now.memory_nbytes
    assert all(worker.memory_peak_nbytes >= worker.memory_nbytes for worker in now.workers)
    assert results[0].sum() == 0


def test_restarts_and_why(tmp_path):
    with tpool.Pool(1, maxtasksperchild=1) as pool:
        pool.map(tasks.double, range(3), chunksize=1)
        with pytest.raises(tpool.WorkerLostError):
            pool.submit(tasks.kill_self).result(DEADLINE)
        wait_until(lambda: pool.stats().restarts == 4, DEADLINE)
        (worker,) = pool.stats().workers
        assert [loss.partition("pid ")[2].partition(", ")[2] for loss in worker.losses] == [
            "exited with code 0", "exited with code 0", "exited with code 0", "was killed by SIGKILL"
        ]  # fmt: skip
        assert "before it: worker 3 (slot 0)" in pool.report(stacks=False)


def test_time_of_transfers():
    with tpool.Pool(1) as pool:
        pool.apply(tasks.sleep, (0,))
        before = pool.stats()
        pool.map(tasks.sleep, [0.05] * 4, chunksize=1)
        now = pool.stats()
        busy, transfer = now.busy_seconds - before.busy_seconds, now.transfer_seconds - before.transfer_seconds
        assert 0 < transfer < 0.1 < 0.2 <= busy


def test_time_of_transfers_of_all_workers_of_a_place():
    with tpool.Pool(1, maxtasksperchild=2) as pool:
        pool.map(tasks.sleep, [0.02] * 3, chunksize=1)
        # Received for 0.05 s, sent for as long; the first of two such tasks is the earlier worker's last.
        for _ in range(2):
            pool.map(tasks.identity, [tasks.SlowToTravel(0.05)], chunksize=1)
        with pytest.raises(TypeError, match="exceptions must derive"):
            pool.apply_async(tasks.raise_exception, (tasks.SlowToTravel(0.05),)).get(DEADLINE)
        now = pool.stats()
        (worker,) = now.workers
        assert 0.25 <= worker.transfer_seconds == now.transfer_seconds
        assert worker.busy_seconds - worker.transfer_seconds >= 0.06
        assert worker.restarts >= 2
        assert now.idle_seconds == sum(worker.idle_seconds for worker in now.workers) > 0


def answer_haltingly(fd, name, pause, ready):
    """In a forked process: as one in C, in a function of this name, but with a pause in the middle of its answer.

    When it has told where it is, it comes to the handler of Python, too late.
    """

    def answer(number, _):
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])  # as it is while faulthandler's handler runs
        os.write(fd, b"Stack (most recent call first):\n")
        time.sleep(pause)
        os.write(fd, f'  File "{name}.py", line 1 in {name}\n'.encode())
        time.sleep(pause)
        os.write(fd, f'  File "{name}.py", line 2 in outer_{name}\n'.encode())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        time.sleep(pause)
        late = f'process {os.getpid()}\nMain thread (most recent call first):\n  File "{name}.py" in outer_{name}'
        os.write(fd, f"{late}\nend of process {os.getpid()}\n".encode())

    signal.signal(stacks.IN_PYTHON, lambda *_: None)
    signal.signal(stacks.IN_C, answer)
    os.write(ready, b"r")
    while True:
        signal.pause()


def test_no_workers_stack_is_told_as_anothers():
    asked, fork = stacks.Stacks(), multiprocessing.get_context("fork")
    reader, ready = os.pipe()
    arguments = [(asked.fd, "one", 0.0, ready), (asked.fd, "other", 0.04, ready)]
    workers = [fork.Process(target=answer_haltingly, args=each) for each in arguments]
    for worker in workers:
        worker.start()
        assert os.read(reader, 1) == b"r"
    try:
        for _ in range(3):
            answers = [asked.ask(worker.pid) for worker in workers]
            assert ["in outer_one" in answers[0], "other.py" in answers[0]] == [True, False]
            assert ["one.py" in answers[1], "in outer_other" in answers[1]] == [False, True]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
            worker.close()
        asked.close()
        os.close(reader)
        os.close(ready)
