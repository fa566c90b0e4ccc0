"""Many at once: threads, callbacks, pools in pools, and iterables that misbehave."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time

from . import procs
from .script import Env, case, main, nap, square


def in_threads(count, function):
    """Runs this in so many threads and raises the first failure."""
    failures = []

    def act(number):
        try:
            function(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=act, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def twice(value):
    return value * 2


@case(9, "8 threads, each with maps on one pool")
def eight_threads(env: Env):
    pool = env.pool(2)

    def act(number):
        for _ in range(10):
            items = list(range(number * 100, number * 100 + 50))
            got = pool.map(twice, items)
            assert got == [item * 2 for item in items], f"thread {number} got wrong results"

    in_threads(8, act)


@case(9, "8 threads, each with maps of small tensors on one pool", needs="torch")
def eight_threads_of_tensors(env: Env):
    import torch

    pool = env.pool(2)

    def act(number):
        for turn in range(10):
            items = [torch.full((16,), float(number * 1000 + turn * 10 + index)) for index in range(10)]
            expected = [item.clone() * 2 for item in items]
            got = pool.map(twice, items)
            assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True)), f"thread {number}"

    in_threads(8, act)


# Callbacks ---------------------------------------------------------------------------------------------------------


@case(9, "a callback that submits the next task, fifty deep", needs="callback")
def callback_submits(env: Env):
    pool = env.pool(2)
    done, seen = threading.Event(), []

    def step(value):
        seen.append(value)
        if len(seen) == 50:
            done.set()
        else:
            pool.apply_async(twice, (1,), callback=step)

    pool.apply_async(twice, (1,), callback=step)
    assert done.wait(15), f"the chain stopped after {len(seen)}"


@case(9, "a callback that raises: the result is there, the pool goes on", needs="callback", prints=True)
def callback_raises(env: Env):
    pool = env.pool(2)

    def bad(_):
        raise RuntimeError("a callback that raises")

    threading.excepthook = lambda *_: None
    results = [pool.apply_async(square, (value,), callback=bad) for value in range(5)]
    assert [result.get(10) for result in results] == [0, 1, 4, 9, 16]
    env.usable(pool)


@case(9, "a callback that raises `SystemExit`", needs="callback", prints=True)
def callback_exits(env: Env):
    pool = env.pool(2)

    def bad(_):
        raise SystemExit(3)

    threading.excepthook = lambda *_: None
    results = [pool.apply_async(square, (value,), callback=bad) for value in range(5)]
    assert [result.get(10) for result in results] == [0, 1, 4, 9, 16]
    env.usable(pool)


@case(9, "a callback that blocks: other results arrive", needs="callback")
def callback_blocks(env: Env):
    pool = env.pool(2)
    entered, release = threading.Event(), threading.Event()

    def slow(_):
        entered.set()
        release.wait(20)

    pool.apply_async(square, (2,), callback=slow)
    try:
        assert entered.wait(10)
        with env.within(1.0, "other tasks"):
            env.usable(pool)
    finally:
        release.set()


@case(9, "a callback that waits for another result of the pool", needs="callback")
def callback_gets(env: Env):
    pool = env.pool(2)
    done, got = threading.Event(), []

    def act(_):
        try:
            got.append(pool.apply_async(square, (3,)).get(5))
        except Exception as error:
            got.append(error)
        done.set()

    pool.apply_async(square, (2,), callback=act)
    assert done.wait(15)
    assert got == [9], got


@case(9, "an error callback that raises", needs="callback", prints=True)
def error_callback_raises(env: Env):
    pool = env.pool(2)

    def bad(_):
        raise RuntimeError("an error callback that raises")

    threading.excepthook = lambda *_: None
    result = pool.apply_async(divide, (1, 0), error_callback=bad)
    env.raises(lambda: result.get(10), ZeroDivisionError)
    env.usable(pool)


def divide(one, other):
    return one / other


# Pools -------------------------------------------------------------------------------------------------------------


def total(tensor):
    return float(tensor.sum())


@case(9, "two pools send the same tensor at the same time", needs="torch")
def two_pools_one_tensor(env: Env):
    import torch

    pools = [env.pool(1), env.pool(1)]
    tensor = torch.ones(250_000)

    def act(number):
        for _ in range(20):
            assert pools[number % 2].apply(total, (tensor,)) == 250_000
            back = pools[number % 2].apply(twice, (tensor,))
            assert pools[1 - number % 2].apply(total, (back,)) == 500_000

    in_threads(4, act)
    env.end(pools[0])
    assert pools[1].apply(total, (tensor,)) == 250_000, "the tensor went with the first pool"
    assert float(tensor.sum()) == 250_000


def nested(adapter, method, depth):
    """A pool inside a task."""
    if depth == 0:
        return 1
    pool = adapter.pool(1, method)
    try:
        return pool.apply(nested, (adapter, method, depth - 1)) + 1
    finally:
        adapter.end(pool)


@case(9, "a pool inside a task, three deep", deadline=90)
def pool_in_pool(env: Env):
    pool = env.pool(1)
    assert pool.apply_async(nested, (env.adapter, env.method, 3)).get(80) == 4


def killed_with_inner_pool(adapter, method):
    """Dies while it owns a pool of its own, whose workers are busy."""
    pool = adapter.pool(2, method)
    pool.apply_async(nap, (1000, "inner"))
    pool.apply_async(nap, (1000, "inner"))
    from .script import die, wait_for_marks

    wait_for_marks("inner", 2)
    die()


@case(9, "a worker that owns a pool is killed: the inner pool's processes go too", deadline=60)
def killed_owner_of_pool(env: Env):
    pool = env.pool(1)
    env.raises(lambda: pool.apply_async(killed_with_inner_pool, (env.adapter, env.method)).get(40))
    pids = [one.pid for one in env.marks("inner")]
    assert len(pids) == 2, "the inner pool never worked"
    assert procs.wait_until(lambda: not any(map(procs.alive, pids)), 3), "the inner workers live on"
    env.usable(pool)


@case(9, "twenty pools, made and ended by four threads", deadline=60)
def pools_in_threads(env: Env):
    def act(_):
        for _ in range(5 if env.method != "spawn" else 1):
            pool = env.adapter.pool(1, env.method)
            assert pool.apply(square, (3,)) == 9
            env.end(pool)

    in_threads(4, act)


# Iterables ---------------------------------------------------------------------------------------------------------


def raises_at(count):
    yield from range(count)
    raise LookupError("the input failed")


@case(
    9,
    "a generator raises midway in `imap`: the earlier results arrive, then its exception",
    needs="imap iterator",
    spawn=True,
)
def generator_raises(env: Env):
    pool = env.pool(2)
    results, got = pool.imap(square, raises_at(5)), []
    error = env.raises(lambda: [got.append(value) for value in results], LookupError)
    assert "the input failed" in str(error)
    assert got == [0, 1, 4, 9, 16], got
    env.usable(pool)


@case(9, "a generator raises midway in `imap_unordered` and in `map`", needs="imap iterator")
def generator_raises_elsewhere(env: Env):
    pool = env.pool(2)
    results, got = pool.imap_unordered(square, raises_at(5)), []
    for _ in range(6):  # the failure may overtake results
        try:
            got.append(results.next(10))
        except LookupError:
            got.append(-1)
    assert sorted(got) == [-1, 0, 1, 4, 9, 16], got
    env.raises(lambda: pool.map(square, raises_at(5)), LookupError)
    env.usable(pool)


def blocks_at(count, event):
    yield from range(count)
    event.wait(60)
    yield count


@case(9, "a generator blocks for ever in `imap`: others go on, `terminate` works", needs="imap terminate")
def generator_blocks(env: Env):
    pool = env.pool(2)
    event = threading.Event()
    try:
        results = pool.imap(square, blocks_at(3, event))
        got = [results.next(20) for _ in range(3)]
        assert got == [0, 1, 4], got
        with env.within(1.0, "other tasks"):
            env.usable(pool)
        assert list(pool.imap(square, range(5))) == [0, 1, 4, 9, 16], "another imap is stalled"
        with env.within(1.0, "terminate and join"):
            pool.terminate()
            pool.join()
        env.raises(lambda: results.next(5), env.needs_tpool("PoolTerminatedError"))
    finally:
        event.set()


@case(9, "a generator that uses the pool itself", needs="imap")
def generator_uses_pool(env: Env):
    pool = env.pool(2)
    items = (pool.apply(square, (value,)) for value in range(10))
    got = list(pool.imap(square, items))
    assert got == [value**4 for value in range(10)], got


@case(9, "an iterator is consumed by four threads: each item once", needs="imap iterator")
def iterator_of_threads(env: Env):
    pool = env.pool(2)
    results, got = pool.imap_unordered(square, range(400)), []

    def act(_):
        got.extend(results)

    in_threads(4, act)
    assert sorted(got) == [value * value for value in range(400)], f"{len(got)} items"


@case(9, "an iterator is made in one thread, which ends, and consumed in another", needs="imap")
def iterator_of_ended_thread(env: Env):
    pool = env.pool(2)
    made = []
    in_threads(1, lambda _: made.append(pool.imap(square, range(100))))
    assert list(made[0]) == [value * value for value in range(100)]


@case(9, "an endless generator: input is drawn as results are consumed", needs="tpool")
def endless_generator(env: Env):
    pool = env.pool(2)
    drawn = []
    results = pool.imap(square, (drawn.append(value) or value for value in itertools.count()))
    assert [next(results) for _ in range(100)] == [value * value for value in range(100)]
    procs.wait_until(lambda: len(drawn) > 2000, 0.5)
    env.note(f"{len(drawn)} drawn for 100 consumed")
    assert len(drawn) <= 2000, "it is drawn without end"


@case(9, "a small `apply` beside a large `map`")
def small_beside_large(env: Env):
    pool = env.pool(2)
    large = pool.map_async(nap, [0.002] * 3000, chunksize=1)
    env.wait_for("napping")
    with env.within(1.0, "apply"):
        assert pool.apply(square, (3,)) == 9
    assert not large.ready(), "the large map ended first"


@case(9, "signals in the caller (100 a second) while it waits")
def signals_in_caller(env: Env):
    pool = env.pool(2)
    count = [0]

    def tick(*_):
        count[0] += 1

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        for _ in range(20):
            assert pool.map(square, range(500)) == [value * value for value in range(500)]
        pool.apply(nap, (0.3,))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert count[0] > 5


def raise_alarm(*_):
    raise InterruptedError("enough")


@case(9, "a signal handler that raises in the caller, at any moment", deadline=60, prints=True)
def raising_handler(env: Env):
    # Whatever was being submitted or waited for, the pool must stay whole. (Raised inside a finaliser, the exception
    # is printed and lost; raised while a result is unpickled, it is why that failed.)
    pool = env.pool(2)
    env.worker_pids(pool)
    signal.signal(signal.SIGALRM, raise_alarm)
    for turn in range(40):
        signal.setitimer(signal.ITIMER_REAL, 0.001 + turn * 0.0007)
        end = time.monotonic() + 0.1
        try:
            while time.monotonic() < end:
                assert pool.map(square, range(50)) == [value * value for value in range(50)]
        except InterruptedError:
            continue
        except Exception as error:
            if not isinstance(error.__cause__, InterruptedError):
                raise
    env.usable(pool)


@case(9, "an idle pool makes no wake-ups: it uses no processor time", needs="tpool")
def idle_pool(env: Env):
    pool = env.pool(2)
    pids = [*env.worker_pids(pool), os.getpid()]
    time.sleep(0.3)  # what is left to do after the last task

    def ticks():
        fields = [open(f"/proc/{pid}/stat").read().rpartition(")")[2].split() for pid in pids]  # noqa: SIM115
        return sum(int(one[11]) + int(one[12]) for one in fields)

    before = ticks()
    time.sleep(1.0)
    assert ticks() - before <= 1, f"{ticks() - before} ticks of 10 ms in a second of idleness"


if __name__ == "__main__":
    main()
