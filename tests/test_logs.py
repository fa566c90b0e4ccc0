"""Workers' log records in the caller's process; with real processes, through the public API."""

from __future__ import annotations

import logging
import threading

import pool_tasks as tasks
import pytest
from methods import METHODS

import tpool

DEADLINE = 30


class Collector(logging.Handler):
    def __init__(self):
        super().__init__()
        self.records = []
        self.arrived = threading.Event()

    def emit(self, record):
        self.records.append(record)
        self.arrived.set()


@pytest.fixture
def collector():
    logger = logging.getLogger("experiment")
    handler = Collector()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("method", METHODS)
def test_records_come_with_the_workers_name(method, collector):
    with tpool.Pool(2, context=method, forward_logs="INFO") as pool:
        pids = pool.map(tasks.log, range(10), chunksize=1)
    records = sorted(collector.records, key=lambda record: record.args or record.getMessage())
    assert [record.getMessage() for record in records] == [f"item {i} of 10" for i in range(10)]
    assert {record.process for record in records} == set(pids)
    assert all("PoolWorker-" in record.processName for record in records)
    assert {record.worker for record in records} <= {0, 1}
    assert all(record.funcName == "log" and record.levelno == logging.INFO for record in records)


def test_a_record_comes_while_its_task_runs(collector, tmp_path):
    with tpool.Pool(1, forward_logs=logging.DEBUG) as pool:
        result = pool.submit(tasks.log_and_wait, str(tmp_path / "gate"))
        assert collector.arrived.wait(DEADLINE)
        (tmp_path / "gate").touch()
        result.result(DEADLINE)


def test_tracebacks_and_long_texts(collector):
    with tpool.Pool(1, forward_logs=True) as pool:
        pool.apply(tasks.log_exception, ("x" * 10**6,))
    (record,) = collector.records
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("xxx")
    assert "ZeroDivisionError" in logging.Formatter().format(record)


def test_levels_and_none(collector):
    with tpool.Pool(1, forward_logs="ERROR") as pool:
        pool.map(tasks.log, range(3))
    with tpool.Pool(1) as pool:
        pool.map(tasks.log, range(3))
    assert not collector.records


def test_a_handler_that_fails_stops_nothing(collector, monkeypatch, capsys):
    monkeypatch.setattr(collector, "filter", lambda record: 1 / 0)
    with tpool.Pool(1, forward_logs="INFO") as pool:
        pool.map(tasks.log, range(3), chunksize=1)
        assert pool.apply(tasks.double, (1,)) == 2
    assert capsys.readouterr().err.count("ZeroDivisionError") == 3


@pytest.mark.parametrize("value", ["LOUD", None, 1.5])
def test_a_bad_level(value):
    with pytest.raises(ValueError, match="forward_logs must be True, or a level"):
        tpool.Pool(1, forward_logs=value)
