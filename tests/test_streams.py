"""Several iterables, budgets, unordered maps and progress; with real processes, through the public API."""

from __future__ import annotations

import contextlib
import sys
import threading
import time

import pool_tasks as tasks
import pytest
import torch
from support import wait_until

import tpool
from tpool.feeder import LOOK_AGAIN_WIDE, MAX_TASKS_PER_WORKER, WIDE_NBYTES
from tpool.results import Failure
from tpool.streams import Stream
from tpool.values import Values

DEADLINE = 30
LARGE = 1 << 16  # elements of four bytes
CALLS = ["map", "map_unordered", "starmap", "imap", "imap_unordered", "istarmap", "istarmap_unordered"]


@pytest.fixture(scope="module")
def pool():
    with tpool.Pool(2) as pool:
        wait_until(lambda: len(set(pool.map(tasks.get_pid, range(20), chunksize=1))) == 2, DEADLINE)
        pool.apply_async(tasks.identity, (1,), callback=str).wait(DEADLINE)
        yield pool


# Unordered, and several iterables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_map_unordered(pool, chunksize):
    assert sorted(pool.map_unordered(tasks.double, range(100), chunksize)) == [2 * x for x in range(100)]
    assert pool.map_unordered(tasks.double, []) == []
    with pytest.raises(ValueError, match="odd"):
        pool.map_unordered(tasks.raise_if_odd, range(10), chunksize)


def test_map_unordered_gives_what_comes_first(pool, tmp_path):
    """The first item waits until the second is done: not just until its task has run."""
    gate = tmp_path / "gate"

    def open_gate(now):
        if now.done:
            gate.touch()

    items = [gate, "first"]
    assert pool.map_unordered(tasks.wait_if_path, items, chunksize=1, progress=open_gate) == ["first", gate]


def test_several_iterables(pool):
    expected = [3 * x for x in range(50)]
    assert pool.starmap(tasks.add, zip(range(50), range(0, 100, 2))) == expected
    assert list(pool.istarmap(tasks.add, zip(range(50), range(0, 100, 2)))) == expected
    assert sorted(pool.istarmap_unordered(tasks.add, zip(range(50), range(0, 100, 2)), 5)) == expected
    assert list(pool.executor().map(tasks.add, range(50), range(0, 100, 2))) == expected
    with pytest.raises(TypeError, match="argument"):
        list(pool.istarmap(tasks.add, [(1, 2, 3)]))


@pytest.mark.parametrize("name", CALLS)
def test_a_second_iterable_in_the_place_of_chunksize_is_refused_with_the_cure(pool, name):
    with pytest.raises(TypeError, match=r"starmap\(func, zip\(xs, ys\)\)"):
        getattr(pool, name)(tasks.add, [1], [2])


# The budget in bytes ------------------------------------------------------------------------------------------------


def let_it_draw():
    """Long enough for a feeder that knows no limit to go far beyond it."""
    since = time.monotonic()
    wait_until(lambda: time.monotonic() > since + 0.5, DEADLINE)


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_a_budget_in_bytes_counts_items(pool, name):
    drawn = 0

    def tensors():
        nonlocal drawn
        while True:
            drawn += 1
            yield torch.zeros(250_000)  # in memory that tasks before have given back, but their results are waiting

    iterator = getattr(pool, name)(tasks.discard, tensors(), buffersize=64, buffer_nbytes="5MB")
    for consumed in range(1, 100):
        next(iterator)
        assert drawn - consumed <= 6
    let_it_draw()
    assert drawn - consumed <= 6
    del iterator


def test_a_budget_in_bytes_lets_no_more_be_drawn_than_the_one_in_items():
    consumed = most = 0

    def tensors():
        nonlocal most
        for drawn in range(1, 31):
            most = max(most, drawn - consumed)
            yield torch.zeros(250_000)

    with tpool.Pool(4) as pool:
        for _ in pool.imap(tasks.discard, tensors(), buffersize=1, buffer_nbytes="500KB"):
            consumed += 1
    assert most <= 2, "one, and one that the consumer has and we have not counted"


