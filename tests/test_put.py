"""Objects that workers keep, and tensors made in a pool's memory; with real processes, through the public API."""

from __future__ import annotations

import copy
import gc
import pickle

import pool_tasks as tasks
import pytest
import torch
from methods import METHODS
from support import wait_until

import tpool

DEADLINE = 30
LARGE = 1 << 20


@pytest.fixture
def pool():
    with tpool.Pool(2) as pool:
        yield pool


@pytest.mark.parametrize("method", METHODS)
def test_a_model_anywhere_in_the_arguments(method):
    model = torch.nn.Linear(4, 2).requires_grad_(False)
    with tpool.Pool(2, context=method) as pool:
        reference = pool.put(model)
        rows = torch.randn(6, 4)
        expected = [model(row) for row in rows]
        found = pool.starmap(tasks.run_model, [(reference, row) for row in rows])
        nested = pool.map(tasks.run_nested, [{"deep": [(reference, row)]} for row in rows])
        as_function = pool.map(reference, rows)
        by_keyword = pool.apply(tasks.run_model, kwds={"model": reference, "row": rows[0]})
    for values in (found, nested, as_function, [by_keyword, *expected[1:]]):
        assert all(torch.equal(value, other) for value, other in zip(values, expected))


def test_each_worker_is_sent_it_once_and_keeps_one_object(pool, tmp_path):
    reference = pool.put({"table": torch.ones(LARGE)})
    before = pool.stats().moved_nbytes
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        items = [(reference, str(tmp_path / str(number)), 2, DEADLINE, worker) for worker in range(2)]
        pids = pool.starmap(tasks.meet_with, items, chunksize=1)
        assert len(set(pids)) == 2
    sent = pool.stats().moved_nbytes - before
    assert 2 * 4 * LARGE <= sent < 3 * 4 * LARGE
    assert len(set(pool.map(tasks.identify, [reference] * 40))) <= 2


def test_writes_are_seen_by_all(pool):
    model = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    reference = pool.put(model)
    pool.starmap(tasks.add_to_weight, [(reference, 1.0)] * 10, chunksize=1)
    assert (model.weight > 0).all()  # unlocked additions of two workers may lose some
    with torch.no_grad():
        model.weight.fill_(5)
    assert pool.map(tasks.read_weight, [reference] * 4) == [5.0] * 4


def test_another_version_replaces_it(pool):
    reference = pool.put([1, torch.ones(3)])
    assert pool.apply(len, (reference,)) == 2
    reference.update("text")
    assert pool.map(len, [reference] * 8) == [4] * 8
    with pytest.raises(TypeError, match="pickle"):
        reference.update(x for x in ())
    assert pool.apply(len, (reference,)) == 4


def test_what_was_called_before_an_update_gets_the_earlier_version(tmp_path):
    with tpool.Pool(1) as pool:
        reference = pool.put("earlier")
        gate = tmp_path / "gate"
        blocked = pool.submit(tasks.wait_for_file, str(gate))
        waiting = pool.submit(tasks.identity, reference)
        reference.update("later")
        after = pool.submit(tasks.identity, reference)
        gate.touch()
        blocked.result(DEADLINE)
        assert (waiting.result(DEADLINE), after.result(DEADLINE)) == ("earlier", "later")


def test_a_dropped_reference_frees_the_memory():
    with tpool.Pool(1, memory=8 * LARGE) as pool:
        for number in range(6):  # each takes half of the pool's memory
            reference = pool.put(torch.full((LARGE,), float(number)))
            assert pool.apply(tasks.first, (reference,)) == number
            del reference
        reference = pool.put(tasks.Watched())
        assert pool.apply(tasks.count_watched, (reference,)) == 1
        del reference
        gc.collect()
        wait_until(lambda: pool.apply(tasks.count_watched) == 0, DEADLINE)


def test_a_replacement_worker_gets_it_too(pool):
    reference = pool.put(torch.full((3,), 2.0))
    assert pool.map(tasks.first, [reference] * 4) == [2.0] * 4
    for _ in range(2):
        with pytest.raises(tpool.WorkerLostError):
            pool.apply(tasks.kill_self)
    assert pool.map(tasks.first, [reference] * 8, chunksize=1) == [2.0] * 8
    with tpool.Pool(1, maxtasksperchild=1) as short:
        reference = short.put(torch.full((3,), 3.0))
        assert short.map(tasks.first, [reference] * 3, chunksize=1) == [3.0] * 3
    del reference  # the log has the errors of the lost workers, they have their tracebacks, and these have this frame


