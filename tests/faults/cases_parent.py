"""The process that owns the pool: killed, interrupted, ended with a live pool, forked by its user."""

from __future__ import annotations

import code
import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

from . import procs
from .script import SLACK, Env, Role, case, main, mark, nap, role, square

BUSY = 3
# For a child that the user forked to end.
CHILD_DEADLINE = 12.0


def spin_in_c():
    """A task that never returns to the interpreter: it holds the interpreter lock and runs no signal handler."""
    mark("napping")
    data = bytes(100_000_000)
    while True:
        zlib.crc32(data)


def busy_pool(env):
    """A pool whose workers all run something, one of them in C."""
    pool = env.pool(BUSY)
    results = [pool.apply_async(spin_in_c)] + [pool.apply_async(nap, (1000,)) for _ in range(BUSY - 1)]
    env.wait_for("napping", BUSY, 30)
    return pool, results


@role
def busy(env: Env):
    kept = busy_pool(env)
    mark("ready")
    time.sleep(1000)
    del kept


@role
def starting(env: Env):
    mark("ready")
    env.pool(4)
    time.sleep(1000)


def ready(env: Env, name: str) -> Role:
    started = env.role(name)
    if not procs.wait_until(lambda: env.marks("ready") or started.popen.poll() is not None, 40):
        raise AssertionError("the program did not get ready")
    assert env.marks("ready"), f"the program ended: {started.stderr()[-500:]}"
    return started


def dies_by(env: Env, signum):
    started = ready(env, "busy")
    os.kill(started.pid, signum)
    started.wait(5)
    env.note(f"all gone after {started.assert_all_gone():.2f} s")


@case(4, "the parent is SIGKILLed while workers are busy: all gone within 1 s", deadline=60, spawn=True)
def parent_killed(env: Env):
    dies_by(env, signal.SIGKILL)


@case(4, "the parent ends by SIGTERM while workers are busy", deadline=60)
def parent_terminated(env: Env):
    dies_by(env, signal.SIGTERM)


@case(4, "the parent is SIGKILLed while the pool starts", deadline=60, spawn=True)
def parent_killed_starting(env: Env):
    for number, delay in enumerate((0.02, 0.3, 1.0)):
        started = env.role("starting")
        env.wait_for("ready", number + 1)
        procs.wait_until(lambda: started.popen.poll() is not None, delay)
        os.kill(started.pid, signal.SIGKILL)
        started.wait(5)
        started.assert_all_gone()


@role
def leaves_at_once(env: Env):
    kept = busy_pool(env)
    mark("ready")
    os._exit(0)
    del kept


@case(4, "the parent calls `os._exit` while workers are busy", deadline=60)
def parent_exits_at_once(env: Env):
    started = ready(env, "leaves_at_once")
    assert started.wait(5) == 0
    started.assert_all_gone()


KEPT = []


@role
def ends_idle(env: Env):
    KEPT.append(env.pool(2))
    env.worker_pids(KEPT[0])
    mark("ready")


@role
def ends_busy(env: Env):
    KEPT.append(busy_pool(env))
    mark("ready")


@role
def ends_with_error(env: Env):
    KEPT.append(busy_pool(env))
    mark("ready")
    raise RuntimeError("the program failed")


@role
def ends_in_with(env: Env):
    with env.pool(2) as pool:
        pool.apply_async(nap, (1000,))
        env.wait_for("napping")
        mark("ready")
        raise RuntimeError("the program failed")


