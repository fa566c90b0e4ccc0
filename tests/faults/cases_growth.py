"""Nothing grows: memory, descriptors, threads, processes and shared memory are flat over many rounds."""

from __future__ import annotations

import gc
import weakref

from . import procs
from .script import Env, case, main, square

MEGA = 1_000_000


class Meter:
    """What this process and its workers use, now and later."""

    def __init__(self, pids=()):
        self.pids = ["self", *pids]
        self.before = self._read()

    def _read(self):
        gc.collect()
        memory = {pid: procs.memory_nbytes(pid) for pid in self.pids}
        return memory, {pid: procs.fd_count(pid) for pid in self.pids}, procs.thread_count()

    def assert_flat(self, env: Env, own=24 * MEGA, shared=64 * MEGA, fds=3, threads=1):
        memory, descriptors, running = self._read()
        for pid in self.pids:
            who = "the caller" if pid == "self" else "a worker"
            grown = [now - before for now, before in zip(memory[pid], self.before[0][pid], strict=True)]
            text = f"{who} grew by {grown[0] / MEGA:.1f} MB and {grown[1] / MEGA:.1f} MB of shared memory"
            env.note(text)
            assert grown[0] < own, text
            assert grown[1] < shared, text
            more = descriptors[pid] - self.before[1][pid]
            assert more <= fds, f"{who} has {more} descriptors more"
        assert running - self.before[2] <= threads, f"{running - self.before[2]} threads more"


def same(tensor):
    return tensor + 1


