"""terminate, close and join: always prompt, whatever the tasks do, and nobody waits for ever afterwards."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import zlib

from . import procs
from .script import Env, case, die, main, mark, nap, refuse_timeout, square


def ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    mark("busy")
    while True:
        time.sleep(100)


def sleep_long():
    mark("busy")
    time.sleep(1000)


def spin_with_lock():
    mark("busy")
    sum(itertools.repeat(0))


def spin_without_lock():
    mark("busy")
    data = bytes(50_000_000)
    while True:
        zlib.crc32(data)


def ignore_everything():
    for signum in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        try:
            signal.signal(signum, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    mark("busy")
    while True:
        try:
            time.sleep(100)
        except BaseException:
            continue


def start_child(then_die=False):
    """A child of the task's own, in the worker's process group."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    mark("child", child.pid)
    mark("busy")
    if then_die:
        die()
    time.sleep(1000)


def ends_within_a_second(env: Env, task, count=2):
    pool = env.pool(2)
    results = [pool.apply_async(task) for _ in range(count)]
    pids = {one.pid for one in env.wait_for("busy", 2)}
    with env.within(1.0, "terminate and join"):
        pool.terminate()
        pool.join()
    assert procs.wait_until(lambda: not any(map(procs.alive, pids)), 1.0), "workers live on"
    for result in results:
        env.raises(lambda result=result: result.get(3), env.needs_tpool("PoolTerminatedError"))


@case(6, "terminate: tasks that ignore SIGTERM", needs="terminate", spawn=True)
def terminate_ignored(env: Env):
    ends_within_a_second(env, ignore_sigterm)


@case(6, "terminate: tasks that ignore every signal and exception", needs="terminate")
def terminate_deaf(env: Env):
    ends_within_a_second(env, ignore_everything)


@case(6, "terminate: tasks that sleep, more of them queued", needs="terminate")
def terminate_sleeping(env: Env):
    ends_within_a_second(env, sleep_long, 50)


@case(6, "terminate: tasks that spin in C with the interpreter lock", needs="terminate")
def terminate_spinning(env: Env):
    ends_within_a_second(env, spin_with_lock)


@case(6, "terminate: tasks that spin in C without the interpreter lock", needs="terminate")
def terminate_spinning_free(env: Env):
    ends_within_a_second(env, spin_without_lock)


@case(6, "terminate: stopped workers (SIGSTOP)", needs="terminate")
def terminate_stopped(env: Env):
    pool = env.pool(2)
    pids = env.worker_pids(pool)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    with env.within(1.0, "terminate and join"):
        pool.terminate()
        pool.join()
    assert procs.wait_until(lambda: not any(map(procs.alive, pids)), 1.0), "workers live on"


def children_gone(env):
    children = [int(one.value) for one in env.marks("child")]
    try:
        assert procs.wait_until(lambda: not any(map(procs.alive, children)), 2.0), "children of the tasks live on"
    finally:
        procs.kill([found for pid in children if (found := procs.process(pid))])


@case(6, "terminate: tasks that started children of their own: they go too", needs="terminate", spawn=True)
def terminate_grandchildren(env: Env):
    ends_within_a_second(env, start_child)
    children_gone(env)


@case(6, "children of a killed worker go too", spawn=True)
def grandchildren_of_killed(env: Env):
    pool = env.pool(2)
    env.lost(lambda: pool.apply_async(start_child, (True,)).get(20), -signal.SIGKILL)
    children_gone(env)
    env.usable(pool)


@case(6, "terminate: 100,000 tasks queued", needs="terminate")
def terminate_long_queue(env: Env):
    pool = env.pool(2)
    results = [pool.apply_async(nap, (0.1,)) for _ in range(1000)]
    results.append(pool.map_async(square, range(100_000), chunksize=1))
    env.wait_for("napping")
    with env.within(1.0, "terminate and join"):
        pool.terminate()
        pool.join()
    for result in (results[500], results[-1]):
        env.raises(lambda result=result: result.get(3), env.needs_tpool("PoolTerminatedError"))


