"""Streams of microsecond tasks travel many to a span: each item has its own outcome, and none waits for others."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import threading

import pool_tasks as tasks
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from methods import METHODS
from support import wait_until

import tpool
from tpool.basket import FULL, SPAN_ITEMS, Basket
from tpool.local import forkmark
from tpool.roster import Worker
from tpool.task import JobId, Slot, Task, WorkerId

DEADLINE = 30
MANY = 3_000


@pytest.fixture
def pool():
    with tpool.Pool(2) as pool:
        yield pool


@pytest.fixture
def spans(monkeypatch):
    """How many items each span had, of all that are made while a test runs."""
    counts: list[int] = []
    take = Basket.take

    def note(basket, encode):
        taken = take(basket, encode)
        counts.extend(task.count for task in taken)
        return taken

    monkeypatch.setattr(Basket, "take", note)
    return counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_light_items_of_short_tasks_travel_in_spans(method, name, spans):
    with tpool.Pool(2, context=method) as pool:
        values = list(getattr(pool, name)(tasks.double, range(MANY)))
        assert (values if name == "imap" else sorted(values)) == [2 * number for number in range(MANY)]
        assert pool.stats().tasks_done == MANY
    assert sum(spans) > MANY / 2
    assert max(spans) == SPAN_ITEMS


def test_whatever_they_return_arrives_as_it_is(pool):
    values = [1, -1, 0, True, False, None, 1.5, -0.0, math.inf, 1 << 63, -(1 << 63), (1 << 63) - 1, -(1 << 63) - 1]
    values += ["", "text", b"bytes", 1j, (1, (2, None)), [1], {}, {"a": 1}, frozenset([1]), 2**1000, "x" * 5_000]
    items = [*range(MANY), *[None] * MANY]
    with tpool.Pool(2, tasks.keep_values, (values,)) as pool:
        for number, value in enumerate(pool.imap(tasks.kept_value, items)):
            expected = values[number % len(values)] if number < MANY else None
            assert (type(value), value, math.copysign(1, value) if type(value) is float else 0) == (
                type(expected),
                expected,
                math.copysign(1, expected) if type(expected) is float else 0,
            )


def test_not_a_number_arrives():
    with tpool.Pool(1) as pool:
        assert all(map(math.isnan, pool.imap(tasks.nan_of, range(MANY))))


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_items_of_all_kinds_between_light_ones(pool, name, spans):
    kinds = [
        0,
        1.5,
        None,
        "t",
        b"b",
        (1, "a"),
        [1],
        {},
        {"a": [1]},
        "x" * 100_000,
        2**200,
        torch.ones(3),
        tasks.double,
    ]
    items = [kinds[number % len(kinds)] if number % 50 < 13 else number for number in range(MANY)]
    got = [value for value in getattr(pool, name)(tasks.identity, iter(items)) if not isinstance(value, torch.Tensor)]
    expected = [item for item in items if not isinstance(item, torch.Tensor)]
    if name == "imap":
        assert got == expected
    else:
        assert sorted(map(repr, got)) == sorted(map(repr, expected))
    assert spans


def test_each_error_is_its_items(pool, spans):
    results = pool.imap(tasks.raise_if_odd, range(MANY))
    for number in range(MANY):
        if number % 2:
            with pytest.raises(ValueError, match=f"^odd: {number}$") as caught:
                next(results)
            assert str(caught.value.__cause__).count("  File ") == 1, "our own frames say nothing to the user"
        else:
            assert next(results) == number
    assert spans


def test_the_time_of_what_raises_is_not_told_as_transfer():
    with tpool.Pool(1) as pool:
        results = pool.imap(tasks.raise_soon, range(MANY))
        for _ in range(MANY):
            with pytest.raises(ValueError, match="soon"):
                next(results)
        (worker,) = pool.stats().workers
    assert worker.busy_seconds >= MANY * tasks.SOON_SECONDS
    assert worker.transfer_seconds <= worker.busy_seconds - MANY * tasks.SOON_SECONDS


def test_a_tuple_too_deep_to_send_fails_alone(pool, spans):
    deep = ()
    for _ in range(100_000):
        deep = (deep,)
    items = [*range(2_000), deep, *range(100)]
    results = pool.imap(tasks.identity, items)
    assert [next(results) for _ in range(2_000)] == items[:2_000]
    with pytest.raises(RecursionError):
        next(results)
    assert list(results) == items[-100:]
    assert spans
    while deep:  # in pieces, or its destructor would recurse
        (deep,) = deep


def test_a_function_that_cannot_be_unpickled_fails_each(pool):
    results = pool.imap(tasks.UnpicklesBadly(), range(200))
    for _ in range(200):
        with pytest.raises(tpool.DecodeError):
            next(results)


@pytest.mark.parametrize("method", METHODS)
def test_workers_that_die_lose_one_item_each(method, spans):
    fatal = {1_000, 1_001, 1_063, 2_222}
    with tpool.Pool(2, context=method) as pool:
        results = pool.imap(tasks.die_if_in, ((number, number in fatal) for number in range(MANY)))
        for number in range(MANY):
            if number in fatal:
                with pytest.raises(tpool.WorkerLostError, match=rf"task {number} of imap\(die_if_in\)"):
                    next(results)
            else:
                assert next(results) == number
        assert pool.stats().workers_lost == len(fatal)
    assert spans


def test_idle_workers_are_killed_between_spans(pool):
    results = pool.imap_unordered(tasks.double, range(20_000))
    got = [next(results) for _ in range(5_000)]
    for worker in pool.stats().workers:
        os.kill(worker.pid, signal.SIGKILL)
    lost = 0
    while True:
        try:
            got.append(next(results))
        except StopIteration:
            break
        except tpool.WorkerLostError:
            lost += 1
    assert lost <= 2
    assert len(set(got)) == len(got) == 20_000 - lost


def test_items_that_wait_for_each_other_do_so_in_two_workers(pool, tmp_path):
    """They stand in one span, behind many that took microseconds: what waits behind the first one is taken back."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    pairs = [(first, second), (second, first)]
    results = pool.imap(tasks.meet_if_told, [*[None] * 2_000, *pairs, *[None] * 100])
    got = [results.next(DEADLINE) for _ in range(2_102)]
    assert got == [None] * 2_000 + pairs + [None] * 100