@case(10, "2,000 rounds of a 1 MB tensor both ways", needs="torch", deadline=90)
def rounds_of_tensor(env: Env):
    import torch

    # One thread each: what is measured is transport, and OpenMP's threads get in each other's way on a busy machine.
    torch.set_num_threads(1)
    pool = env.pool(1, initializer=torch.set_num_threads, initargs=(1,))
    pids = env.worker_pids(pool, 1)

    def rounds(count):
        for value in range(count):
            got = pool.apply(same, (torch.full((MEGA // 4,), float(value)),))
            assert float(got[-1]) == value + 1

    rounds(200)
    meter = Meter(pids)
    rounds(1800)
    meter.assert_flat(env)


@case(10, "1,000 rounds of 1 MB of bytes both ways", deadline=90)
def rounds_of_bytes(env: Env):
    pool = env.pool(1)
    pids = env.worker_pids(pool, 1)
    for count, last in ((100, False), (900, True)):
        if last:
            meter = Meter(pids)
        for _ in range(count):
            assert len(pool.apply(bytes_of, (bytes(MEGA),))) == MEGA
    meter.assert_flat(env)


def bytes_of(data):
    return bytes(len(data))


@case(10, "100,000 small tasks by `map`, `imap` and `apply_async`", needs="imap", deadline=90)
def small_tasks(env: Env):
    pool = env.pool(2)
    pids = env.worker_pids(pool)

    def play(count):
        assert sum(pool.map(square, range(count))) == sum(value * value for value in range(count))
        assert sum(pool.imap(square, range(count))) == sum(value * value for value in range(count))
        results = [pool.apply_async(square, (value,)) for value in range(count)]
        assert sum(result.get(30) for result in results) == sum(value * value for value in range(count))

    play(10_000)
    play(10_000)
    meter = Meter(pids)
    play(15_000)
    meter.assert_flat(env)


def recycle(env: Env, count):
    pool = env.pool(2, maxtasksperchild=1)
    assert pool.map(square, range(20), chunksize=1) == [value * value for value in range(20)]
    meter = Meter()
    before = len(procs.family("FAULTS_RUN=" + _run()))
    assert pool.map(square, range(count), chunksize=1) == [value * value for value in range(count)]
    # Two that start and two that end may be there beside the two that work.
    assert procs.wait_until(lambda: len(procs.family("FAULTS_RUN=" + _run())) <= before + 2, 5), "processes grow"
    meter.assert_flat(env, fds=6)


@case(10, "200 recycled workers", needs="maxtasks", deadline=110, methods=("forkserver",))
def recycled_workers(env: Env):
    recycle(env, 200)


@case(10, "40 recycled workers (`fork`)", needs="maxtasks", deadline=110, methods=("fork",))
def recycled_forked(env: Env):
    recycle(env, 40)


@case(10, "6 recycled workers (`spawn`)", needs="maxtasks", deadline=90, methods=("spawn",), spawn=True)
def recycled_spawned(env: Env):
    pool = env.pool(2, maxtasksperchild=1)
    assert pool.map(square, range(6), chunksize=1) == [value * value for value in range(6)]


def _run():
    import os

    return os.environ["FAULTS_RUN"]


def tensor_1mb(value):
    import torch

    return torch.full((MEGA // 4,), float(value))


@case(10, "abandoned iterators release their results", needs="torch imap", deadline=60)
def abandoned_iterators(env: Env):
    # 20 times 16 MB under a budget of 64 MB: it would be spent if what nobody wants were kept.
    pool = env.pool(2, memory="64MB")
    for _ in range(20):
        results = pool.imap(tensor_1mb, range(16))
        assert float(next(results)[0]) == 0
        del results
        gc.collect()
    assert float(pool.apply_async(tensor_1mb, (7,)).get(20)[0]) == 7


@case(10, "results that nobody asks for are released", needs="torch", deadline=60)
def unwanted_results(env: Env):
    pool = env.pool(2, memory="64MB")
    for _ in range(30):
        pool.map_async(tensor_1mb, range(8)).wait(20)
    assert float(pool.apply_async(tensor_1mb, (7,)).get(20)[0]) == 7


class Item:
    """Something that can be referred to weakly."""

    def __init__(self, value):
        self.value = value


def value_of(item):
    return item.value


@case(10, "arguments and results are released when their task is over")
def released(env: Env):
    pool = env.pool(2)
    item = Item(5)
    alive = weakref.ref(item)
    result = pool.apply_async(value_of, (item,))
    assert result.get(15) == 5
    del item, result
    assert procs.wait_until(lambda: gc.collect() is not None and alive() is None, 3), "the argument lives on"
    items = [Item(value) for value in range(10)]
    lives = [weakref.ref(item) for item in items]
    assert pool.map(value_of, items) == list(range(10))
    items.clear()
    assert procs.wait_until(lambda: gc.collect() is not None and not any(live() for live in lives), 3), (
        "arguments of map live on"
    )


@case(10, "ten pools, one after the other", deadline=90)
def pools_in_turn(env: Env):
    def one():
        pool = env.adapter.pool(2, env.method)
        assert pool.map(square, range(10)) == [value * value for value in range(10)]
        env.end(pool)

    one()
    gc.collect()
    before = len(procs.family("FAULTS_RUN=" + _run()))
    meter = Meter()
    for _ in range(10 if env.method == "fork" else 4):
        one()
    meter.assert_flat(env, fds=0, threads=0)
    assert procs.wait_until(lambda: len(procs.family("FAULTS_RUN=" + _run())) <= before, 3), "processes grow"


@case(10, "fifty workers lost: what they held is released", needs="torch", methods=("forkserver", "fork"), deadline=60)
def fifty_lost(env: Env):
    from .script import die

    pool = env.pool(2)
    for _ in range(5):
        env.raises(lambda: pool.apply_async(die).get(15))
    meter = Meter()
    for _ in range(50):
        env.raises(lambda: pool.apply_async(die).get(15))
    meter.assert_flat(env, fds=6)


@case(10, "failed tasks do not keep their frames", deadline=60)
def failed_tasks(env: Env):
    pool = env.pool(1)
    pids = env.worker_pids(pool, 1)
    for _ in range(20):
        env.raises(lambda: pool.apply_async(fail_with_weight).get(15), ZeroDivisionError)
    meter = Meter(pids)
    for _ in range(100):
        env.raises(lambda: pool.apply_async(fail_with_weight).get(15), ZeroDivisionError)
    meter.assert_flat(env)


def fail_with_weight():
    weight = bytearray(MEGA)
    weight[::4096] = b"x" * len(weight[::4096])
    return len(weight) / 0


if __name__ == "__main__":
    main()