def test_items_that_cannot_be_sent_take_nothing_of_the_budget(pool):
    drawn = 0

    def items():
        nonlocal drawn
        for drawn in range(1, 301):
            yield threading.Lock() if drawn % 10 else torch.zeros(250_000)

    iterator = pool.imap(tasks.discard, items(), buffersize=64, buffer_nbytes="10MB")
    # Always far behind, or nothing would be left over. The feeder sleeps at 64 drawn, and wakes at a quarter free.
    for consumed in range(200):
        if consumed % 17 == 0:
            full = consumed + 64
            wait_until(lambda: drawn >= full, DEADLINE, "the window is full, as only seven of them are tensors")
        with contextlib.suppress(TypeError):
            next(iterator)
    del iterator


def test_a_budget_in_bytes_counts_results(pool):
    drawn = 0

    def sizes():
        nonlocal drawn
        while True:
            drawn += 1
            yield 1_000_000

    iterator = pool.imap(tasks.make_zeros, sizes(), buffersize=64, buffer_nbytes=5_000_000)
    for consumed in range(1, 100):
        assert len(next(iterator)) == 1_000_000
        assert drawn - consumed <= 6
    del iterator


@pytest.mark.parametrize("processes", [1, 2])
def test_a_tensor_that_is_sent_again_takes_no_more_of_the_budget(processes):
    tensor, drawn = torch.ones(1_000_000), 0

    def again():
        nonlocal drawn
        for drawn in range(1, 200):
            yield tensor, drawn

    with tpool.Pool(processes) as pool:
        iterator = pool.imap(tasks.discard, again(), buffersize=64, buffer_nbytes="5MB")
        next(iterator)
        next(iterator)
        wait_until(lambda: drawn >= 60, DEADLINE, "the window is full, though each two items are more than the budget")
        assert sum(1 for _ in iterator) == 197


def test_a_tensor_that_is_made_in_shared_memory_for_each_item_counts(pool):
    drawn = []

    def tensors():
        while True:
            drawn.append(pool.empty(250_000))
            yield drawn[-1]

    iterator = pool.imap(tasks.discard, tensors(), buffersize=64, buffer_nbytes="5MB")
    for consumed in range(1, 100):
        next(iterator)
        assert len(drawn) - consumed <= 6
    del iterator


@pytest.mark.parametrize("chunksize", [1, 8])
def test_large_items_after_many_small_ones_count_at_once(pool, chunksize):
    """When a stream of microsecond tasks has its wide window, too; with chunks, whichever of a chunk is large."""
    drawn = 0

    def items():
        nonlocal drawn
        for drawn in range(1, 20_001):
            yield drawn
        kept = []
        while True:
            drawn += 1
            kept.append(torch.zeros(250_000))
            yield kept[-1] if chunksize == 1 or drawn % chunksize else None

    iterator = pool.imap(tasks.discard, items(), chunksize, buffersize=1_000, buffer_nbytes="5MB")
    for _ in range(19_500):
        next(iterator)
    wait_until(lambda: drawn > 20_003, DEADLINE)
    let_it_draw()
    assert drawn - 20_000 <= (6 if chunksize == 1 else 2 * chunksize)
    del iterator