class Starvation:
    """How long a process's main thread, while this is entered, was ready to run and had no CPU: other tests' doing.

    See proc(5), ``schedstat``. It is read until the process is gone, so the last hundredth of a second may be missing.
    """

    def __init__(self, pid: int) -> None:
        self.seconds = 0.0
        self._path = Path(f"/proc/{pid}/schedstat")
        self._before = self._read()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _read(self) -> float:
        return int(self._path.read_text().split()[1]) / 1e9

    def _watch(self) -> None:
        with contextlib.suppress(OSError, IndexError):  # it is gone
            while not self._over.wait(0.01):
                self.seconds = max(self.seconds, self._read() - self._before)

    def __enter__(self) -> Starvation:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def ends_well(env: Env, name, status, tracebacks, seconds=1.0):
    started = ready(env, name)
    when = env.marks("ready")[0].when
    with Starvation(started.pid) as starved:
        got = started.wait(20)
        took = time.monotonic() - when
    unwound = env.marks("unwound")[0].when - when
    env.note(
        f"the pool ended {unwound:.2f} s later, the interpreter {took:.2f} s, {starved.seconds:.2f} s without a CPU"
    )
    printed = started.stderr()
    assert got == status, f"status {got}: {printed[-300:]}"
    assert printed.count("Traceback (most recent") == tracebacks, printed
    assert not env.is_tpool or "Exception ignored" not in printed, printed
    started.assert_all_gone()
    assert unwound < seconds * SLACK, f"the pool took {unwound:.1f} s to end"
    # Most of it is torch's: an interpreter that has imported it takes 0.7 s to end, without any pool.
    took -= starved.seconds
    assert took < seconds * SLACK, f"the interpreter took {took:.1f} s to end"


@case(4, "the interpreter ends with a live idle pool", deadline=60)
def exit_with_idle_pool(env: Env):
    ends_well(env, "ends_idle", 0, 0)


@case(4, "the interpreter ends with a live busy pool", deadline=60, needs="terminate", spawn=True)
def exit_with_busy_pool(env: Env):
    ends_well(env, "ends_busy", 0, 0)


@case(4, "the interpreter ends by an exception, with a live busy pool: one traceback", deadline=60, needs="terminate")
def exit_by_error(env: Env):
    ends_well(env, "ends_with_error", 1, 1)


@case(4, "an exception leaves the `with` block of a busy pool: one traceback", deadline=60, needs="terminate tpool")
def exit_by_error_in_with(env: Env):
    ends_well(env, "ends_in_with", 1, 1)


# Ctrl-C ------------------------------------------------------------------------------------------------------------


@role
def interrupted(env: Env):
    pool = env.pool(2)
    env.worker_pids(pool)
    mark("ready")
    pool.map(nap, [5] * 8)


@role
def interrupted_with(env: Env):
    with env.pool(2) as pool:
        env.worker_pids(pool)
        mark("ready")
        pool.map(nap, [5] * 8)


def ctrl_c(env: Env, started: Role):
    """As a terminal sends it: to every process of the foreground process group."""
    env.wait_for("napping", 2)
    os.killpg(started.pid, signal.SIGINT)
    return time.monotonic()


def interrupts(env: Env, name: str):
    started = ready(env, name)
    begin = ctrl_c(env, started)
    status = started.wait(15)
    took = time.monotonic() - begin
    printed = started.stderr()
    assert status in (-signal.SIGINT, 130, 1), f"status {status}"
    assert printed.count("Traceback (most recent") == 1, f"{printed.count('Traceback')} tracebacks: {printed[-800:]}"
    assert "KeyboardInterrupt" in printed, printed
    started.assert_all_gone()
    env.note(f"ended after {took:.2f} s")
    assert took < 1 * SLACK, f"took {took:.1f} s"


@case(4, "Ctrl-C in `map` of a script: one traceback, prompt", deadline=60, spawn=True)
def ctrl_c_script(env: Env):
    interrupts(env, "interrupted")


@case(4, "Ctrl-C in `map` inside a `with` block: one traceback, prompt", deadline=60, needs="terminate")
def ctrl_c_with(env: Env):
    interrupts(env, "interrupted_with")


@role
def interrupted_then_used(env: Env):
    pool = env.pool(2)
    env.worker_pids(pool)
    mark("ready")
    try:
        pool.map(nap, [2] * 4)
    except KeyboardInterrupt:
        mark("caught")
    try:
        env.usable(pool)
    except ValueError:  # closed cleanly by the interrupt, which is as good
        mark("ended")
    mark("went-on")
    env.end(pool)


