"""A worker goes away while it runs a task: exactly that task fails, at once, and the pool goes on."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

from . import procs
from .cgroups import make_cgroup, remove_cgroups
from .script import Env, NotPossible, case, die, main, mark, meet, nap, square

KILL = -signal.SIGKILL
CGROUP_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()


def tell(value):
    mark("ran", value)
    return value


def tell_or_die(value):
    mark("ran", value)
    if value % 10 == 7:
        die()
    return value


def assert_ran_once(env, count):
    ran = [int(one.value) for one in env.marks("ran")]
    assert sorted(ran) == list(range(count)), f"of {count} tasks {len(set(ran))} ran, {len(ran)} times in all"


@case(1, "SIGKILL in a task of `apply`", spawn=True)
def kill_apply(env: Env):
    pool = env.shared()
    env.lost(lambda: pool.apply(die), KILL, "die")
    env.usable(pool)


@case(1, "SIGKILL in a task of `apply_async`; its neighbours finish", spawn=True)
def kill_among_others(env: Env):
    pool = env.shared()
    results = [pool.apply_async(tell_or_die, (value,)) for value in range(30)]
    outcomes = []
    for result in results:
        try:
            outcomes.append(result.get(20))
        except Exception as error:
            outcomes.append(type(error).__name__)
    wrong = [pair for pair in enumerate(outcomes) if pair[0] % 10 != 7 and pair[0] != pair[1]]
    assert not wrong, f"{len(wrong)} tasks that nobody killed failed, first {wrong[0]}"
    assert all(isinstance(outcomes[lost], str) for lost in (7, 17, 27)), outcomes
    assert_ran_once(env, 30)
    env.usable(pool)


@case(1, "SIGKILL in a task of `map`")
def kill_map(env: Env):
    pool = env.shared()
    # map raises its first failure when all its items have their outcomes; under spawn the other worker may still be
    # importing torch.
    slowly = env.method == "spawn"
    env.lost(lambda: pool.map(tell_or_die, range(10), chunksize=1), KILL, "tell_or_die", dies_slowly=slowly)
    env.usable(pool)
    procs.wait_until(lambda: len(env.marks("ran")) >= 10, 5)
    assert_ran_once(env, 10)


@case(1, "SIGKILL in a task of `map` with large chunks")
def kill_map_chunks(env: Env):
    pool = env.shared()
    env.lost(lambda: pool.map(tell_or_die, range(40), chunksize=20), KILL)
    env.usable(pool)
    ran = [one.value for one in env.marks("ran")]
    assert len(ran) == len(set(ran)), "an item ran twice"


@case(1, "SIGKILL in tasks of `imap`: the others arrive in order", needs="imap")
def kill_imap(env: Env):
    pool = env.shared()
    results = pool.imap(tell_or_die, range(20))
    for value in range(20):
        if value % 10 == 7:
            env.lost(lambda: next(results), KILL)
        else:
            got = next(results)
            assert got == value, f"{got} instead of {value}"
    env.raises(lambda: next(results), StopIteration)
    assert_ran_once(env, 20)
    env.usable(pool)


@case(1, "SIGKILL in tasks of `imap_unordered`", needs="imap")
def kill_imap_unordered(env: Env):
    pool = env.shared()
    results = pool.imap_unordered(tell_or_die, range(20))
    got, lost = [], 0
    while True:
        try:
            got.append(next(results))
        except StopIteration:
            break
        except Exception:
            lost += 1
            assert lost <= 2, "more tasks were lost than killed"
    assert sorted(got) == [value for value in range(20) if value % 10 != 7], sorted(got)
    assert lost == 2, f"{lost} losses"
    assert_ran_once(env, 20)
    env.usable(pool)


@case(1, "SIGKILL from outside while a task runs", spawn=True)
def kill_from_outside(env: Env):
    pool = env.shared()
    result = pool.apply_async(nap, (60,))
    victim = env.wait_for("napping")[0].pid
    mark("dying")  # the clock of the detection; who dies is the worker
    begin = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    error = env.raises(lambda: result.get(20), env.needs_tpool("WorkerLostError"))
    env.detection = time.monotonic() - begin
    assert not env.is_tpool or (error.pid, error.exitcode) == (victim, KILL), repr(error)
    env.usable(pool)


@case(1, "SIGKILL of all idle workers, then new tasks: none is lost", spawn=True)
def kill_idle(env: Env):
    pool = env.shared()
    for pid in env.worker_pids(pool):
        os.kill(pid, signal.SIGKILL)
    env.usable(pool)
    env.worker_pids(pool)  # there are two again


@case(1, "SIGKILL of idle workers, again and again, while tasks are submitted")
def kill_idle_race(env: Env):
    # The race: a task is on its way to a worker that died a moment ago. It was never started, so it is not lost.
    pool = env.pool(2)
    for _ in range(10 if env.method != "spawn" else 2):
        pids = env.worker_pids(pool)
        os.kill(pids[0], signal.SIGKILL)
        results = [pool.apply_async(square, (value,)) for value in range(4)]
        got = [result.get(20) for result in results]
        assert got == [0, 1, 4, 9], got


def leave(status):
    mark("dying")
    os._exit(status)


@case(1, "`os._exit(3)` in a task")
def exit_3(env: Env):
    pool = env.shared()
    env.lost(lambda: pool.apply(leave, (3,)), 3, "leave")
    env.usable(pool)


@case(1, "`os._exit(0)` in a task")
def exit_0(env: Env):
    pool = env.shared()
    env.lost(lambda: pool.apply(leave, (0,)), 0, "leave")
    env.usable(pool)


class Stop(BaseException):
    pass


def throw(kind, *args):
    raise kind(*args)


@case(1, "`SystemExit` in a task is that task's exception", spawn=True)
def system_exit(env: Env):
    pool = env.shared()
    error = env.raises(lambda: pool.apply(throw, (SystemExit, 5)), SystemExit)
    assert error.code == 5, repr(error)
    env.usable(pool)


@case(1, "`KeyboardInterrupt` in a task is that task's exception")
def keyboard_interrupt(env: Env):
    pool = env.shared()
    env.raises(lambda: pool.apply_async(throw, (KeyboardInterrupt,)).get(10), KeyboardInterrupt)
    env.usable(pool)


@case(1, "`GeneratorExit`, and a `BaseException` of the user's")
def base_exception(env: Env):
    pool = env.shared()
    env.raises(lambda: pool.apply_async(throw, (GeneratorExit,)).get(10), GeneratorExit)
    error = env.raises(lambda: pool.apply_async(throw, (Stop, "enough")).get(10), Stop)
    assert error.args == ("enough",), repr(error)
    env.usable(pool)


@case(1, "`SystemExit` in `imap`: only that item", needs="imap")
def system_exit_imap(env: Env):
    pool = env.shared()
    results = pool.imap(exit_at_3, range(6))
    got = []
    for _ in range(6):
        try:
            got.append(next(results))
        except SystemExit as error:
            got.append(f"exit {error.code}")
    assert got == [0, 1, 2, "exit 3", 4, 5], got
    env.usable(pool)


def exit_at_3(value):
    if value == 3:
        sys.exit(value)
    return value


def segfault():
    mark("dying")
    ctypes.string_at(0)


def abort():
    mark("dying")
    os.abort()


def overflow_stack():
    # Through C at every step, so that it is the C stack that runs out where the interpreter does not watch it.
    sys.setrecursionlimit(10**9)
    mark("dying")

    def deeper(_=None):
        return sorted([0, 1], key=deeper)

    deeper()


@case(1, "segmentation fault", spawn=True)
def segmentation_fault(env: Env):
    pool = env.shared()
    env.lost(lambda: pool.apply(segfault), -signal.SIGSEGV, "segfault")
    env.usable(pool)


@case(1, "abort", prints=True)
def aborted(env: Env):
    pool = env.shared()
    env.lost(lambda: pool.apply(abort), -signal.SIGABRT, "abort")
    env.usable(pool)


@case(1, "stack overflow", prints=True)
def stack_overflow(env: Env):
    pool = env.shared()
    resource_limit = resource.getrlimit(resource.RLIMIT_STACK)
    env.note(f"stack limit {resource_limit[0]}")
    error = env.raises(lambda: pool.apply_async(overflow_stack).get(20))
    if env.is_tpool and not isinstance(error, RecursionError):  # newer interpreters watch the C stack themselves
        assert isinstance(error, env.needs_tpool("WorkerLostError")), repr(error)
        assert error.exitcode == -signal.SIGSEGV, repr(error)
    env.usable(pool)


@case(1, "SIGSTOP, others go on, SIGCONT: its result arrives")
def stop_and_continue(env: Env):
    pool = env.shared()
    result = pool.apply_async(nap, (0.3,))
    victim = env.wait_for("napping")[0].pid
    os.kill(victim, signal.SIGSTOP)
    try:
        others = [pool.apply_async(square, (value,)) for value in range(10)]
        got = [other.get(10) for other in others]
    finally:
        os.kill(victim, signal.SIGCONT)
    assert got == [value * value for value in range(10)], got
    assert result.get(10) == 0.3
    env.usable(pool)


@case(1, "SIGSTOP of a worker, then SIGKILL of it")
def stop_and_kill(env: Env):
    pool = env.shared()
    result = pool.apply_async(nap, (60,))
    victim = env.wait_for("napping")[0].pid
    os.kill(victim, signal.SIGSTOP)
    os.kill(victim, signal.SIGKILL)
    env.raises(lambda: result.get(10), env.needs_tpool("WorkerLostError"))
    env.usable(pool)


def eat(nbytes):
    return len(bytearray(nbytes))


def eat_limited(nbytes):
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes // 4, before[1]))
    try:
        return eat(nbytes)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@case(8, "allocate until refused (rlimit): `MemoryError` is that task's exception")
def out_of_memory_rlimit(env: Env):
    pool = env.shared()
    env.raises(lambda: pool.apply_async(eat_limited, (1 << 30,)).get(20), MemoryError)
    env.usable(pool)


def eat_in_cgroup(directory):
    (Path(directory) / "cgroup.procs").write_text(str(os.getpid()))
    mark("dying")
    return eat(256 << 20)


@case(1, "killed by the kernel for want of memory (cgroup)")
def out_of_memory_kill(env: Env):
    directory = make_cgroup("memory", "memory.max" if CGROUP_2 else "memory.limit_in_bytes")
    (directory / ("memory.max" if CGROUP_2 else "memory.limit_in_bytes")).write_text(str(64 << 20))
    try:
        pool = env.shared()
        try:
            env.lost(lambda: pool.apply(eat_in_cgroup, (str(directory),)), KILL, dies_slowly=True)
        except AssertionError as error:
            if "returned" in str(error):
                raise NotPossible("the cgroup does not limit memory here") from error
            raise
        env.usable(pool)
    finally:
        procs.kill(
            [found for pid in (directory / "cgroup.procs").read_text().split() if (found := procs.process(int(pid)))]
        )
        procs.wait_until(lambda: not (directory / "cgroup.procs").read_text(), 5)
        remove_cgroups("memory")


@case(1, "tasks sent ahead of a dying one start elsewhere, once", spawn=True)
def sent_ahead(env: Env):
    # Learn first that tasks are short, so that many of them travel together; then one of them kills its worker.
    pool = env.pool(1)
    assert pool.map(square, range(200)) == [value * value for value in range(200)]
    results = [pool.apply_async(tell_or_die if value == 7 else tell, (value,)) for value in range(40)]
    for value, result in enumerate(results):
        if value == 7:
            env.lost(lambda result=result: result.get(20), KILL)
        else:
            got = result.get(20)
            assert got == value, f"{got} instead of {value}"
    assert_ran_once(env, 40)


@case(1, "results that were finished before the death are delivered")
def finished_before(env: Env):
    pool = env.pool(1)
    env.usable(pool)
    for _ in range(5):
        done = [pool.apply_async(square, (value,)) for value in range(20)]
        lost = pool.apply_async(die)
        got = [result.get(20) for result in done]
        assert got == [value * value for value in range(20)], got
        env.raises(lambda lost=lost: lost.get(20), env.needs_tpool("WorkerLostError"))


@case(1, "killed between two tasks, after the result was written: nothing is lost")
def kill_after_result(env: Env):
    pool = env.pool(1)
    for _ in range(10 if env.method != "spawn" else 2):
        pid = pool.apply_async(os.getpid).get(20)
        os.kill(pid, signal.SIGKILL)  # it has answered, so it holds no task
        other = pool.apply_async(os.getpid).get(20)
        assert other != pid


@case(1, "tasks that wait for each other: a barrier over `map(chunksize=1)` of as many workers")
def barrier(env: Env):
    pool = env.pool(4)
    assert len(set(pool.map(meet_4, ["first"] * 4, chunksize=1))) == 4
    # Having learned that tasks take microseconds must not put four of these into one message.
    pool.map(square, range(2000))
    assert len(set(pool.map(meet_4, ["second"] * 4, chunksize=1))) == 4


def meet_4(kind):
    return meet(kind, 4)


@case(1, "a long task does not hold back short ones")
def long_and_short(env: Env):
    pool = env.pool(2)
    pool.map(square, range(1000))
    long = pool.apply_async(nap, (3,))
    env.wait_for("napping")
    with env.within(1.0, "20 short tasks beside a long one"):
        results = [pool.apply_async(nap, (0.001,)) for _ in range(20)]
        for result in results:
            result.get(10)
        assert not long.ready(), "the long task ended first"
    long.get(20)


@case(1, "time to detection, median of seven kills")
def detection_time(env: Env):
    pool = env.pool(2)
    env.worker_pids(pool)
    seen = []
    for _ in range(7):
        env.lost(lambda: pool.apply_async(die).get(20), KILL)
        seen.append(env.detection)
        env.usable(pool)
    seen.sort()
    env.detection = seen[3]
    env.note(f"{seen[0] * 1000:.1f} to {seen[-1] * 1000:.1f} ms")
    assert seen[0] < 0.05, f"the quickest of seven kills was noticed after {seen[0]:.3f} s"


@case(1, "a batch of kills: every worker dies at the same time")
def kill_all_at_once(env: Env):
    pool = env.pool(4)
    pids = env.worker_pids(pool, 4)
    results = [pool.apply_async(nap, (60,)) for _ in pids]
    env.wait_for("napping", len(pids))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for result in results:
        env.raises(lambda result=result: result.get(20), env.needs_tpool("WorkerLostError"))
    env.usable(pool)


if __name__ == "__main__":
    main()
