"""The process that workers are forked from dies: running workers end, a new one is made, the pool goes on.

Peers with a fork server of their own play the same cases.
"""

from __future__ import annotations

import os
import signal

from . import procs
from .script import Env, NotPossible, case, main, nap, square


def zygote_of(env: Env, pids):
    """The parent of the workers, which is not us."""
    parents = {found.parent for pid in pids if (found := procs.process(pid))}
    assert len(parents) == 1, f"workers {pids} have parents {parents}"
    (parent,) = parents
    if parent == os.getpid():
        raise NotPossible("workers are children of the caller")
    return parent


def kill_zygote(env: Env, pids):
    """Kills it and waits for its end and its workers', which until then could still take a task and lose it."""
    zygote = zygote_of(env, pids)
    os.kill(zygote, signal.SIGKILL)
    gone = [zygote, *pids] if env.is_tpool else [zygote]  # elsewhere orphans live on
    assert procs.wait_until(lambda: not any(map(procs.alive, gone)), 3), "old workers live on"


@case(5, "the zygote is killed while workers are idle: new tasks run", methods=("forkserver",))
def zygote_killed_idle(env: Env):
    pool = env.pool(2)
    kill_zygote(env, env.worker_pids(pool))
    env.usable(pool)
    env.worker_pids(pool)


@case(5, "the zygote is killed while tasks run: they say so, the pool goes on", methods=("forkserver",))
def zygote_killed_busy(env: Env):
    pool = env.pool(2)
    pids = env.worker_pids(pool)
    results = [pool.apply_async(nap, (30,)) for _ in pids]
    queued = [pool.apply_async(square, (value,)) for value in range(10)]
    env.wait_for("napping", 2)
    os.kill(zygote_of(env, pids), signal.SIGKILL)
    for result in results:
        error = env.raises(lambda result=result: result.get(20), env.needs_tpool("WorkerLostError"))
        assert not env.is_tpool or error.pid in pids, repr(error)
    got = [result.get(20) for result in queued]
    assert got == [value * value for value in range(10)], "tasks that had not started were lost"
    env.usable(pool)


@case(5, "the zygote is killed again and again", methods=("forkserver",), deadline=60)
def zygote_killed_often(env: Env):
    pool = env.pool(2)
    for _ in range(3):
        kill_zygote(env, env.worker_pids(pool))
        env.usable(pool)


@case(5, "the zygote and a worker are killed at the same time", methods=("forkserver",))
def zygote_and_worker_killed(env: Env):
    pool = env.pool(2)
    pids = env.worker_pids(pool)
    os.kill(pids[0], signal.SIGKILL)
    kill_zygote(env, pids[1:])
    env.usable(pool)


@case(5, "the zygote is stopped (SIGSTOP): `terminate` ends the pool", methods=("forkserver",), needs="terminate")
def zygote_stopped(env: Env):
    pool = env.pool(2)
    pids = env.worker_pids(pool)
    pool.apply_async(nap, (1000,))
    env.wait_for("napping")
    zygote = zygote_of(env, pids)
    os.kill(zygote, signal.SIGSTOP)
    try:
        with env.within(3.0, "terminate and join"):
            pool.terminate()
            pool.join()
        if env.is_tpool:
            assert procs.wait_until(lambda: not any(map(procs.alive, pids)), 3), "workers live on"
    finally:
        if procs.alive(zygote):
            os.kill(zygote, signal.SIGCONT)


if __name__ == "__main__":
    main()
