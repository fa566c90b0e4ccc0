"""A worker goes away while something large is on its way to or from it, or after its tensors were received."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

from .script import Env, case, die, main, mark, refuse_timeout

BIG = 100_000_000


class DiesWhenRead:
    """Kills whoever unpickles it, which happens after everything that was packed before it."""

    def __reduce__(self):
        return die, ()


class DiesWhenPacked:
    def __init__(self, home):
        self.home = home

    def __reduce__(self):
        if os.getpid() != self.home:
            die()
        return DiesWhenPacked, (self.home,)


def size(value, *_):
    return len(value)


def big(nbytes=BIG, last=None):
    return bytes(nbytes), last


def announce_size(value):
    mark("running")
    return len(value)


def announce_big(nbytes):
    mark("running")
    return bytes(nbytes)


@case(1, "killed while it unpickles a 100 MB argument")
def dies_reading_argument(env: Env):
    pool = env.shared()
    env.lost(lambda: pool.apply_async(size, (bytes(BIG), DiesWhenRead())).get(30), -signal.SIGKILL)
    env.usable(pool)


@case(1, "killed while it pickles a 100 MB result")
def dies_packing_result(env: Env):
    pool = env.shared()
    env.lost(lambda: pool.apply_async(big, (BIG, DiesWhenPacked(os.getpid()))).get(30), -signal.SIGKILL)
    env.usable(pool)


def kill_soon(pid, delay):
    def act():
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def lost_or_right(env, result, expected):
    try:
        got = result.get(30)
    except env.needs_tpool("WorkerLostError") as error:
        refuse_timeout(error, "nothing came")
        return 1
    assert got == expected, "a wrong result"
    return 0


@case(1, "SIGKILL at random moments of the transfer of a 100 MB argument")
def kill_during_argument(env: Env):
    pool = env.pool(1)
    generator = random.Random(4)
    lost = 0
    for _ in range(6 if env.method != "spawn" else 2):
        pid = pool.apply_async(os.getpid).get(20)
        killer = kill_soon(pid, generator.uniform(0, 0.2))
        lost += lost_or_right(env, pool.apply_async(announce_size, (bytes(BIG),)), BIG)
        killer.join()
    env.note(f"{lost} lost")
    env.usable(pool)


@case(1, "SIGKILL at random moments of the transfer of a 100 MB result")
def kill_during_result(env: Env):
    pool = env.pool(1)
    generator = random.Random(5)
    lost = 0
    for number in range(6 if env.method != "spawn" else 2):
        result = pool.apply_async(announce_big, (BIG,))
        pid = env.wait_for("running", number + 1)[-1].pid
        killer = kill_soon(pid, generator.uniform(0, 0.2))
        lost += lost_or_right(env, result, bytes(BIG))
        killer.join()
    env.note(f"{lost} lost")
    env.usable(pool)


def ones(count):
    import torch

    return torch.ones(count), os.getpid()


def doubled(tensor):
    return tensor * 2


@case(1, "a worker dies after its tensor was received: the tensor stays intact", needs="torch")
def tensor_outlives_worker(env: Env):
    pool = env.pool(1)
    tensor, pid = pool.apply(ones, (1_000_000,))
    os.kill(pid, signal.SIGKILL)
    others = [pool.apply_async(ones, (1_000_000,)).get(20)[0].mul_(3) for _ in range(4)]
    assert bool((tensor == 1).all()), "the successor of the dead worker wrote over a tensor that it had sent"
    assert all(bool((other == 3).all()) for other in others)
    assert bool((pool.apply_async(doubled, (tensor,)).get(20) == 2).all())


@case(1, "recycled workers that return tensors: `maxtasksperchild=1`", needs="torch maxtasks", spawn=True)
def recycled_tensors(env: Env):
    pool = env.pool(1, maxtasksperchild=1)
    count = 8 if env.method != "spawn" else 3
    kept = [tensor for tensor, _ in pool.map(ones, [1000] * count, chunksize=1)]
    assert all(bool((tensor == 1).all()) for tensor in kept)


@case(1, "a worker dies with tensors of the caller's: their memory can be used again", needs="torch")
def argument_of_the_dead(env: Env):
    import torch

    # 40 MB each under 128 MB: the leases that the dead held must end, or the fourth finds no room.
    pool = env.pool(1, memory="128MB")
    for _ in range(6 if env.method != "spawn" else 3):
        env.lost(lambda: pool.apply_async(die_with, (torch.ones(10_000_000),)).get(30), -signal.SIGKILL)
    env.usable(pool)


def die_with(tensor):
    tensor.sum()
    die()


if __name__ == "__main__":
    main()
