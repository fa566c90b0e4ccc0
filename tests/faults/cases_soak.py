"""Many kills: every task has one outcome, few are lost, none runs twice."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import threading
import time

from . import procs
from .script import Env, case, main, mark, read_marks, refuse_timeout

TASKS, KILLS = 10_000, 20


def leave_trace(value):
    """A task of some microseconds that leaves who it was and in which worker."""
    mark("ran", value)
    return value


def newest_worker():
    ran = [one for one in read_marks()[-50:] if one.kind == "ran"]
    return ran[-1].pid if ran else None


def kill_at(env, counts, stop, killed):
    """Kills a worker each time that so many tasks have run."""
    for count in counts:
        while not stop.is_set() and os.path.getsize(os.environ["FAULTS_DIR"] + "/marks") < count:
            time.sleep(0.001)
        for _ in range(100):
            pid = newest_worker()
            if pid and pid not in killed and procs.alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                    break
            if stop.is_set():
                return
            time.sleep(0.002)


def play(env: Env, tasks: int, kills: int):
    pool = env.pool(4)
    env.worker_pids(pool, 4)
    generator = random.Random(env.method)
    # How far the run is, is seen from the size of the file of marks: about 30 bytes a task.
    counts = sorted(generator.uniform(0.02, 0.9) * tasks * 30 for _ in range(kills))
    stop, killed = threading.Event(), set()
    killer = threading.Thread(target=kill_at, args=(env, counts, stop, killed))
    killer.start()
    try:
        results = [pool.apply_async(leave_trace, (value,)) for value in range(tasks)]
        outcomes = collections.Counter()
        for value, result in enumerate(results):
            try:
                got = result.get(30)
                assert got == value, f"{got} instead of {value}"
                outcomes["right"] += 1
            except AssertionError:
                raise
            except Exception as error:
                refuse_timeout(error, f"task {value} has no outcome")
                outcomes[type(error).__name__] += 1
    finally:
        stop.set()
        killer.join()
    ran = collections.Counter(int(one.value) for one in env.marks("ran"))
    env.note(f"{len(killed)} kills; {dict(outcomes)}")
    twice = [value for value, count in ran.items() if count > 1]
    assert not twice, f"{len(twice)} tasks ran twice"
    lost = tasks - outcomes["right"]
    assert lost <= len(killed), f"{lost} tasks failed after {len(killed)} kills: {dict(outcomes)}"
    assert not env.is_tpool or set(outcomes) <= {"right", "WorkerLostError"}, outcomes
    assert tasks - len(ran) <= lost, f"{tasks - len(ran)} tasks never ran, {lost} failed"
    assert len(killed) >= kills * 0.8, f"only {len(killed)} kills took place"
    env.usable(pool)


@case(1, "soak: 10,000 tasks, 20 random kills", deadline=110, alone=True, methods=("forkserver", "fork"))
def soak(env: Env):
    play(env, TASKS, KILLS)


@case(1, "soak: 1,000 tasks, 4 random kills", deadline=90, alone=True, methods=("spawn",), spawn=True)
def soak_spawn(env: Env):
    play(env, 1000, 4)


def work(value, payload=None):
    mark("ran", value)
    time.sleep(random.random() * 0.002)
    return value, payload


def torment(env, stop, killed, seed):
    """SIGKILL, SIGSTOP with SIGCONT, and now and then the zygote: at moments that nobody chose."""
    generator = random.Random(seed)
    # A spawned worker takes seconds to start: killed faster than they start, workers would run hardly any task.
    rate = 0.5 if env.method == "spawn" else 8
    while not stop.wait(generator.expovariate(rate)):
        pid = newest_worker()
        found = pid and procs.process(pid)
        if not found or found.state in "ZX":
            continue
        with contextlib.suppress(ProcessLookupError):
            draw = generator.random()
            if draw < 0.1 and env.method == "forkserver" and found.parent not in (os.getpid(), os.getppid(), 1):
                os.kill(found.parent, signal.SIGKILL)
                killed.extend([pid] * 4)
            elif draw < 0.3:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(generator.random() * 0.05)
                os.kill(pid, signal.SIGCONT)
            else:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)


@case(1, "chaos: random signals for a minute (`FAULTS_CHAOS` seconds)", slow=True, alone=True, deadline=4000)
def chaos(env: Env):
    seconds = float(os.environ.get("FAULTS_CHAOS", "60"))
    seed = int(os.environ.get("FAULTS_SEED", str(time.time_ns() % 10**6)))
    env.note(f"seed {seed}")
    pool = env.pool(4)
    env.worker_pids(pool, 4)
    stop, killed = threading.Event(), []
    tormentor = threading.Thread(target=torment, args=(env, stop, killed, seed))
    tormentor.start()
    end, number, lost = time.monotonic() + seconds, 0, 0
    payloads = [None, b"x" * 100, b"x" * 100_000, list(range(1000))]
    if "torch" in env.adapter.can:
        import torch

        payloads += [torch.arange(10.0), torch.arange(250_000.0)]
    try:
        while time.monotonic() < end:
            payload = payloads[number % len(payloads)]
            values = range(number, number + 50)
            results = [(value, pool.apply_async(work, (value, payload))) for value in values]
            number += 50
            for value, result in results:
                try:
                    got, back = result.get(30)
                except env.needs_tpool("WorkerLostError") as error:
                    refuse_timeout(error, f"task {value} has no outcome; seed {seed}")
                    lost += 1
                else:
                    assert got == value, f"{got} instead of {value}; seed {seed}"
                    assert repr(back) == repr(payload), f"wrong result of {value}; seed {seed}"
    finally:
        stop.set()
        tormentor.join()
    ran = collections.Counter(int(one.value) for one in env.marks("ran"))
    env.note(f"{number} tasks, {len(killed)} deaths, {lost} lost")
    assert max(ran.values()) == 1, "a task ran twice"
    assert lost <= len(killed), f"{lost} lost, {len(killed)} deaths"
    env.usable(pool)


if __name__ == "__main__":
    main()