@case(4, "Ctrl-C in `map`, caught: the pool is usable or cleanly ended", deadline=60)
def ctrl_c_caught(env: Env):
    started = ready(env, "interrupted_then_used")
    begin = ctrl_c(env, started)
    assert started.wait(30) == 0, started.stderr()[-500:]
    assert env.marks("caught"), "no KeyboardInterrupt"
    assert env.marks("caught")[0].when - begin < 1.5, "Ctrl-C was not prompt"
    assert env.marks("went-on"), "the program did not go on"
    assert "Traceback" not in started.stderr(), started.stderr()
    started.assert_all_gone()


CELLS = (
    "import faults.script as s, time\ndef slow(x):\n    return s.nap(x)\n",
    "pool = env.pool(2); _ = env.worker_pids(pool); s.mark('ready')\n",
    "try:\n    pool.map(slow, [5] * 4)\nexcept KeyboardInterrupt:\n    s.mark('caught')\n",
    "def again(x):\n    return x + 1\n",
    "assert pool.map(again, [1, 2]) == [2, 3]; s.mark('went-on')\n",
    "env.end(pool)\n",
)


@role
def notebook(env: Env):
    """Cells typed into ``__main__``, as a notebook or the interactive interpreter does."""
    namespace = sys.modules["__main__"].__dict__
    namespace["env"] = env
    console = code.InteractiveInterpreter(namespace)
    for cell in CELLS:
        console.runsource(cell, symbol="exec")


@case(4, "Ctrl-C in a notebook (cells typed into `__main__`)", deadline=60, needs="tpool")
def ctrl_c_notebook(env: Env):
    started = ready(env, "notebook")
    ctrl_c(env, started)
    assert started.wait(30) == 0, started.stderr()[-500:]
    assert env.marks("caught"), f"no KeyboardInterrupt: {started.stderr()[-800:]}"
    assert env.marks("went-on"), f"the pool was not usable: {started.stderr()[-800:]}"
    assert "Traceback" not in started.stderr(), started.stderr()
    started.assert_all_gone()


# The pool is dropped -----------------------------------------------------------------------------------------------


@case(4, "a pool is collected without `close`: its processes go")
def collected(env: Env):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pids = use_and_drop(env)
        for _ in range(3):
            gc.collect()
        gone = procs.wait_until(lambda: not any(map(procs.alive, pids)), 3)
    env.note(", ".join(sorted({warning.category.__name__ for warning in caught})) or "no warning")
    assert gone, f"{sum(map(procs.alive, pids))} of {len(pids)} workers live on"
    if env.is_tpool:
        assert any(warning.category is ResourceWarning for warning in caught), "no ResourceWarning"


def use_and_drop(env):
    pool = env.adapter.pool(2, env.method)
    return env.worker_pids(pool)


@case(4, "a pool is collected while its tasks run, and their results are waited for", needs="tpool")
def collected_busy(env: Env):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pool = env.adapter.pool(1, env.method)
        result = pool.apply_async(nap, (0.2,))
        del pool
        gc.collect()
        try:
            got = result.get(10)  # either its own outcome, or that the pool has ended
        except env.needs_tpool("PoolEndedError"):
            got = None
    env.note("the result arrived" if got else "PoolEndedError")


@case(4, "the thread that made the pool ends: the pool lives", spawn=True)
def maker_thread_ends(env: Env):
    made = []
    thread = threading.Thread(target=lambda: made.append(env.pool(2)))
    thread.start()
    thread.join()
    pids = env.worker_pids(made[0])
    assert env.worker_pids(made[0]) == pids, "the workers died with the thread that made the pool"
    env.usable(made[0])


# fork by the user --------------------------------------------------------------------------------------------------


def wait_child(pid, seconds=CHILD_DEADLINE):
    """The exit status of a child of ours, which must end in time."""
    status = []

    def ended():
        found, raw = os.waitpid(pid, os.WNOHANG)
        if found:
            status.append(os.waitstatus_to_exitcode(raw))
        return found

    if not procs.wait_until(ended, seconds):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError("the forked child did not end")
    return status[0]


def in_child(function):
    """Forks; the child runs this and then ends as Python programs do, exit handlers and all."""
    pid = os.fork()
    if pid == 0:
        import atexit

        status = 1
        try:
            function()
            gc.collect()
            atexit._run_exitfuncs()
            status = 0
        except BaseException as error:
            os.write(2, f"in the forked child: {error!r}\n".encode())
        finally:
            os._exit(status)
    return pid