@case(6, "terminate at once after the pool was made", needs="terminate")
def terminate_at_once(env: Env):
    for _ in range(3):
        pool = env.pool(4)
        with env.within(1.5, "terminate and join"):
            pool.terminate()
            pool.join()


@case(6, "`join` with a timeout", needs="tpool")
def join_with_timeout(env: Env):
    pool = env.pool(1)
    result = pool.apply_async(nap, (1.5,))
    env.wait_for("napping")
    pool.close()
    begin = time.monotonic()
    try:
        pool.join(timeout=0.1)
    except (TimeoutError, multiprocessing.TimeoutError):
        env.note("join raises TimeoutError")
    assert time.monotonic() - begin < 1.2, "join did not keep its timeout"
    assert result.get(10) == 1.5
    pool.join()


@case(6, "`close` and `join`: all work is finished first")
def close_and_join(env: Env):
    pool = env.pool(2)
    results = [pool.apply_async(nap, (0.01,)) for _ in range(50)]
    pool.close()
    pool.join()
    assert [result.get(0.5) for result in results] == [0.01] * 50


@case(6, "`close`, then `join`, after partly consumed iterators", needs="imap")
def join_after_partial_imap(env: Env):
    pool = env.pool(2)
    iterators = [pool.imap(square, range(1000)), pool.imap_unordered(square, range(1000))]
    for iterator in iterators:
        next(iterator)
    pool.close()
    with env.within(10.0, "join"):
        pool.join()
    rest = 0
    for iterator in iterators:
        for _ in range(999):
            try:
                iterator.next(5)
            except StopIteration:
                break
            except Exception as error:
                refuse_timeout(error, "the rest of the iterator never ends")
                break
            rest += 1
    env.note(f"{rest} of 1998 results could be had afterwards")


@case(6, "`close`, then `join`, after an iterator was dropped", needs="imap")
def join_after_dropped_imap(env: Env):
    pool = env.pool(2)
    next(pool.imap(square, itertools.count() if env.is_tpool else range(1000)))
    pool.close()
    with env.within(10.0, "join"):
        pool.join()


@case(
    6,
    "whoever waits is told of `terminate`: `get`, `map`, `imap`, in other threads",
    needs="imap terminate",
    spawn=True,
)
def waiters_are_told(env: Env):
    pool = env.pool(1)
    pool.apply_async(sleep_long)
    env.wait_for("busy")
    kind = env.needs_tpool("PoolTerminatedError")
    waits = [
        lambda: pool.apply(square, (1,)),
        pool.apply_async(square, (1,)).get,
        lambda: pool.map(square, [1, 2]),
        lambda: next(pool.imap(square, [1, 2])),
        lambda: next(pool.imap_unordered(square, [1, 2])),
        lambda: pool.map_async(square, [1, 2]).get(60),
    ]
    told = []

    def wait(number):
        mark("waiting")
        try:
            env.raises(waits[number], kind)
        except BaseException as error:
            told.append((number, error))
        else:
            told.append((number, None))

    threads = [threading.Thread(target=wait, args=(number,), daemon=True) for number in range(len(waits))]
    for thread in threads:
        thread.start()
    env.wait_for("waiting", len(waits))
    time.sleep(0.2)  # no event tells that a thread blocks
    pool.terminate()
    pool.join()
    for thread in threads:
        thread.join(3)
    silent = [number for number, thread in enumerate(threads) if thread.is_alive()]
    assert not silent, f"waiters {silent} still wait"
    assert not [problem for _, problem in told if problem], told


@case(6, "`terminate` from another thread while `map` waits", needs="terminate")
def terminate_from_thread(env: Env):
    pool = env.pool(2)

    def act():
        env.wait_for("napping", 2)
        pool.terminate()

    thread = threading.Thread(target=act)
    thread.start()
    env.raises(lambda: pool.map(nap, [1000] * 4), env.needs_tpool("PoolTerminatedError"))
    thread.join()
    pool.join()


