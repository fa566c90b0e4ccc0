"""Batches of a big tensor; with real processes, through the public API."""

from __future__ import annotations

import copy

import pool_tasks as tasks
import pytest
import torch
from support import wait_until

import tpool

DEADLINE = 30


def start_all(pool):
    wait_until(lambda: len(set(pool.map(tasks.get_pid, range(20), chunksize=1))) == 2, DEADLINE)
    pool.apply_async(tasks.identity, (1,), callback=str).wait(DEADLINE)


@pytest.fixture(scope="module")
def pool():
    with tpool.Pool(2) as pool:
        start_all(pool)
        yield pool


@pytest.fixture(scope="module")
def copying():
    with tpool.Pool(2, sharing="copy") as pool:
        start_all(pool)
        yield pool


@pytest.fixture
def own_pool():
    with tpool.Pool(1) as pool:
        yield pool


@pytest.fixture(params=["share", "copy"])
def either(request, pool, copying):
    return pool if request.param == "share" else copying


@pytest.mark.parametrize("size", [1, 3, 10, 99])
def test_results_stand_in_order(either, size):
    data = torch.randn(10, 4)
    assert torch.equal(either.map_batches(torch.neg, data, batch_size=size), -data)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension(either, dim):
    data = torch.randn(4, 5, 6)
    assert torch.equal(either.map_batches(torch.exp, data, batch_size=2, dim=dim), data.exp())


def test_results_of_another_shape_and_dtype(either):
    data = torch.randn(7, 4)
    assert torch.equal(either.map_batches(tasks.best_of_rows, data, batch_size=3), data.argmax(1))


def test_dicts_in_and_out(either):
    data = {"x": torch.randn(5, 2), "y": torch.arange(5)}
    found = either.map_batches(tasks.sum_and_count, data, batch_size=2)
    assert torch.equal(found["sum"], data["x"].sum(1) + data["y"])
    assert torch.equal(found["count"], torch.ones(5, dtype=torch.int64))


def test_into_an_output_that_is_given(either):
    data, out = torch.randn(9, 3), torch.zeros(9, 3)
    assert either.map_batches(torch.neg, data, batch_size=2, out=out) is out
    assert torch.equal(out, -data)
    made = either.full((9, 3), 5.0)
    part = made[2:7]
    either.map_batches(torch.neg, data[:5], batch_size=2, out=part)
    assert torch.equal(made[2:7], -data[:5])
    assert (made[:2] == 5).all()
    assert (made[7:] == 5).all()


def test_batches_are_views_of_one_storage(pool):
    data = torch.zeros(10, 3)
    assert pool.map_batches(tasks.add_one_in_place, data, batch_size=4) is None
    assert (data == 1).all()


def test_the_callers_tensors_stay_apart_where_they_are_copied(copying):
    data = torch.zeros(10, 3)
    assert copying.map_batches(tasks.add_one_in_place, data, batch_size=4) is None
    assert (data == 0).all()


def test_no_data_travel_with_the_batches(pool):
    data = pool.zeros(1 << 18, 4)
    out = pool.empty_like(data)
    before = pool.stats()
    pool.map_batches(torch.neg, data, batch_size=1 << 12, out=out)
    after = pool.stats()
    assert after.piped_nbytes - before.piped_nbytes < 64 * 1024
    assert after.moved_nbytes - before.moved_nbytes <= 2 * 2 * data.nbytes  # a handle of each, to each worker


def test_functions_and_parameters_of_the_callers_own(pool):
    model = torch.nn.Linear(4, 2)
    data = torch.randn(6, 4)
    found = pool.map_batches(lambda batch: model(batch), data, batch_size=2)
    assert torch.allclose(found, model(data))
    assert not found.requires_grad


def test_no_items(pool):
    assert pool.map_batches(torch.neg, torch.zeros(0, 3), batch_size=2) is None
    out = torch.zeros(0, 3)
    assert pool.map_batches(torch.neg, torch.zeros(0, 3), batch_size=2, out=out) is out


def test_limits_and_progress(own_pool, pool):
    seen = []
    data = torch.arange(6.0)
    pool.map_batches(torch.neg, data, batch_size=2, out=torch.empty(6), timeout=DEADLINE, progress=seen.append)
    assert (seen[-1].done, seen[-1].total) == (3, 3)
    with pytest.raises(tpool.TaskTimeoutError, match="map_batches"):
        own_pool.map_batches(tasks.sleep_for_long, data, batch_size=2, timeout=0.2)
    del data  # the log has the error, which has its traceback, and that has this frame


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (TypeError, "data must be a dense tensor or a dict of such, not list", {"data": [1, 2]}),
        (TypeError, "not a dict with 'x': int", {"data": {"x": 1}}),
        (TypeError, "not a dict with nothing", {"data": {}}),
        (ValueError, "has no dimension 2", {"dim": 2}),
        (ValueError, r"different lengths along dimension 0: \[1, 2\]", {"data": {1: torch.ones(1), 2: torch.ones(2)}}),
        (ValueError, "batch_size must be 1 or more, not 0", {"batch_size": 0}),
        (TypeError, "batch_size must be a number of items, not 2.5", {"batch_size": 2.5}),
        (ValueError, "out is of length 3 along dimension 0, and data of 4", {"out": torch.ones(3)}),
        (ValueError, "out must be on the CPU", {"out": torch.ones(4, device="meta")}),
        (ValueError, r"shape \(2, 2\) for items \d to \d; its place in the output is of shape \(2, 1\)", {
            "out": torch.ones(4, 1)
        }),
        (TypeError, "returned a tensor; the output is a dict with 'x': a tensor", {"out": {"x": torch.ones(4)}}),
        (ValueError, "returned 1 items along dimension 0 for 2", {"func": tasks.sum_of_columns}),
        (TypeError, "what the function returns must be a dense tensor", {"func": tasks.get_pid}),
        (TypeError, "the function returned NoneType; the output is a tensor", {"func": tasks.nothing_after_the_first}),
    ],
)  # fmt: skip
def test_bad_arguments(pool, error, match, arguments):
    given = {"func": torch.neg, "data": torch.arange(8.0).reshape(4, 2), "batch_size": 2, **copy.deepcopy(arguments)}
    with pytest.raises(error, match=match):
        pool.map_batches(given.pop("func"), given.pop("data"), **given)
