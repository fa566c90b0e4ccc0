"""Results as futures, awaited and through an executor; with real processes, through the public API."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pool_tasks as tasks
import pytest
import torch
from support import wait_until

import tpool
from tpool.messages import TasksFinished, WorkerExited
from tpool.results import Callbacks
from tpool.tensors.leases import table

DEADLINE = 30


@pytest.fixture(scope="module")
def pool():
    with tpool.Pool(2) as pool:
        wait_until(lambda: len(set(pool.map(tasks.get_pid, range(20), chunksize=1))) == 2, DEADLINE)
        pool.apply_async(tasks.identity, (1,), callback=str).wait(DEADLINE)
        yield pool


@pytest.fixture
def gate(tmp_path):
    """A file that tasks wait for; there at the end, so that none of them outlives its test."""
    path = tmp_path / "gate"
    yield path
    path.touch()


@pytest.fixture
def busy(pool, gate):
    """Both workers wait for the gate."""
    results = [pool.submit(tasks.wait_for_file, str(gate)) for _ in range(2)]
    wait_until(lambda: all(result.running() for result in results), DEADLINE)
    yield results
    gate.touch()
    concurrent.futures.wait(results, DEADLINE)


# Futures ----------------------------------------------------------------------------------------------------------


def test_a_result_is_a_future(pool):
    result = pool.submit(tasks.add, 1, y=2)
    assert isinstance(result, concurrent.futures.Future)
    assert isinstance(result, tpool.AsyncResult)
    assert result.result(DEADLINE) == 3
    assert result.get() == 3
    assert result.exception() is None
    assert result.done()
    assert not result.running()
    assert not result.cancel()
    assert not result.cancelled()
    assert repr(result) == "<tpool.AsyncResult of apply(add): finished>"
    assert pool.map_async(tasks.double, range(3)).result(DEADLINE) == [0, 2, 4]


def test_an_exception_is_the_futures_exception(pool):
    result = pool.submit(tasks.raise_if_odd, 3)
    error = result.exception(DEADLINE)
    assert str(error) == "odd: 3"
    with pytest.raises(ValueError, match="odd: 3") as caught:
        result.result()
    assert caught.value is error
    unpicklable = pool.submit(tasks.identity, tasks.Unpicklable())
    assert isinstance(unpicklable.exception(DEADLINE), TypeError)


def test_timeouts_are_each_librarys_own(pool, busy):
    result = pool.submit(tasks.double, 1)
    with pytest.raises(concurrent.futures.TimeoutError):
        result.result(0.01)
    with pytest.raises(concurrent.futures.TimeoutError):
        result.exception(0)
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(0.01)


def test_wait_and_as_completed(pool, busy, gate):
    with ThreadPoolExecutor(1) as threads:
        foreign = threads.submit(int, "7")
        done, pending = concurrent.futures.wait([*busy, foreign], return_when="FIRST_COMPLETED", timeout=DEADLINE)
        assert (done, pending) == ({foreign}, set(busy))
    assert concurrent.futures.wait(busy, timeout=0.01).not_done == set(busy)
    gate.touch()
    results = [pool.submit(tasks.double, x) for x in range(20)]
    assert {future.result() for future in concurrent.futures.as_completed(results, DEADLINE)} == set(range(0, 40, 2))
    assert concurrent.futures.wait(results).done == set(results)


def test_wait_for_the_first_exception(pool, busy):
    failing = tpool.Pool(1)
    with failing:
        bad = failing.submit(tasks.raise_if_odd, 1)
        done, pending = concurrent.futures.wait([*busy, bad], DEADLINE, return_when="FIRST_EXCEPTION")
        assert (done, pending) == ({bad}, set(busy))
        # Asked again when it is done: under the locks of all futures, so nothing is decoded there.
        assert concurrent.futures.wait([*busy, bad], DEADLINE, return_when="FIRST_EXCEPTION").done == {bad}
        assert str(bad.exception()) == "odd: 1"


def test_done_callbacks_run_in_the_callback_thread(pool, gate, busy):
    seen = []

    def note(future):
        seen.append((future, threading.current_thread().name, future.result() > 0))

    busy[0].add_done_callback(note)
    gate.touch()
    wait_until(lambda: seen, DEADLINE)
    assert seen[0][0] is busy[0]
    assert seen[0][1].endswith("-callbacks")
    busy[0].add_done_callback(note)  # it is done: here and now
    assert seen[1][1] == threading.current_thread().name


def test_a_done_callback_that_raises_harms_nobody(pool, gate, busy, caplog):
    def fail(future):
        raise RuntimeError("done callback broke")

    seen = threading.Event()
    busy[0].add_done_callback(fail)
    busy[0].add_done_callback(lambda future: seen.set())
    gate.touch()
    assert seen.wait(DEADLINE)
    assert "done callback broke" in caplog.text


def test_results_are_decoded_by_whoever_asks(pool):
    result = pool.submit(tasks.TellsItsThread)
    wait_until(result.done, DEADLINE)
    assert result.result().loaded_in == threading.current_thread().name


@pytest.mark.parametrize("name", ["apply_async", "map_async"])
def test_a_value_that_an_interrupt_took_is_missed_by_whoever_asks_again(pool, monkeypatch, name):
    """Not None, and not a list without what was lost."""
    result = getattr(pool, name)(tasks.identity, ([1],))
    once = type(result)._decode_once

    def interrupted(self):
        once(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(result), "_decode_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.get(DEADLINE)
    monkeypatch.undo()
    with pytest.raises(tpool.TpoolError, match="was lost: who asked first was interrupted"):
        result.get(DEADLINE)


def test_a_call_after_the_end_of_the_callback_thread_is_made():
    callbacks = Callbacks("test")
    callbacks.prepare()
    callbacks.end()
    assert callbacks.join(DEADLINE)
    seen = []
    callbacks.post(lambda: seen.append(1))
    assert seen == [1]
    unstarted = Callbacks("test")
    unstarted.end()
    unstarted.post(lambda: seen.append(2))
    assert seen == [1, 2]


def test_terminate_ends_futures(gate):
    with tpool.Pool(1) as pool:
        result = pool.submit(tasks.wait_for_file, str(gate))
        told = threading.Event()
        result.add_done_callback(lambda future: told.set())
    assert isinstance(result.exception(DEADLINE), tpool.PoolTerminatedError)
    assert told.wait(DEADLINE)


# Cancelling -------------------------------------------------------------------------------------------------------


def test_what_is_queued_can_be_cancelled(pool, busy):
    errors, done = [], []
    result = pool.apply_async(tasks.double, (1,), error_callback=errors.append)
    result.add_done_callback(done.append)
    assert not result.running()
    assert result.cancel()
    assert result.cancelled()
    assert result.done()
    assert result.cancel()  # it is cancelled, if not by this
    with pytest.raises(tpool.TaskCancelledError, match=r"apply\(double\) was cancelled"):
        result.get()
    with pytest.raises(concurrent.futures.CancelledError):
        result.result()
    with pytest.raises(concurrent.futures.CancelledError):
        result.exception()
    assert not result.successful()
    assert concurrent.futures.wait([result]).done == {result}
    wait_until(lambda: errors and done, DEADLINE)
    assert isinstance(errors[0], tpool.TaskCancelledError)
    assert repr(result).endswith(": cancelled>")


def test_what_is_asked_before_a_result_is_seen_counts_first(monkeypatch, tmp_path):
    """The worker is free, and the pool does not know it yet: it must not be sent what was just cancelled."""
    gate, ran = tmp_path / "gate", tmp_path / "ran"
    with tpool.Pool(1) as pool:
        engine = pool._handler.engine
        look = engine.wait

        def look_and_cancel(timeout):
            events = look(timeout)
            if any(isinstance(event, TasksFinished) for event in events):
                second.cancel()
            return events

        monkeypatch.setattr(engine, "wait", look_and_cancel)
        first, second = pool.submit(tasks.wait_for_file, str(gate)), pool.submit(tasks.count_attempt, str(ran))
        gate.touch()
        with pytest.raises(tpool.TaskCancelledError):
            second.result(DEADLINE)
        assert first.result(DEADLINE)
    assert not ran.exists()


def test_what_is_sent_to_a_worker_that_is_gone_unheard_runs_elsewhere(monkeypatch):
    """Its death was seen, and is told to the scheduler only after the task was asked for."""
    with tpool.Pool(1) as pool:
        engine = pool._handler.engine
        pid, look, results = pool.submit(tasks.get_pid).result(DEADLINE), engine.wait, []

        def look_and_submit(timeout):
            events = look(timeout)
            if any(isinstance(event, WorkerExited) for event in events) and not results:
                results.append(pool.submit(tasks.get_pid))
            return events

        monkeypatch.setattr(engine, "wait", look_and_submit)
        # The handler may still sleep in the engine's own wait; this makes it go round once.
        assert pool.submit(tasks.get_pid).result(DEADLINE) == pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: results, DEADLINE)
        assert results[0].result(DEADLINE) != pid
        assert pool.stats().workers_lost == 0, "it had nothing to do"


def test_what_runs_cannot_be_cancelled(pool, busy, gate):
    assert not busy[0].cancel()
    assert busy[0].running()
    gate.touch()
    assert busy[0].get(DEADLINE) > 0


def test_a_map_is_cancelled_as_a_whole(pool, gate):
    result = pool.map_async(tasks.wait_for_file, [str(gate)] * 8, chunksize=1)
    wait_until(result.running, DEADLINE)
    assert result.cancel()
    with pytest.raises(tpool.TaskCancelledError):
        result.get(DEADLINE)
    gate.touch()
    assert pool.apply(tasks.double, (1,)) == 2


def test_waiting_for_a_cancelled_future_ends(pool, busy):
    result = pool.submit(tasks.double, 1)
    waiting = threading.Thread(target=concurrent.futures.wait, args=([result],))
    waiting.start()
    assert result.cancel()
    waiting.join(DEADLINE)
    assert not waiting.is_alive()


# asyncio ----------------------------------------------------------------------------------------------------------


def test_await(pool):
    async def main():
        assert await pool.submit(tasks.double, 4) == 8
        assert await asyncio.gather(*(pool.submit(tasks.double, x) for x in range(5))) == [0, 2, 4, 6, 8]
        with pytest.raises(ValueError, match="odd"):
            await pool.submit(tasks.raise_if_odd, 1)
        assert await pool.map_async(tasks.double, range(3)) == [0, 2, 4]
        done = pool.submit(tasks.double, 4)
        done.wait(DEADLINE)
        assert await done == 8
        assert await done == 8
        assert torch.equal(await pool.submit(tasks.make_tensor, 2.0), tasks.make_tensor(2.0))
        assert await asyncio.wrap_future(pool.submit(tasks.double, 5)) == 10

    asyncio.run(main())


def test_await_in_two_loops_at_once(pool, busy, gate):
    async def main():
        return await busy[0]

    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(asyncio.run, main()) for _ in range(2)]
        assert concurrent.futures.wait(waiting, timeout=0.05).done == set()
        gate.touch()
        assert waiting[0].result(DEADLINE) == waiting[1].result(DEADLINE) == busy[0].get()


def test_a_cancelled_await_cancels_what_is_queued(pool, busy, gate):
    async def main():
        queued = pool.submit(tasks.double, 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(queued, 0.01)
        await asyncio.to_thread(concurrent.futures.wait, [queued], DEADLINE)
        assert queued.cancelled()
        with pytest.raises(asyncio.CancelledError):
            await queued
        # What runs goes on, and may be awaited again.
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(busy[0], 0.01)
        gate.touch()
        assert await busy[0] > 0

    asyncio.run(main())


def test_a_loop_that_is_gone_harms_nobody(pool, busy, gate):
    loop = asyncio.new_event_loop()

    async def wait():
        await busy[0]

    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.wait([task], timeout=0.01))
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()
    gate.touch()
    assert busy[0].get(DEADLINE) > 0


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_async_for(pool, name):
    async def main():
        values = [value async for value in getattr(pool, name)(tasks.double, range(300))]
        assert sorted(values) == [2 * x for x in range(300)]
        seen = []
        async for value in getattr(pool, name)(tasks.double, itertools.count()):
            seen.append(value)
            if len(seen) == 50:
                break
        assert len(seen) == 50
        iterator = getattr(pool, name)(tasks.raise_if_odd, [0, 1])
        outcomes = [await anext_or_error(iterator) for _ in range(3)]
        assert sorted(outcomes) == ["0", "StopAsyncIteration", "odd: 1"]

    asyncio.run(main())


async def anext_or_error(iterator):
    try:
        return str(await iterator.__anext__())
    except (ValueError, StopAsyncIteration) as error:
        return str(error) or type(error).__name__


def test_a_cancelled_step_of_async_for_loses_nothing(pool, gate):
    async def main():
        iterator = pool.imap(tasks.wait_for_file, [str(gate)])
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(iterator.__anext__(), 0.01)
        gate.touch()
        assert await asyncio.wait_for(iterator.__anext__(), DEADLINE) > 0

    asyncio.run(main())


def test_the_loop_runs_on_while_a_stream_is_awaited(pool, gate):
    async def main():
        async def consume():
            return [value async for value in pool.imap(tasks.wait_for_file, [str(gate)] * 3)]

        consumer = asyncio.create_task(consume())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not consumer.done()
        gate.touch()
        assert len(await asyncio.wait_for(consumer, DEADLINE)) == 3

    asyncio.run(main())


def test_terminate_ends_async_for(gate):
    async def main():
        with tpool.Pool(1) as pool:
            iterator = pool.imap(tasks.wait_for_file, [str(gate)])
            step = asyncio.create_task(anext_of(iterator))
            await asyncio.sleep(0)
        with pytest.raises(tpool.PoolTerminatedError):
            await asyncio.wait_for(step, DEADLINE)

    async def anext_of(iterator):
        return await iterator.__anext__()

    asyncio.run(main())


# The executor -----------------------------------------------------------------------------------------------------


def test_run_in_executor(pool):
    async def main():
        loop = asyncio.get_running_loop()
        with pool.executor() as executor:
            return await loop.run_in_executor(executor, tasks.add, 1, 2)

    assert asyncio.run(main()) == 3
    assert pool.apply(tasks.double, (1,)) == 2  # the pool goes on


@pytest.mark.parametrize("chunksize", [1, 7])
def test_executor_map(pool, chunksize):
    executor = pool.executor()
    assert isinstance(executor, concurrent.futures.Executor)
    assert list(executor.map(tasks.add, range(20), range(100), chunksize=chunksize)) == [2 * x for x in range(20)]
    with pytest.raises(ValueError, match="odd"):
        list(executor.map(tasks.raise_if_odd, range(10), chunksize=chunksize))
    with pytest.raises(ValueError, match="chunksize must be 1"):
        executor.map(tasks.double, [1], chunksize=0)


def test_executor_map_with_a_timeout(pool, busy):
    with pytest.raises(concurrent.futures.TimeoutError):
        next(pool.executor().map(tasks.double, [1], timeout=0.01))


def test_shutdown_ends_the_view_and_waits_for_its_calls(pool, gate):
    executor, other = pool.executor(), pool.executor()
    result = executor.submit(tasks.wait_for_file, str(gate))
    executor.shutdown(wait=False)
    assert not result.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(tasks.double, 1)
    assert other.submit(tasks.double, 1).result(DEADLINE) == 2
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(executor.shutdown)
        gate.touch()
        ending.result(DEADLINE)
    assert result.done()


def test_shutdown_may_cancel(pool, busy):
    executor = pool.executor()
    results = [executor.submit(tasks.double, x) for x in range(5)]
    executor.shutdown(cancel_futures=True)
    assert all(result.cancelled() for result in results)


def test_an_executor_of_a_closed_pool_is_refused():
    pool = tpool.Pool(1)
    executor = pool.executor()
    pool.close()
    with pytest.raises(tpool.PoolEndedError):
        executor.submit(tasks.double, 1)
    with pytest.raises(tpool.PoolEndedError):
        pool.executor()
    pool.join()


def test_callbacks_are_made_though_the_first_start_of_their_thread_was_interrupted(monkeypatch):
    callbacks = Callbacks("interrupted")

    def interrupted(thread):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            callbacks.prepare()
    callbacks.prepare()
    called = threading.Event()
    callbacks.post(called.set)
    assert called.wait(DEADLINE)
    callbacks.end()
    assert callbacks.join(DEADLINE)


# The thread that brings results -----------------------------------------------------------------------------------


WAITS = {
    "apply": lambda pool: pool.apply(tasks.identity, (1,)),
    "apply with a time limit": lambda pool: pool.apply(tasks.identity, (1,), timeout=DEADLINE),
    "map": lambda pool: pool.map(tasks.identity, [1]),
    "starmap": lambda pool: pool.starmap(pow, [(2, 3)]),
    "get": lambda pool: pool.apply_async(tasks.identity, (1,)).get(),
    "wait": lambda pool: pool.apply_async(tasks.identity, (1,)).wait(),
    "exception": lambda pool: pool.submit(tasks.identity, 1).exception(),
    "imap": lambda pool: next(pool.imap(tasks.identity, [1])),
    "imap_unordered": lambda pool: list(pool.imap_unordered(tasks.identity, [1])),
    "map_batches": lambda pool: pool.map_batches(torch.neg, torch.ones(4), batch_size=2),
    "shutdown": lambda pool: shut_down(pool.executor()),
}


def shut_down(executor) -> None:
    executor.submit(tasks.identity, 1)
    executor.shutdown()


@pytest.mark.parametrize("name", WAITS)
def test_who_would_wait_in_the_thread_that_brings_the_result_is_told(pool, name):
    # A finalizer runs in any thread in which the collector finds it; there it would wait for itself.
    error = in_handler(pool, lambda: WAITS[name](pool))
    assert isinstance(error, RuntimeError), repr(error)
    assert "in the thread that brings its result" in str(error)
    assert pool.apply(tasks.identity, (2,)) == 2


def test_what_does_not_wait_for_ever_is_allowed_in_the_thread_that_brings_results(pool):
    submitted = []

    def use() -> None:
        submitted.append(pool.apply_async(tasks.identity, (1,)))
        with pytest.raises(multiprocessing.TimeoutError):
            submitted[0].get(0.01)
        with pytest.raises(multiprocessing.TimeoutError):
            pool.imap(tasks.identity, [1]).next(0.01)
        assert done.get() == "there"
        assert list(empty) == []

    done, empty = pool.apply_async(tasks.identity, ("there",)), pool.imap(tasks.identity, [])
    done.wait(DEADLINE)
    with pytest.raises(StopIteration):
        empty.next(DEADLINE)
    assert in_handler(pool, use) is None
    assert submitted[0].get(DEADLINE) == 1


def test_who_would_wait_in_the_midst_of_the_bookkeeping_of_memory_is_told(pool, busy, gate):
    # As a signal handler may be; who brings the result wants the same lock. Busy workers cannot bring it before.
    with table()._lock:
        with pytest.raises(RuntimeError, match="in the midst of the bookkeeping"):
            pool.apply(tasks.identity, (2,))
        result = pool.apply_async(tasks.identity, (2,))
        with pytest.raises(RuntimeError, match="in the midst of the bookkeeping"):
            result.get()
    gate.touch()
    assert result.get(DEADLINE) == 2


def test_a_finalizer_there_that_finds_no_memory_is_told():
    with tpool.Pool(1, memory=8 << 20) as pool:
        pool.apply(tasks.identity, (1,))
        held = pool.empty(7 << 18)
        error = in_handler(pool, lambda: pool.submit(tasks.identity, torch.ones(1 << 19)).result(DEADLINE))
        assert isinstance(error, tpool.SharedMemoryExhausted)
        del held
        assert pool.apply(torch.sum, (torch.ones(1 << 19),)) == 1 << 19


def in_handler(pool, call) -> BaseException | None:
    """What a call raises in the pool's handler thread, as a finalizer that the collector runs there would see it."""
    errors = []
    over = threading.Event()

    def run(dropped: bool) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)
        over.set()

    pool._handler.cancel_job(0, False, run)
    assert over.wait(DEADLINE), "it hangs"
    return errors[0] if errors else None