def test_what_was_drawn_does_not_wait_for_a_slow_input(pool):
    gate = threading.Event()

    def items():
        yield from range(2_000)
        for number in range(2_000, 2_010):
            assert gate.wait(DEADLINE)
            gate.clear()
            yield number

    results = pool.imap(tasks.identity, items())
    for number in range(2_010):
        if number >= 2_000:
            gate.set()
        assert results.next(DEADLINE) == number


def test_no_more_is_drawn_than_buffersize_says(pool, spans):
    drawn = 0

    def items():
        nonlocal drawn
        while drawn < 20_000:
            drawn += 1
            yield drawn

    results = pool.imap(tasks.identity, items(), buffersize=300)
    for number in range(1, 20_001):
        assert drawn < number + 300
        assert next(results) == number
    assert spans


def test_an_input_that_raises_between_light_items(pool, spans):
    def items():
        yield from range(2_500)
        raise KeyError("the input")

    results = pool.imap(tasks.identity, items())
    assert [next(results) for _ in range(2_500)] == list(range(2_500))
    with pytest.raises(KeyError, match="the input"):
        next(results)
    assert list(results) == []
    assert spans


def test_dropped_streams_leave_a_pool_that_works(pool, spans):
    for _ in range(20):
        results = pool.imap_unordered(tasks.identity, itertools.count())
        for _ in range(1_500):
            next(results)
        del results
    assert spans
    wait_until(lambda: pool.report(stacks=False).count(": idle") == 2, DEADLINE)
    assert pool.map(tasks.double, [1, 2]) == [2, 4]


def test_terminate_in_the_middle(spans):
    pool = tpool.Pool(2)
    results = pool.imap_unordered(tasks.identity, itertools.count())
    for _ in range(1_500):
        next(results)
    pool.terminate()
    with pytest.raises(tpool.PoolEndedError):
        for _ in range(10_000):
            next(results)
    pool.join()
    assert spans


@pytest.mark.parametrize("fork", [tasks.fork_if_told, tasks.fork_in_c_if_told])
def test_a_child_that_returns_from_a_task_answers_nothing(pool, spans, fork):
    got = sorted(pool.imap_unordered(fork, ((number, number == 1_500) for number in range(MANY))))
    assert got == list(range(MANY))
    assert pool.stats().restarts == 0
    assert spans


def test_a_memory_limit_is_looked_at_after_each_item(spans):
    with tpool.Pool(2, max_memory="1B") as pool:
        pids = list(pool.imap(tasks.get_pid, range(12)))
        assert len(set(pids)) == 12
    with tpool.Pool(1, max_memory="4GB") as pool:
        assert list(pool.imap(tasks.double, range(MANY))) == [2 * number for number in range(MANY)]
    assert spans


@pytest.mark.parametrize(
    "options",
    [{"maxtasksperchild": 700}, {"timeline": True}],
    ids=["maxtasksperchild", "timeline"],
)
def test_where_tasks_are_counted_one_by_one_there_are_none(options, spans):
    with tpool.Pool(2, **options) as pool:
        assert list(pool.imap(tasks.double, range(MANY))) == [2 * number for number in range(MANY)]
        assert list(pool.imap(tasks.double, range(500), retries=1)) == [2 * number for number in range(500)]
    assert not spans


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_threads_share_an_iterator(pool, name):
    results = getattr(pool, name)(tasks.identity, range(20_000))
    got: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=numbers.extend, args=(results,)) for numbers in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(itertools.chain(*got)) == list(range(20_000))