@case(6, "`terminate` from a callback", needs="terminate callback")
def terminate_from_callback(env: Env):
    pool = env.pool(2)
    ended = threading.Event()

    def end(_):
        pool.terminate()
        ended.set()

    waiting = pool.apply_async(sleep_long)
    pool.apply_async(square, (2,), callback=end)
    assert ended.wait(10), "terminate did not return"
    pool.join()
    env.raises(lambda: waiting.get(3), env.needs_tpool("PoolTerminatedError"))


@case(6, "`terminate` in a signal handler", needs="terminate")
def terminate_in_signal_handler(env: Env):
    # The signal arrives anywhere: while locks of ours are held, while a task is submitted.
    for delay in (0.05, 0.2, 0.35):
        pool = env.pool(2)
        env.worker_pids(pool)
        signal.signal(signal.SIGALRM, lambda *_, pool=pool: pool.terminate())
        signal.setitimer(signal.ITIMER_REAL, delay)
        kind = (env.needs_tpool("PoolEndedError"), ValueError)
        env.raises(lambda pool=pool: [pool.apply(square, (value,)) for value in itertools.count()], kind)
        pool.join()


@case(6, "`terminate` while eight threads submit", needs="terminate")
def terminate_under_submission(env: Env):
    pool = env.pool(2)
    ends = []

    def submit():
        try:
            for value in itertools.count():
                result = pool.apply_async(square, (value,))
                if value % 10 == 0:
                    result.get(10)
        except Exception as error:
            ends.append(error)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # in full swing
    with env.within(1.0, "terminate and join"):
        pool.terminate()
        pool.join()
    for thread in threads:
        thread.join(15)
    assert len(ends) == 8, f"{8 - len(ends)} threads hang"
    for error in ends:
        refuse_timeout(error, "a submitted task has no outcome")
    assert not env.is_tpool or all(isinstance(error, env.needs_tpool("PoolEndedError")) for error in ends), ends


@case(6, "close twice, terminate twice, in any order", needs="terminate")
def ended_twice(env: Env):
    for order in ("cct", "tt", "tc", "ctc"):
        pool = env.pool(1)
        for step in order:
            if step == "c":
                pool.close()
            else:
                pool.terminate()
        pool.join()
        pool.join()


@case(6, "work after `close` and after `terminate` is refused with `ValueError`", needs="terminate")
def used_after_end(env: Env):
    for end in ("close", "terminate"):
        pool = env.pool(1)
        getattr(pool, end)()
        kind = ValueError if env.is_tpool else Exception
        env.raises(lambda pool=pool: pool.apply(square, (1,)), kind)
        env.raises(lambda pool=pool: pool.map(square, [1, 2]), kind)
        pool.join()


@case(6, "results that arrived before `terminate` can be had after it", needs="terminate")
def results_after_terminate(env: Env):
    pool = env.pool(2)
    results = [pool.apply_async(square, (value,)) for value in range(20)]
    assert procs.wait_until(lambda: all(result.ready() for result in results), 15)
    pool.terminate()
    pool.join()
    assert [result.get(1) for result in results] == [value * value for value in range(20)]


@case(6, "leaving the `with` block ends a busy pool", needs="tpool", spawn=True)
def with_block(env: Env):
    begin = None
    with env.pool(2) as pool:
        result = pool.apply_async(sleep_long)
        pids = env.worker_pids(pool, 1)
        env.wait_for("busy")
        begin = time.monotonic()
    pool.join()
    assert time.monotonic() - begin < 3, "leaving took long"
    env.raises(lambda: result.get(3), env.needs_tpool("PoolTerminatedError"))
    assert not any(map(procs.alive, pids))


if __name__ == "__main__":
    main()
