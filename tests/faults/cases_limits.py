"""Little room: few descriptors, a small ``/dev/shm``, a small budget of shared memory; and very large objects."""

from __future__ import annotations

import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from .script import Env, NotPossible, case, main, mark, role, square

MEGA = 1_000_000


def small_tensor(value):
    import torch

    return torch.full((8,), float(value))


def ones(nbytes):
    import torch

    return torch.ones(nbytes // 4)


def total(tensor):
    return float(tensor.sum())


def twice(tensor):
    return tensor * 2


# Descriptors -------------------------------------------------------------------------------------------------------


@role
def few_descriptors(env: Env):
    """5,000 live tensors both ways under ``ulimit -n 256``."""
    import torch

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    pool = env.pool(2)
    received = pool.map(small_tensor, range(5000))
    sent = [torch.full((8,), float(value)) for value in range(5000)]
    sums = pool.map(total, sent)
    right = sums == [8.0 * value for value in range(5000)]
    right = right and all(bool((tensor == value).all()) for value, tensor in enumerate(received))
    fds = len(os.listdir("/proc/self/fd"))
    mark("right" if right and fds < 100 else "wrong", fds)
    env.end(pool)


def play(env: Env, name: str, seconds: float = 45, wrapper=()):
    started = env.role(name, wrapper)
    status = started.wait(seconds)
    assert status == 0, f"status {status}: {started.stderr()[-500:]}"
    assert env.marks("right"), f"{[one.kind for one in env.marks('wrong')]} {started.stderr()[-500:]}"
    started.assert_all_gone()


@case(7, "`ulimit -n 256` with 5,000 live tensors both ways", needs="torch", deadline=80)
def descriptors(env: Env):
    play(env, "few_descriptors")


# /dev/shm ----------------------------------------------------------------------------------------------------------


@role
def large_tensors(env: Env):
    """Tensors far larger than ``/dev/shm``, both ways."""
    import torch

    free = shutil.disk_usage("/dev/shm").total
    assert free <= 16 << 20, f"/dev/shm has {free} bytes"
    pool = env.pool(2)
    got = pool.apply(twice, (torch.ones(50 * MEGA // 4),))
    more = pool.map(ones, [20 * MEGA] * 4)
    right = bool((got == 2).all()) and all(bool((tensor == 1).all()) for tensor in more)
    mark("right" if right else "wrong")
    env.end(pool)


@case(7, "a 16 MB `/dev/shm` with tensors of 20 and 50 MB", needs="torch", deadline=60)
def small_shm(env: Env):
    if os.getuid() != 0 or shutil.which("unshare") is None:
        raise NotPossible("only root can mount a small /dev/shm")
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", "/dev/shm"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        raise NotPossible("a small /dev/shm cannot be mounted here")
    script = 'mount -t tmpfs -o size=16m tmpfs /dev/shm && exec "$@"'
    play(env, "large_tensors", wrapper=["unshare", "-m", "sh", "-c", script, "sh"])


@role
def small_files(env: Env):
    """A limit of file sizes holds for shared memory too; beyond it comes SIGXFSZ."""
    import torch

    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
    pool = env.pool(2)
    right = [bool((pool.apply(twice, (torch.ones(8 * MEGA // 4),)) == 2).all()) for _ in range(10)]
    mark("right" if all(right) else "wrong")
    env.end(pool)


@case(7, "a limit of 64 MB on file sizes (`RLIMIT_FSIZE`)", needs="tpool", deadline=60)
def file_size_limit(env: Env):
    play(env, "small_files")


@role
def small_address_space(env: Env):
    import torch

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), used + (2 << 30)))
    pool = env.pool(2)
    right = [bool((pool.apply(twice, (torch.ones(8 * MEGA // 4),)) == 2).all()) for _ in range(10)]
    mark("right" if all(right) else "wrong")
    env.end(pool)


@case(7, "a limit of 2 GB more on address space (`RLIMIT_AS`)", needs="tpool", deadline=60)
def address_space_limit(env: Env):
    play(env, "small_address_space")


# The budget --------------------------------------------------------------------------------------------------------


def refused(env: Env, get):
    """This task finds no room, and the message says how much was asked for and how much there is."""
    error = env.raises(get, env.needs_tpool("SharedMemoryExhausted"))
    assert isinstance(error, MemoryError)
    numbers = re.findall(r"\d+", str(error))
    assert len(numbers) >= 2, f"no sizes in: {error}"


@case(7, "a tensor larger than the whole budget: `SharedMemoryExhausted`, the pool goes on", needs="tpool", spawn=True)
def larger_than_budget(env: Env):
    import torch

    pool = env.pool(2, memory="64MB")
    refused(env, lambda: pool.apply_async(total, (torch.ones(100 * MEGA // 4),)).get(20))
    refused(env, lambda: pool.apply_async(ones, (100 * MEGA,)).get(20))
    env.usable(pool)
    assert float(pool.apply_async(twice, (torch.ones(1000),)).get(20).sum()) == 2000


@case(7, "the budget is held by live tensors: one task fails, dropping them makes room", needs="tpool")
def budget_held(env: Env):
    pool = env.pool(2, memory="64MB")
    held = pool.apply_async(ones, (40 * MEGA,)).get(20)
    refused(env, lambda: pool.apply_async(ones, (40 * MEGA,)).get(20))
    env.usable(pool)
    assert float(held.sum()) == 10 * MEGA, "the held tensor changed"
    del held
    gc.collect()
    again = pool.apply_async(ones, (40 * MEGA,)).get(20)
    assert float(again.sum()) == 10 * MEGA


@case(7, "`map` of more than the budget at a time: an error, no hang, no SIGBUS", needs="tpool")
def budget_of_map(env: Env):
    pool = env.pool(2, memory="64MB")
    refused(env, lambda: pool.map_async(ones, [10 * MEGA] * 20, chunksize=1).get(30))
    gc.collect()
    env.usable(pool)
    assert float(pool.apply_async(ones, (40 * MEGA,)).get(20).sum()) == 10 * MEGA


@case(7, "a stream of ten times the budget: the sender waits for give-backs", needs="tpool")
def budget_of_stream(env: Env):
    pool = env.pool(2, memory="64MB")
    count = 0
    for tensor in pool.imap(ones, [16 * MEGA] * 40):
        assert float(tensor[-1]) == 1
        count += 1
        del tensor
    assert count == 40


def halves(tensor):
    return tensor * 0.5


def fresh(count, nbytes):
    import torch

    for value in range(count):
        yield torch.full((nbytes // 4,), float(value))


@case(7, "a stream of large tensors both ways within a small budget: nobody waits for the other", needs="tpool")
def budget_both_ways(env: Env):
    pool = env.pool(2, memory="96MB")
    count = 0
    for value, tensor in enumerate(pool.imap(halves, fresh(30, 12 * MEGA))):
        assert float(tensor[0]) == value / 2
        count += 1
        del tensor
    assert count == 30


@case(7, "more bytes in a budget held by the caller while a worker waits: the flush wakes it", needs="tpool")
def budget_wait_is_woken(env: Env):
    pool = env.pool(1, memory="64MB")
    for _ in range(5):
        held = pool.apply_async(ones, (40 * MEGA,)).get(20)
        # The next result finds no room as long as this one lives, unless its give-back is told in time.
        del held
        assert float(pool.apply_async(ones, (40 * MEGA,)).get(20)[0]) == 1


@case(7, "a budget that makes no sense is refused at once", needs="tpool")
def budget_nonsense(env: Env):
    for memory in (-1, "lots", 0):
        env.raises(lambda memory=memory: env.pool(1, memory=memory), (ValueError, TypeError))


# Large objects -----------------------------------------------------------------------------------------------------


def size(data):
    return len(data)


def make_bytes(nbytes):
    return b"x" * nbytes


@case(7, "a 200 MB bytes argument and result", deadline=60)
def bytes_200mb(env: Env):
    pool = env.pool(1)
    assert pool.apply_async(size, (make_bytes(200 * MEGA),)).get(50) == 200 * MEGA
    got = pool.apply_async(make_bytes, (200 * MEGA,)).get(50)
    assert len(got) == 200 * MEGA
    assert got[:1] == got[-1:] == b"x"


def available_nbytes():
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024


@case(7, "a 2.2 GB bytes result", deadline=180, slow=True, alone=True)
def bytes_2200mb(env: Env):
    if available_nbytes() < 12 << 30:
        raise NotPossible("less than 12 GiB of memory available")
    pool = env.pool(1)
    got = pool.apply_async(make_bytes, (2200 * MEGA,)).get(170)
    assert len(got) == 2200 * MEGA
    assert got[-1:] == b"x"
    env.usable(pool)


@case(7, "an argument of a million small objects")
def many_objects(env: Env):
    pool = env.pool(1)
    assert pool.apply_async(size, (list(range(MEGA)),)).get(25) == MEGA


@case(7, "250 workers' worth of tasks of which each sends a tensor of no elements", needs="torch")
def empty_tensors(env: Env):
    import torch

    pool = env.pool(2)
    got = pool.map(twice, [torch.empty(0) for _ in range(250)])
    assert all(tensor.numel() == 0 for tensor in got)
    assert pool.map(square, [2]) == [4]


@role
def limit_hit_while_working(env: Env):
    """The limit of descriptors is reached while the pool lives: that is the user's fault, and no hang."""
    pool = env.pool(2)
    pids = env.worker_pids(pool)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass  # nothing is left, as meant
    os.kill(pids[0], signal.SIGKILL)
    for _ in range(4):
        try:
            pool.apply_async(square, (3,)).get(10)
        except Exception as error:
            if "Timeout" in type(error).__name__:
                mark("wrong", "hang")
                sys.exit(1)
    for fd in taken:
        os.close(fd)
    mark("right")
    env.end(pool)


@case(7, "no descriptor is left when a worker must be replaced: no hang", deadline=60)
def no_descriptor_for_replacement(env: Env):
    play(env, "limit_hit_while_working", 45)


if __name__ == "__main__":
    main()
