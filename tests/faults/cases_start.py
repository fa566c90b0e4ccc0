"""A worker cannot start: the caller is told why, after a handful of attempts and never by hanging."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time

from . import procs
from .cgroups import make_cgroup, remove_cgroups
from .script import Env, NotPossible, case, die, main, mark, nap, refuse_timeout, role, square, wait_for_marks

# The most starts of two workers' initializer that count as "a handful of attempts".
HANDFUL = 10


def initializer_raises():
    mark("attempt")
    raise ValueError("no luck today")


def initializer_exits():
    mark("attempt")
    os._exit(7)


def initializer_killed():
    mark("attempt")
    os.kill(os.getpid(), signal.SIGKILL)


def initializer_system_exit():
    mark("attempt")
    sys.exit("no reason")


def initializer_hangs():
    mark("attempt")
    time.sleep(1000)


def first_failure(env: Env, initializer, processes=2, kinds=Exception):
    """Makes such a pool and uses it; gives the exception, from wherever it comes, and counts the attempts."""

    def make_and_use():
        pool = env.pool(processes, initializer=initializer)
        return pool.apply_async(square, (3,)).get(25)

    error = env.raises(make_and_use, kinds)
    # Whoever starts workers for ever goes on doing so; give it a moment in which to show that.
    procs.wait_until(lambda: len(env.marks("attempt")) > HANDFUL, 0.5)
    attempts = len(env.marks("attempt"))
    env.note(f"{attempts} attempts, {type(error).__name__}")
    assert attempts <= HANDFUL, f"{attempts} attempts"
    return error


@case(2, "the initializer raises: the caller gets that exception, with its traceback", needs="initializer", spawn=True)
def initializer_that_raises(env: Env):
    error = first_failure(env, initializer_raises)
    if env.is_tpool:
        assert isinstance(error, ValueError), repr(error)
        assert "no luck today" in str(error), repr(error)
        assert "initializer_raises" in str(error.__cause__), "the remote traceback is missing"


@case(2, "the initializer calls `os._exit`", needs="initializer", spawn=True)
def initializer_that_exits(env: Env):
    error = first_failure(env, initializer_exits)
    assert isinstance(error, env.needs_tpool("WorkerStartError")), repr(error)
    assert not env.is_tpool or "7" in str(error), str(error)


@case(2, "the initializer is killed", needs="initializer")
def initializer_that_is_killed(env: Env):
    error = first_failure(env, initializer_killed)
    assert isinstance(error, env.needs_tpool("WorkerStartError")), repr(error)


@case(2, "the initializer raises `SystemExit`", needs="initializer")
def initializer_that_leaves(env: Env):
    first_failure(env, initializer_system_exit, kinds=BaseException)


@case(2, "the initializer cannot be unpickled", needs="initializer", methods=("forkserver", "spawn"))
def initializer_that_cannot_be_read(env: Env):
    error = first_failure(env, UnreadableFunction())
    assert not env.is_tpool or "cannot be read" in f"{error} {error.__cause__}", repr(error)


class UnreadableFunction:
    def __reduce__(self):
        return fail_to_read, (os.getpid(),)

    def __call__(self):
        raise AssertionError("it was never meant to be called")


def fail_to_read(home):
    if os.getpid() == home:
        return UnreadableFunction()
    mark("attempt")
    raise ValueError("this cannot be read")


@case(2, "all pending work hears of the initializer's failure, `map` and `imap` too", needs="initializer imap")
def all_hear_of_failed_start(env: Env):
    try:
        pool = env.pool(2, initializer=initializer_raises)
        waits = [
            lambda: pool.map(square, range(100)),
            lambda: list(pool.imap(square, range(100))),
            lambda: pool.apply(square, (1,)),
        ]
    except ValueError:
        return  # told at once
    for wait in waits:
        env.raises(wait)


@case(2, "the initializer hangs: `terminate` ends it, waiters are told", needs="initializer terminate", spawn=True)
def initializer_that_hangs(env: Env):
    pool = env.pool(2, initializer=initializer_hangs)
    result = pool.apply_async(square, (1,))
    env.wait_for("attempt")
    with env.within(1.0, "terminate and join"):
        pool.terminate()
        pool.join()
    env.raises(lambda: result.get(5), env.needs_tpool("PoolEndedError"))


def initializer_fails_later():
    mark("attempt")
    mark("later")
    if len(wait_for_marks("later", 1)) > 2:
        raise ValueError("no luck any more")


@case(2, "replacements of a dead worker cannot start: no hang, no endless respawn", needs="initializer")
def replacement_that_fails(env: Env):
    pool = env.pool(2, initializer=initializer_fails_later)
    env.worker_pids(pool)
    lost = pool.apply_async(die)
    env.raises(lambda: lost.get(20))
    ends = []
    for value in range(10):
        try:
            ends.append(pool.apply_async(square, (value,)).get(20))
        except Exception as error:
            refuse_timeout(error, f"task {value} has no outcome")
            ends.append(type(error).__name__)
    procs.wait_until(lambda: len(env.marks("attempt")) > HANDFUL + 2, 0.5)
    env.note(f"then {ends[-1]}; {len(env.marks('attempt'))} attempts")
    assert len(env.marks("attempt")) <= HANDFUL + 2, f"{len(env.marks('attempt'))} attempts"


@case(2, "what the initializer holds does not pickle", needs="initializer", methods=("forkserver", "spawn"))
def initializer_that_does_not_pickle(env: Env):
    first_failure(env, square_lock)


class _Lock:
    def __reduce__(self):
        raise TypeError("_Lock does not pickle")


class _SquareLock:
    def __init__(self):
        self.lock = _Lock()

    def __call__(self):
        mark("attempt")


square_lock = _SquareLock()


# A process limit ---------------------------------------------------------------------------------------------------


def limit_processes(pids, extra):
    """Lets these processes have no more than so many more between them: by cgroup for root, whom no rlimit binds."""
    if os.getuid() == 0:
        directory = make_cgroup("pids", "pids.max")
        for pid in pids:
            (directory / "cgroup.procs").write_text(str(pid))
        used = int((directory / "pids.current").read_text())
        (directory / "pids.max").write_text(str(used + extra))
        return
    used = sum(procs.thread_count(pid) for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _mine(pid))
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_NPROC, (used + extra, used + extra))


def _mine(pid):
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.getuid()
    except FileNotFoundError:
        return False


def report_outcome(get):
    try:
        value = get()
    except Exception as error:
        mark("outcome", type(error).__name__)
    else:
        mark("outcome", value)


@role
def without_processes(env: Env):
    """No process may be started at all."""
    if env.is_tpool:
        import tpool  # noqa: F401  # its threads come before the limit
    limit_processes([os.getpid()], 0)
    mark("limited")
    report_outcome(lambda: env.pool(2).apply_async(square, (3,)).get(15))


@role
def without_replacement(env: Env):
    """Workers run, but a dead one cannot be replaced."""
    pool = env.pool(2)
    env.worker_pids(pool)
    tag = f"FAULTS_TAG={os.environ['FAULTS_TAG']}"
    limit_processes([found.pid for found in procs.family(tag)], -1)
    mark("limited")
    report_outcome(lambda: pool.apply_async(die).get(15))
    for value in range(4):
        report_outcome(lambda value=value: pool.apply_async(square, (value,)).get(15))
    env.end(pool)


def play_limited(env: Env, name, outcomes):
    started = env.role(name)
    procs.wait_until(lambda: started.popen.poll() is not None or env.marks("limited"), 20)
    if not env.marks("limited"):
        raise NotPossible(f"no limit of processes can be set: {started.stderr()[-200:]}")
    started.wait(40)
    said = [one.value for one in env.marks("outcome")]
    env.note(", ".join(said))
    assert len(said) == outcomes, f"outcomes {said}; {started.stderr()[-300:]}"
    assert "TimeoutError" not in said, said
    started.assert_all_gone()
    remove_cgroups("pids")
    return said


@case(2, "no process can be started (process limit): an error, no hang", deadline=60)
def cannot_fork(env: Env):
    said = play_limited(env, "without_processes", 1)
    assert said != ["9"], "the limit did not hold"


@case(2, "a dead worker cannot be replaced (process limit): no hang", deadline=60, methods=("fork", "forkserver"))
def cannot_fork_again(env: Env):
    play_limited(env, "without_replacement", 5)


@case(2, "a worker is killed while it starts, again and again, and then is let live", needs="initializer")
def killed_twice_at_start(env: Env):
    # A start that fails now and then is not a pool that cannot start.
    pool = env.pool(1, initializer=initializer_luckless_once)
    result = pool.apply_async(nap, (0.01,))
    assert result.get(25) == 0.01


def initializer_luckless_once():
    mark("luckless")
    if len(wait_for_marks("luckless", 1)) == 1:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