@case(4, "the user forks while a pool is live: the child's exit harms nobody", spawn=True)
def user_forks(env: Env):
    pool = env.pool(2)
    pids = env.worker_pids(pool)
    slow = pool.apply_async(nap, (0.5,))
    assert wait_child(in_child(lambda: None)) == 0
    assert slow.get(10) == 0.5
    assert env.worker_pids(pool) == pids, "workers were lost"


@case(4, "the user forks a child that drops the pool: nothing happens to the parent's")
def user_forks_and_drops(env: Env):
    kept = [env.pool(2)]
    env._pools.clear()
    pids = env.worker_pids(kept[0])
    status = wait_child(in_child(kept.clear))
    assert status == 0
    assert env.worker_pids(kept[0]) == pids, "workers were lost"
    env.end(kept[0])


@case(4, "a `multiprocessing.Process` of the user's (fork) beside a live pool")
def user_process(env: Env):
    pool = env.pool(2)
    pids = env.worker_pids(pool)
    child = multiprocessing.get_context("fork").Process(target=square, args=(2,))
    child.start()
    child.join(10)
    assert child.exitcode == 0, f"the child ended with {child.exitcode}"
    assert env.worker_pids(pool) == pids, "workers were lost"


@case(4, "using the pool in a forked child is a clear error", needs="terminate", spawn=True)
def pool_in_child(env: Env):
    pool = env.pool(2)
    env.worker_pids(pool)
    kind = env.needs_tpool("PoolEndedError")

    def use():
        for attempt in (lambda: pool.apply(square, (2,)), lambda: pool.map(square, [1, 2])):
            try:
                attempt()
            except kind:
                continue
            raise AssertionError("it ran")

    assert wait_child(in_child(use)) == 0
    env.usable(pool)


@case(4, "ending the pool in a forked child leaves the parent's alone", needs="terminate")
def terminate_in_child(env: Env):
    pool = env.pool(2)
    pids = env.worker_pids(pool)

    def use():
        with contextlib.suppress(env.needs_tpool("PoolEndedError")):  # refusing is as good as doing nothing
            pool.terminate()
            pool.join()

    wait_child(in_child(use))
    assert env.worker_pids(pool) == pids, "workers were lost"


@case(4, "tensors a forked child inherited stay intact while the parent drops and reuses memory", needs="torch")
def tensors_in_child(env: Env):
    import torch

    pool = env.pool(2, memory="256MB")
    received = [pool.apply(full, (1_000_000, value)) for value in range(4)]
    sent = [torch.full((1_000_000,), float(value)) for value in range(4, 8)]
    assert [pool.apply(first, (tensor,)) for tensor in sent] == [4.0, 5.0, 6.0, 7.0]
    go, told = os.pipe(), []

    def look():
        os.read(go[0], 1)
        for value, tensor in enumerate(received + sent):
            right = int((tensor.numpy() == value).sum())  # by numpy: OpenMP, used before a fork, hangs after it
            assert right == 1_000_000, f"tensor {value}: only {right} elements are intact"

    child = in_child(look)
    received.clear()
    sent.clear()
    gc.collect()
    for value in range(20):
        told.append(pool.apply(full, (1_000_000, 100 + value)))
        told[:-4] = []
        pool.apply(first, (torch.full((1_000_000,), 200.0 + value),))
    os.write(go[1], b"x")
    status = wait_child(child)
    os.close(go[0])
    os.close(go[1])
    assert status == 0, "the child saw other data"


def full(count, value):
    import torch

    return torch.full((count,), float(value))


def first(tensor):
    return float(tensor[0])


@case(4, "fork while the handler thread works: 20 children", deadline=60)
def fork_under_load(env: Env):
    pool = env.pool(2)
    env.worker_pids(pool)
    stop, failures = threading.Event(), []

    def load():
        try:
            while not stop.is_set():
                assert pool.map(square, range(200)) == [value * value for value in range(200)]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        statuses = [wait_child(in_child(lambda: None)) for _ in range(20)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    assert statuses == [0] * 20, statuses


if __name__ == "__main__":
    main()
