"""State of a worker and what runs at its end; with real processes, through the public API."""

from __future__ import annotations

import logging

import pool_tasks as tasks
import pytest
from methods import METHODS

import tpool


@pytest.mark.parametrize("method", METHODS)
def test_state_and_exit(method, tmp_path):
    pool = tpool.Pool(2, tasks.open_log, (str(tmp_path),), context=method, worker_exit=tasks.close_log)
    pids = pool.map(tasks.note, range(20), chunksize=1)
    pool.close()
    pool.join()
    for pid in set(pids):
        text = (tmp_path / str(pid)).read_text().split()
        assert text == [str(number) for number in range(20) if pids[number] == pid] + ["closed"]


def test_exit_after_max_tasks(tmp_path):
    pool = tpool.Pool(1, tasks.open_log, (str(tmp_path),), maxtasksperchild=2, worker_exit=tasks.close_log)
    pids = pool.map(tasks.note, range(4), chunksize=1)
    pool.close()
    pool.join()
    assert len(set(pids)) == 2
    assert all((tmp_path / str(pid)).read_text().endswith("closed ") for pid in pids)


def test_an_exit_of_the_callers_own_and_no_initializer(tmp_path):
    def leave():
        (tmp_path / "left").touch()

    pool = tpool.Pool(1, worker_exit=leave)
    pool.apply(tasks.double, (1,))
    pool.close()
    pool.join()
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize("method", METHODS)
def test_an_exit_that_raises_is_reported(method, caplog):
    with caplog.at_level(logging.WARNING, "tpool"):
        pool = tpool.Pool(1, context=method, worker_exit=tasks.fail_to_close)
        assert pool.apply(tasks.double, (1,)) == 2
        pool.close()
        pool.join()
    assert "worker_exit of worker 0 (slot 0), pid" in caplog.text
    assert "RuntimeError: it would not close" in caplog.text


def test_nothing_runs_where_a_worker_is_killed(tmp_path):
    with tpool.Pool(1, tasks.open_log, (str(tmp_path),), worker_exit=tasks.close_log) as pool:
        pid = pool.apply(tasks.note, (1,))
    assert (tmp_path / str(pid)).read_text() == "1 "


def test_a_bad_exit():
    with pytest.raises(TypeError, match="worker_exit must be a callable"):
        tpool.Pool(1, worker_exit="close")