def test_references_within_objects_and_in_globals(pool):
    inner = pool.put(torch.arange(3))
    outer = pool.put({"inner": inner})
    assert pool.apply(tasks.sum_inner, (outer,)) == 3

    def closure(x):
        return x + int(inner.sum())

    assert pool.map(closure, [1, 2]) == [4, 5]


def test_in_streams_and_with_copies():
    tensor = torch.zeros(LARGE)
    with tpool.Pool(2, sharing="copy") as pool:
        reference = pool.put(tensor)
        list(pool.istarmap(tasks.fill, [(reference, 3.0)]))
        assert pool.apply(tasks.first, (reference,)) == 3.0
    assert tensor[0] == 0


def test_an_object_that_cannot_be_read_fails_the_calls_that_use_it(pool):
    reference = pool.put(tasks.Unreadable())
    for _ in range(2):
        with pytest.raises(tpool.DecodeError, match="it will not be read"):
            pool.apply(tasks.identity, (reference,))
    assert pool.apply(tasks.double, (1,)) == 2


def test_misuse_of_references(pool):
    reference = pool.put(1)
    assert repr(reference) == "<tpool.Reference to an object of type builtins.int>"
    for misuse in (pickle.dumps, copy.copy):
        with pytest.raises(tpool.TransportError, match="its own pool alone"):
            misuse(reference)
    with tpool.Pool(1) as other, pytest.raises(tpool.TransportError, match="its own pool alone"):
        other.apply(tasks.identity, (reference,))
    pool.terminate()
    with pytest.raises(tpool.PoolEndedError):
        pool.put(1)


# Factories --------------------------------------------------------------------------------------------------------


def test_factories_give_what_torchs_give(pool):
    pairs = [
        (pool.zeros(2, 3), torch.zeros(2, 3)),
        (pool.zeros((2, 0)), torch.zeros(2, 0)),
        (pool.zeros(()), torch.zeros(())),
        (pool.ones([4], dtype=torch.uint8), torch.ones(4, dtype=torch.uint8)),
        (pool.full((2,), True), torch.full((2,), True)),
        (pool.full((2,), 1.5, dtype=torch.float64), torch.full((2,), 1.5, dtype=torch.float64)),
        (pool.zeros_like(torch.ones(3, 2).t()), torch.zeros(2, 3)),
        (pool.ones_like(torch.ones(2), dtype=torch.int8), torch.ones(2, dtype=torch.int8)),
        (pool.full_like(torch.ones(2), 9), torch.full((2,), 9.0)),
        (pool.full((1,), 1j), torch.full((1,), 1j)),
    ]
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)
    assert pool.empty_like(torch.empty(5)).shape == (5,)


def test_the_first_send_copies_nothing(pool):
    tensor = pool.zeros(LARGE)
    address = tensor.data_ptr()
    assert torch.equal(pool.apply(tasks.fill, (tensor, 4.0)), tensor)
    assert tensor.data_ptr() == address
    assert tensor[-1] == 4


def test_a_tensor_outlives_its_pool():
    with tpool.Pool(1) as pool:
        tensor = pool.full((1000,), 3)
    gc.collect()
    assert tensor.sum() == 3000


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (TypeError, "whole numbers", lambda pool: pool.empty(2.5)),
        (TypeError, "whole numbers", lambda pool: pool.zeros((2, "3"))),
        (ValueError, "negative", lambda pool: pool.empty(2, -1)),
        (TypeError, "dtype of torch", lambda pool: pool.empty(2, dtype=float)),
        (TypeError, "must be a tensor", lambda pool: pool.zeros_like([1, 2])),
    ],
)
def test_bad_shapes(pool, error, match, make):
    with pytest.raises(error, match=match):
        make(pool)


def test_more_than_there_is():
    with tpool.Pool(1, memory="2MiB") as pool, pytest.raises(tpool.SharedMemoryExhausted):
        pool.empty(LARGE)