def test_in_a_coroutine_and_with_a_timeout(pool):
    async def consume():
        return [value async for value in pool.imap(tasks.double, range(MANY))]

    assert asyncio.run(consume()) == [2 * number for number in range(MANY)]
    results = pool.imap(tasks.double, range(MANY))
    assert [results.next(DEADLINE) for _ in range(MANY)] == [2 * number for number in range(MANY)]


def test_progress_and_budgets_count_each_item(pool, spans):
    seen = []
    assert sum(pool.imap(tasks.double, range(MANY), progress=seen.append, buffer_nbytes="1MB")) == MANY * (MANY - 1)
    wait_until(lambda: seen[-1].finished, DEADLINE)
    assert seen[-1].done == MANY
    assert spans


def test_no_result_is_kept_while_the_next_item_runs(spans):
    """It may be large."""
    with tpool.Pool(1) as pool:
        results = list(pool.imap(tasks.make_or_look_for_the_last, range(2_000)))
    assert results[1::2] == [True] * 1_000
    assert spans


def test_items_in_common_are_not_mixed_up(pool):
    """A list may change between two tasks that get it, so none is in a span."""
    shared = [0]
    assert list(pool.imap(tasks.append_and_tell, [shared] * 2_000)) == [[0, 0]] * 2_000


# The basket, without a pool ----------------------------------------------------------------------------------------


def test_a_basket_calls_for_the_handler_once_and_again_when_it_is_full():
    calls = []
    basket = Basket(JobId(1), 5, lambda basket, hurry: calls.append(hurry))
    for number in range(3 * FULL):
        basket.put(number)
    assert calls == [False, True]
    taken = basket.take(lambda items: items)
    assert [(task.index, task.count, task.payload) for task in taken] == [
        (5 + start, SPAN_ITEMS, tuple(range(start, start + SPAN_ITEMS))) for start in range(0, 3 * FULL, SPAN_ITEMS)
    ]
    basket.put("more")
    assert calls == [False, True, False]
    assert [(task.index, task.payload) for task in basket.take(lambda items: items)] == [(5 + 3 * FULL, ("more",))]
    assert basket.take(lambda items: items) == []


def test_a_span_is_cut_where_it_is_told():
    span = Task(JobId(1), 10, "payload", count=5)
    head = span.cut(2)
    assert (head.index, head.start, head.count) == (10, 0, 2)
    assert (span.index, span.start, span.count) == (12, 2, 3)
    assert [(item.index, item.start, item.count) for item in span.items()] == [(12, 2, 1), (13, 3, 1), (14, 4, 1)]


def test_looking_at_a_spans_items_changes_nothing():
    span = Task(JobId(1), 7, "payload", count=5, start=2)
    looked_at = itertools.islice(span.singly(), 3)
    assert [(task.index, task.start, task.count, task.payload) for task in looked_at] == [
        (7 + place, 2 + place, 1, "payload") for place in range(3)
    ]
    assert (span.index, span.start, span.count) == (7, 2, 5)
    assert [task.index for task in span.singly()] == [task.index for task in span.items()] == [7, 8, 9, 10, 11]
    assert list(span.singly()) == [span]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    pops=st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=8),
)
def test_what_a_worker_holds_is_taken_away_from_both_ends(sizes, pops):
    worker = Worker(WorkerId(0), Slot(0))
    left = list(range(sum(sizes)))
    for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
        worker.held.append(Task(JobId(1), end - size, None, count=size, start=100 - size))
    worker.load = len(left)
    for from_the_end, count in pops:
        count = min(count, len(left))
        if not count:
            break
        worker.check_run(JobId(1), left[0], count)
        with pytest.raises(tpool.ProtocolError):
            worker.check_run(JobId(1), left[0] + 1, count)
        with pytest.raises(tpool.ProtocolError):
            worker.check_run(JobId(1), left[0], len(left) + 1)
        if from_the_end:
            taken = worker.pop_last(count)
            left, expected = left[:-count], left[-count:]
            assert [task.index + place for task in taken for place in range(task.count)] == expected
            assert all(task.start + task.count <= 100 for task in taken)
        else:
            worker.pop_first(count)
            left = left[count:]
        assert [task.index + place for task in worker.held for place in range(task.count)] == left
        assert worker.load == len(left)


@pytest.mark.parametrize("advice", [forkmark.MADV_WIPEONFORK, 9_999], ids=["wiped", "by a hook"])
def test_the_mark_of_a_process_is_gone_in_its_children(monkeypatch, advice):
    monkeypatch.setattr(forkmark, "MADV_WIPEONFORK", advice)
    page = forkmark.ForkMark().page
    child = os.fork()
    if not child:
        os._exit(page[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert page[0] == 1
