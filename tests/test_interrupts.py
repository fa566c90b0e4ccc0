"""A signal handler that raises in the caller, Ctrl-C's above all, at every moment at which Python lets it."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Callable

import pool_tasks as tasks
import pytest
import torch
from interrupting import AlarmError, interrupt
from support import run_script, wait_until

import tpool
from tpool.tensors.arena import Allocator
from tpool.tensors.leases import table
from tpool.waiting import Flag, Monitor, uninterrupted

DEADLINE = 30


@pytest.fixture(autouse=True)
def _quiet_finalizers(monkeypatch):
    # An exception in a finalizer is printed and lost.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)


# The pool ----------------------------------------------------------------------------------------------------------

OPERATIONS = {
    "map": lambda pool: pool.map(tasks.identity, range(50)),
    "apply": lambda pool: pool.apply(tasks.identity, (1,)),
    "apply_async": lambda pool: pool.apply_async(tasks.identity, (1,)).get(DEADLINE),
    "imap": lambda pool: list(pool.imap(tasks.identity, range(8))),
    "imap_unordered": lambda pool: list(pool.imap_unordered(tasks.identity, range(8), chunksize=3)),
    "cancel": lambda pool: pool.map_async(tasks.identity, range(10)).cancel(),
    "progress": lambda pool: pool.map(tasks.identity, range(4), progress=lambda shown: None),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_any_moment_leaves_the_pool_whole(name):
    # A lock that stays taken hangs the pool; a job that is never sealed keeps join from ever returning.
    with tpool.Pool(2) as pool:
        pool.map(tasks.identity, range(10))
        moment, place = 1, "the beginning"
        while place is not None:
            place = interrupt(lambda: OPERATIONS[name](pool), moment)
            assert pool.apply_async(tasks.identity, (moment,)).get(DEADLINE) == moment, place
            moment += 1
        assert moment > 100
        pool.close()
        pool.join(DEADLINE)


def test_an_interrupt_at_any_moment_of_its_end_leaves_a_pool_that_ends():
    def end():
        pool.close()
        pool.join(DEADLINE)

    moment, place = 1, "the beginning"
    while place is not None:
        pool = tpool.Pool(1)
        pool.apply(tasks.identity, (1,))
        place = interrupt(end, moment)
        pool.terminate()
        pool.join(DEADLINE)
        moment += 1
    assert moment > 20


# Its memory --------------------------------------------------------------------------------------------------------


def rows(count: int = 4) -> list[torch.Tensor]:
    return [torch.full((5000,), float(number)) for number in range(count)]


def put_and_drop(pool: tpool.Pool) -> None:
    reference = pool.put(torch.ones(5000))
    pool.apply(tasks.first, (reference,))


WITH_TENSORS = {
    "map": lambda pool: pool.map(tasks.identity, rows()),
    "apply": lambda pool: pool.apply(tasks.identity, (rows(1)[0],)),
    "imap": lambda pool: list(pool.imap(tasks.identity, rows())),
    "small": lambda pool: pool.map(tasks.identity, [torch.ones(100) for _ in range(40)], chunksize=20),
    "put": put_and_drop,
    "map_batches": lambda pool: pool.map_batches(torch.neg, torch.ones(9000), batch_size=4000),
    "empty": lambda pool: pool.map(tasks.identity, [pool.empty(5000), pool.zeros(9000)]),
    "a function of a script": lambda pool: pool.apply(script_function(), (1,)),
}


def script_function() -> Callable[[int], int]:
    weights = torch.ones(5000)

    def function(x: int) -> int:
        return x + int(weights[0])

    return function


@pytest.mark.parametrize("name", WITH_TENSORS)
def test_memory_that_an_interrupt_took_is_all_free_afterwards(name):
    mode = torch.is_grad_enabled()
    with tpool.Pool(2) as pool:
        memory = pool._engine._memory.codec.memory
        allocator = table().allocator(memory.arena)
        pool.map(tasks.identity, rows())
        moment, place = 1, "the beginning"
        while place is not None:
            place = interrupt(lambda: WITH_TENSORS[name](pool), moment)
            assert torch.is_grad_enabled() is mode, place
            moment += 9  # one in nine of some thousands
        assert moment > 200
        assert pool.apply_async(tasks.identity, (moment,)).get(DEADLINE) == moment
        wait_until(lambda: is_all_free(pool, allocator), DEADLINE, "blocks in use that are nobody's")


def test_an_interrupt_at_any_moment_of_sending_a_function_of_a_script_is_what_its_caller_sees():
    script = """
        from interrupting import interrupt
        import tpool

        def make(number):
            class Scale:
                factor = number

            def helper(x):
                return x * Scale.factor

            def function(x):
                return helper(x) + other(x)

            return function

        def other(x):
            return x + 1

        def press():
            raise KeyboardInterrupt

        with tpool.Pool(1) as pool:
            moment, place = 1, "the beginning"
            while place is not None:
                try:
                    place = interrupt(lambda: pool._engine.encode(make(moment)), moment, press)
                except KeyboardInterrupt:
                    pass
                moment += 1
            assert moment > 500, moment
            assert pool.apply(make(3), (2,)) == 9
    """
    run_script(script, DEADLINE).expect_success()


def is_all_free(pool: tpool.Pool, allocator: Allocator) -> bool:
    # Workers tell what they gave back when they go idle, or with their next answer.
    pool.starmap(gc.collect, [()] * 4, chunksize=1)
    table().collect_garbage()
    return allocator.blocks_in_use == 0


# The parts ---------------------------------------------------------------------------------------------------------


WAITS = {
    "came true": lambda monitor: monitor.wait_for(lambda: True),
    "in vain": lambda monitor: monitor.wait_for(lambda: False, 0.001),
    "too late": lambda monitor: monitor.wait_for(lambda: False, 0.0),
    "the next": lambda monitor: monitor.wait(0.001),
}


@pytest.mark.parametrize("name", WAITS)
def test_an_interrupt_at_any_moment_of_waiting_leaves_the_lock_free(name):
    monitor = Monitor()
    moment, place = 1, "the beginning"
    while place is not None:
        place = interrupt(lambda: WAITS[name](monitor), moment)
        assert in_thread(lambda: monitor.acquire(timeout=DEADLINE) and not monitor.release()), place
        moment += 1
    assert moment > 3


def test_monitor_wakes_all_who_wait_for_what_came_true():
    monitor, known = Monitor(), []
    threads = [threading.Thread(target=monitor.wait_for, args=(lambda: known, DEADLINE)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for wake in (False, True):  # one too many first
        with monitor:
            if wake:
                known.append(1)
            monitor.notify_all()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert monitor.wait_for(lambda: known) == [1]


def test_monitor_forgets_who_waited_in_vain():
    monitor = Monitor()
    assert monitor.wait_for(lambda: 0, timeout=0.001) == 0
    monitor.wait(0.001)
    assert not monitor._sleepers


def test_flag_is_set_once_for_all():
    flag = Flag()
    assert not flag.is_set()
    assert not flag.wait(0.0)
    assert in_thread(flag.set) is None
    assert flag.wait(DEADLINE)
    assert flag.is_set()
    assert flag.wait()


def test_what_is_uninterrupted_runs_to_its_end_though_nobody_waits():
    begun, raised, go, made = Flag(), Flag(), Flag(), Flag()
    dropped: list[str] = []

    def make():
        begun.set()
        go.wait(DEADLINE)
        made.set()
        return "value"

    def raise_alarm(signum, frame):
        if not raised.is_set():
            raised.set()
            raise AlarmError

    def interrupt_main_thread():
        # More than once: a signal that comes just before a thread sleeps on a lock does not wake it.
        begun.wait(DEADLINE)
        while not raised.wait(0.01):
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, raise_alarm)
    try:
        interrupter = threading.Thread(target=interrupt_main_thread)
        interrupter.start()
        with pytest.raises(AlarmError):
            uninterrupted(make, dropped.append)
        interrupter.join(DEADLINE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not made.is_set()
    go.set()
    assert made.wait(DEADLINE)
    wait_until(lambda: dropped == ["value"], DEADLINE)


def test_what_is_uninterrupted_returns_and_raises_as_ever():
    assert uninterrupted(threading.current_thread, print) is not threading.main_thread()
    with pytest.raises(KeyError, match="missing"):
        uninterrupted(lambda: {}["missing"], print)
    assert in_thread(lambda: uninterrupted(threading.get_ident, print) == threading.get_ident())


def in_thread(call: Callable[[], object]) -> object:
    """What a call in another thread returns; fails if it hangs."""
    values: list[object] = []
    thread = threading.Thread(target=lambda: values.append(call()), daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    return values.pop()