def test_a_slow_consumer_of_large_results_of_short_tasks_holds_few_of_them(pool):
    """The wide window of microsecond tasks, 1024 items here, is for results that are small."""
    drawn = 0

    def sizes():
        nonlocal drawn
        for _ in range(20_000):
            drawn += 1
            yield LARGE

    results = pool.imap_unordered(torch.empty, sizes())
    for taken in range(1, 1501):
        next(results)
        if taken % 50 == 0:  # a break, in which it draws what it will
            before = -1
            while drawn != before:
                before = drawn
                threading.Event().wait(0.02)
            assert drawn - taken <= max(WIDE_NBYTES // (4 * LARGE), 4 * 2) + LOOK_AGAIN_WIDE


@pytest.mark.parametrize(
    ("nbytes", "most"),
    [(4_000, 2 * MAX_TASKS_PER_WORKER + LOOK_AGAIN_WIDE), (400_000, WIDE_NBYTES // 400_000 + 1), (20_000_000, 8 + 1)],
)
def test_tensors_for_short_tasks_are_drawn_ahead_as_far_as_they_take_little(pool, nbytes, most):
    drawn = taken = furthest = 0

    def tensors():
        nonlocal drawn, furthest
        while True:
            drawn += 1
            furthest = max(furthest, drawn - taken)
            yield torch.empty(nbytes // 4)

    results = pool.imap_unordered(tasks.discard, tensors())
    deadline = time.monotonic() + DEADLINE
    while taken < 40 or (most > 10 and furthest < most // 4):
        next(results)
        taken += 1
        if taken % 50 == 0:
            let_it_draw()
        assert time.monotonic() < deadline
    let_it_draw()
    assert furthest <= most + 1  # it is counted as drawn before it is counted as taken
    del results


@pytest.mark.parametrize("chunksize", [20, 100])
def test_chunks_of_tensors_after_many_of_numbers_keep_to_the_budget_but_for_one(pool, chunksize):
    drawn = 0

    def items():
        nonlocal drawn
        for drawn in range(1, 20_001):
            yield drawn
        while True:
            drawn += 1
            yield torch.zeros(15_000)

    iterator = pool.imap(tasks.discard, items(), chunksize, buffersize=2_000, buffer_nbytes="2MB")
    for _ in range(19_500):
        next(iterator)
    wait_until(lambda: drawn > 20_000, DEADLINE)
    let_it_draw()
    assert drawn - 20_000 <= 2_000_000 // 60_000 + 2 * chunksize
    del iterator


def test_a_budget_below_one_item_still_goes_on(pool):
    assert [len(value) for value in pool.imap(tasks.make_zeros, [50_000] * 10, buffer_nbytes=1)] == [50_000] * 10


@pytest.mark.parametrize("bad", [0, -1, "many", "0", [], True])
def test_bad_budgets(pool, bad):
    with pytest.raises(ValueError, match="buffer_nbytes"):
        pool.imap(tasks.double, [1], buffer_nbytes=bad)


# Progress -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_progress_for_a_callable(pool, name):
    seen = []
    items = [(x, x) for x in range(100)] if "star" in name else range(100)
    function = tasks.add if "star" in name else tasks.double
    values = list(getattr(pool, name)(function, items, progress=lambda now: seen.append((now, in_callbacks()))))
    assert sorted(values) == [2 * x for x in range(100)]
    wait_until(lambda: seen and seen[-1][0].finished, DEADLINE)
    assert all(there for _, there in seen)
    counts = [now.done for now, _ in seen]
    assert counts == sorted(counts)
    last = seen[-1][0]
    assert (last.done, last.total, last.workers_lost) == (100, 100, 0)
    assert last.seconds > 0
    assert [now.finished for now, _ in seen].count(True) == 1


def in_callbacks():
    return threading.current_thread().name.endswith("-callbacks")


def test_a_map_returns_after_its_last_progress(pool):
    seen = []
    pool.map(tasks.double, range(30), progress=seen.append)
    assert seen[-1].finished
    seen.clear()
    with pytest.raises(ValueError, match="odd"):
        pool.map(tasks.raise_if_odd, range(30), chunksize=1, progress=seen.append)
    assert (seen[-1].done, seen[-1].finished) == (30, True)
    seen.clear()
    assert pool.map(tasks.double, [], progress=seen.append) == []
    assert (seen[-1].done, seen[-1].total, seen[-1].finished) == (0, 0, True)


def test_progress_of_an_input_without_a_length_and_of_items_that_cannot_be_sent(pool):
    seen = []
    items = iter([1, tasks.Unpicklable(), 3])
    iterator = pool.imap(tasks.double, items, progress=seen.append)
    assert next(iterator) == 2
    with pytest.raises(TypeError, match="stays where it is"):
        next(iterator)
    assert next(iterator) == 6
    wait_until(lambda: seen and seen[-1].finished, DEADLINE)
    assert (seen[-1].done, seen[-1].total) == (3, None)


def test_progress_of_async_calls(pool):
    seen = []
    assert pool.map_async(tasks.double, range(5), progress=seen.append).get(DEADLINE) == [0, 2, 4, 6, 8]
    assert pool.starmap_async(tasks.add, [(1, 2)], progress=seen.append).get(DEADLINE) == [3]
    wait_until(lambda: [now.finished for now in seen].count(True) == 2, DEADLINE)


def test_progress_tells_of_bytes_and_of_lost_workers():
    seen = []
    with tpool.Pool(1, retries=1) as pool:
        pool.map(tasks.double, [torch.zeros(250_000)] * 3, progress=seen.append)
        assert seen[-1].moved_nbytes >= 3_000_000
        with pytest.raises(tpool.WorkerLostError):
            pool.map(tasks.kill_self, [1], progress=seen.append)
        assert seen[-1].workers_lost == 2


def test_a_display_that_raises_harms_nobody_and_is_left_alone(pool, caplog):
    calls = []

    def fail(now):
        calls.append(now)
        raise RuntimeError("display broke")

    assert pool.map(tasks.double, range(50), chunksize=1, progress=fail) == [2 * x for x in range(50)]
    assert len(calls) == 1
    wait_until(lambda: "display broke" in caplog.text, DEADLINE)  # the map need not wait for that


def test_a_bar(pool, capsys, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # its own thread would outlive the test
    assert pool.map(tasks.double, range(100), progress=True) == [2 * x for x in range(100)]
    text = capsys.readouterr().err
    assert "map(double): 100%" in text
    assert "100/100" in text
    assert list(pool.imap(tasks.double, iter(range(10)), progress=True)) == [2 * x for x in range(10)]
    wait_until(lambda: "10it" in capsys.readouterr().err, DEADLINE)


def test_without_tqdm(pool, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        pool.map(tasks.double, [1], progress=True)


@pytest.mark.parametrize("name", CALLS)
def test_bad_progress(pool, name):
    with pytest.raises(TypeError, match="progress must be True, False or a callable"):
        getattr(pool, name)(tasks.double, [1], progress="yes")


def hear_of_the_end(stream, ended):
    with pytest.raises(StopIteration):
        stream.take(DEADLINE)
    ended.append(True)


def test_consumers_who_sleep_hear_of_the_end_from_whoever_takes_the_last():
    stream = Stream("a stream", ordered=False)
    ended = []
    second = threading.Thread(target=hear_of_the_end, args=(stream, ended))
    second.start()
    wait_until(lambda: stream._waiting, DEADLINE)
    stream._told = True  # as if it had been woken for an earlier result, and was asleep again
    stream.resolve(0, Failure(ValueError()))
    stream._length = 1
    stream.take(DEADLINE)
    second.join(DEADLINE / 3)
    assert ended


@pytest.mark.parametrize("ordered", [True, False])
def test_a_run_of_results_is_there_for_all_who_wait(ordered):
    """Whoever takes the first of them may do nothing more."""
    stream = Stream("a stream", ordered=ordered)
    got: list[object] = []
    threads = [threading.Thread(target=lambda: got.append(stream.take(DEADLINE).take())) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(stream._waiting) == 3, DEADLINE)
    stream.resolve_run(0, Values([1, None, 0], 1e-6))
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(map(repr, got)) == ["0", "1", "None"]


def test_results_that_come_too_early_wait_for_those_before_them():
    stream = Stream("a stream", ordered=True)
    stream.resolve_run(3, Values([3, 4], 1e-6))
    assert stream.awaits_earlier()
    assert not stream.has_consumable()
    stream.resolve(2, Failure(ValueError("2")))
    stream.resolve_run(0, Values([0, 1], 1e-6))
    assert not stream.awaits_earlier()
    stream.set_length(5)
    got = [stream.take(0).take() for _ in range(5)]
    assert [got[0], got[1], str(got[2]), got[3], got[4]] == [0, 1, "2", 3, 4]
    assert stream.consumed == 5
    with pytest.raises(StopIteration):
        stream.take(0)


def test_consumers_of_one_iterator_all_hear_of_its_end():
    # One has taken the last result and not yet said so, while another looks: it must not go to sleep.
    stream = Stream("a stream", ordered=False)
    stream.resolve(0, Failure(ValueError()))
    stream.set_length(1)
    ended = []
    second = threading.Thread(target=hear_of_the_end, args=(stream, ended))
    count = stream.count

    def count_late():
        second.start()
        second.join(DEADLINE / 3)
        count()

    stream.count = count_late
    stream.take(DEADLINE)
    assert ended
