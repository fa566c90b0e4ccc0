"""Tasks that misuse their process: at worst that worker is lost, never another task, never the pool."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path

from . import procs
from .script import Env, case, main, mark, nap, refuse_timeout, square


def own_outcome(env: Env, pool, task, *args, seconds=15):
    """This task has some outcome of its own, its neighbours have theirs, and the pool goes on."""
    before = [pool.apply_async(square, (value,)) for value in range(5)]
    result = pool.apply_async(task, args)
    after = [pool.apply_async(square, (value,)) for value in range(5)]
    try:
        outcome = result.get(seconds)
    except BaseException as error:
        refuse_timeout(error)
        outcome = error
    assert [one.get(15) for one in before + after] == [0, 1, 4, 9, 16] * 2, "a neighbour was harmed"
    env.usable(pool)
    env.note(f"outcome {outcome if isinstance(outcome, int | str | None) else type(outcome).__name__}")
    return outcome


def close_stdout():
    sys.stdout.close()
    sys.stderr.close()
    print("into the void")


def no_streams():
    sys.stdout = sys.stderr = sys.stdin = None
    print("nowhere")
    return "done"


def close_standard_fds():
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            os.close(fd)
    return "done"


@case(8, "print to closed streams", prints=True)
def closed_streams(env: Env):
    pool = env.pool(2)
    outcome = own_outcome(env, pool, close_stdout)
    assert isinstance(outcome, ValueError), repr(outcome)


@case(8, "streams set to None")
def none_streams(env: Env):
    assert own_outcome(env, env.pool(2), no_streams) == "done"


@case(8, "descriptors 0, 1 and 2 closed; later tasks open files into their places", prints=True)
def closed_standard_descriptors(env: Env):
    pool = env.pool(1)
    assert own_outcome(env, pool, close_standard_fds) == "done"
    assert own_outcome(env, pool, open_and_write) == "done"


def open_and_write():
    files = [open(os.devnull, "wb") for _ in range(3)]  # noqa: SIM115  # all three open at a time
    for file in files:
        file.write(b"x" * 1000)
        file.close()
    return "done"


def garbage_out():
    for fd in (1, 2):
        os.write(fd, os.urandom(100_000))
    return "done"


@case(8, "garbage written to descriptors 1 and 2", prints=True)
def garbage_on_terminal(env: Env):
    assert own_outcome(env, env.pool(2), garbage_out) == "done"


def close_all():
    mark("dying")
    os.closerange(3, 256)
    return "done"


def close_all_and_sleep():
    os.closerange(3, 256)
    time.sleep(1000)


@case(8, "`os.closerange(3, 256)`: that worker is lost, no other", prints=True, spawn=True)
def closed_descriptors(env: Env):
    outcome = own_outcome(env, env.pool(2), close_all)
    if env.is_tpool and outcome != "done":
        assert isinstance(outcome, env.needs_tpool("WorkerLostError")), repr(outcome)


@case(8, "`os.closerange(3, 256)`, then it sleeps: noticed all the same", prints=True)
def closed_descriptors_asleep(env: Env):
    outcome = own_outcome(env, env.pool(2), close_all_and_sleep)
    assert isinstance(outcome, env.needs_tpool("WorkerLostError")), repr(outcome)


def garbage_in():
    """Into every socket and pipe that the worker has, so into its channel too."""
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            mode = os.fstat(fd).st_mode
            if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
                os.set_blocking(fd, False)
                os.write(fd, os.urandom(4096))
    return "done"


def half_a_frame():
    for fd in range(3, 64):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as channel:
            channel.send(b"\x7f\xff\xff\xff", socket.MSG_DONTWAIT)
    time.sleep(1000)


@case(8, "garbage written into the worker's own channel", needs="tpool", prints=True)
def garbage_in_channel(env: Env):
    outcome = own_outcome(env, env.pool(2), garbage_in)
    if outcome != "done":
        kinds = (env.needs_tpool("WorkerLostError"), env.needs_tpool("ProtocolError"))
        assert isinstance(outcome, kinds), repr(outcome)


@case(8, "half a frame written into the worker's own channel", needs="tpool", prints=True)
def half_a_frame_in_channel(env: Env):
    pool = env.pool(2)
    result = pool.apply_async(half_a_frame)
    env.usable(pool)
    with env.within(1.0, "terminate and join"):
        pool.terminate()
        pool.join()
    env.raises(lambda: result.get(3))


def change_directory():
    os.chdir("/")
    os.environ.clear()
    os.umask(0o777)
    return os.getcwd()


@case(8, "change directory, empty the environment, set a umask")
def changed_directory(env: Env):
    here = os.getcwd()
    assert own_outcome(env, env.pool(2), change_directory) == "/"
    assert os.getcwd() == here


def change_handlers():
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    return "done"


@case(8, "change signal handlers, block all signals; then `terminate`", needs="terminate")
def changed_handlers(env: Env):
    pool = env.pool(2)
    assert own_outcome(env, pool, change_handlers) == "done"
    pool.apply_async(nap, (1000,))
    with env.within(1.0, "terminate and join"):
        pool.terminate()
        pool.join()


def alarm():
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(1)
    time.sleep(30)


@case(8, "an alarm that kills the worker")
def alarmed(env: Env):
    outcome = own_outcome(env, env.pool(2), alarm)
    assert isinstance(outcome, env.needs_tpool("WorkerLostError")), repr(outcome)
    assert not env.is_tpool or outcome.exitcode == -signal.SIGALRM, repr(outcome)


def fork_twice():
    pid = os.fork()
    mark("returned", pid)
    return "child" if pid == 0 else "parent"


@case(8, "a task forks and returns twice: it has one result", prints=True, spawn=True)
def forked_and_returned(env: Env):
    pool = env.pool(1)
    for _ in range(3):
        assert own_outcome(env, pool, fork_twice) == "parent"
    copies = {one.pid for one in env.marks("returned") if one.value == "0"}
    assert procs.wait_until(lambda: not any(map(procs.alive, copies)), 3), "the copies of the worker live on"


def fork_and_raise():
    if os.fork() == 0:
        raise SystemExit(3)
    return "parent"


@case(8, "a task forks and the child raises `SystemExit`", prints=True)
def forked_and_exited(env: Env):
    assert own_outcome(env, env.pool(1), fork_and_raise) == "parent"


def leave_thread(daemon):
    threading.Thread(target=time.sleep, args=(1000,), daemon=daemon).start()
    return "done"


@case(8, "a task leaves a thread that never ends; then `close` and `join`")
def left_thread(env: Env):
    pool = env.pool(2)
    assert own_outcome(env, pool, leave_thread, True) == "done"
    assert own_outcome(env, pool, leave_thread, False) == "done"
    pool.close()
    with env.within(5.0, "join"):
        pool.join()


@case(8, "a thread that never ends in a worker that is recycled", needs="maxtasks")
def left_thread_recycled(env: Env):
    pool = env.pool(1, maxtasksperchild=1)
    for _ in range(2):
        assert pool.apply_async(leave_thread, (False,)).get(15) == "done"


class Cycle:
    def __init__(self, weight):
        self.me = self
        self.weight = weight

    def __del__(self):
        raise RuntimeError("a destructor that fails")


def leave_cycles(tensors):
    if tensors:
        import torch

        weight = torch.ones(250_000)
    else:
        weight = bytearray(1_000_000)
    Cycle(weight)
    return weight


@case(8, "tasks leave cyclic garbage with destructors that raise", prints=True)
def cyclic_garbage(env: Env):
    pool = env.pool(1, memory="64MB")
    tensors = "torch" in env.adapter.can
    for _ in range(100):
        got = pool.apply_async(leave_cycles, (tensors,)).get(15)
        assert len(got) in (250_000, 1_000_000)
        del got
    env.usable(pool)


def collect_never():
    gc.disable()
    gc.freeze()
    sys.setrecursionlimit(60)
    return "done"


def wreck_interpreter():
    import builtins

    builtins.print = builtins.open = None
    sys.path.clear()
    sys.meta_path.clear()
    sys.settrace(lambda *_: None)
    threading.settrace(lambda *_: None)
    return "done"


@case(8, "switch off the collector, shrink the stack; wreck builtins and the path", prints=True)
def wrecked_interpreter(env: Env):
    pool = env.pool(2)
    own_outcome(env, pool, wreck_interpreter)
    own_outcome(env, env.pool(2), collect_never)


def allocate_until_refused():
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))
    hoard = []
    try:
        while True:
            hoard.append(bytes(1 << 28))  # zeroes that nobody writes, so they cost address space alone
    finally:
        hoard.clear()
        resource.setrlimit(resource.RLIMIT_AS, before)


@case(8, "allocate until refused")
def refused_memory(env: Env):
    outcome = own_outcome(env, env.pool(2), allocate_until_refused)
    assert isinstance(outcome, MemoryError), repr(outcome)


def new_session():
    with contextlib.suppress(OSError):
        os.setsid()
    mark("busy")
    time.sleep(1000)


@case(8, "a task that makes its worker a session of its own; then `terminate`", needs="terminate")
def own_session(env: Env):
    pool = env.pool(2)
    pool.apply_async(new_session)
    pid = env.wait_for("busy")[0].pid
    with env.within(1.0, "terminate and join"):
        pool.terminate()
        pool.join()
    assert procs.wait_until(lambda: not procs.alive(pid), 2), "the worker lives on"


def kill_siblings():
    """Signals its whole process group: with luck for the others, each worker has its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    return "shared"


@case(8, "a task kills its own process group: the others live", needs="tpool")
def killed_group(env: Env):
    outcome = own_outcome(env, env.pool(2), kill_siblings)
    assert isinstance(outcome, env.needs_tpool("WorkerLostError")), f"the process group is shared: {outcome!r}"


def listening(env: Env):
    pids = [found.pid for found in procs.family(f"FAULTS_RUN={os.environ['FAULTS_RUN']}", os.getsid(0))]
    return procs.listeners(pids)


@case(0, "nothing listens, nothing has a name, while the pool works", spawn=True)
def nothing_listens(env: Env):
    pool = env.pool(2)
    env.worker_pids(pool)
    found = listening(env)
    assert not found, found
    names = [name for name in os.listdir("/dev/shm") if not name.startswith("faults")]
    if env.is_tpool and os.environ.get("FAULTS_PRIVATE_SHM"):
        assert not names, f"in /dev/shm: {names}"
    tmp = os.listdir(os.environ["TMPDIR"])
    assert not tmp, f"temporary files: {tmp}"


if __name__ == "__main__":
    main()
