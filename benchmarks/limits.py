"""What this machine can do at best: ``python -m benchmarks.limits`` prints it as JSON.

Each number bounds a part of what any pool does: a tensor has to be copied into shared memory (warm if it is reused,
fresh if not), a message has to go there and back, a worker has to be forked and has to have torch.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.stats import median, percentile

_NBYTES = 16 << 20


def measure() -> dict[str, float]:
    """The limits of this machine, measured in a process of its own. It takes about six seconds.

    Returns:
        ``warm_copy``, ``fresh_copy`` (bytes per second), ``round_trip`` and ``round_trip_p99`` (seconds),
        ``fork`` (seconds), ``import_torch`` (seconds).
    """
    root = Path(__file__).resolve().parent.parent
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.limits"], cwd=root, check=True, capture_output=True, timeout=120
    ).stdout
    limits: dict[str, float] = json.loads(output)
    return limits


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _shared_memory() -> mmap.mmap:
    fd = os.memfd_create("benchmark", os.MFD_CLOEXEC)
    os.ftruncate(fd, _NBYTES)
    mapped = mmap.mmap(fd, _NBYTES)
    os.close(fd)  # the mapping has a descriptor of its own
    return mapped


def _copy_rates() -> tuple[float, float]:
    """Bytes per second from a heap buffer into shared memory: pages mapped before, and new ones."""
    source = bytes(bytearray(os.urandom(1 << 16)) * (_NBYTES >> 16))

    def fill() -> None:
        target[:] = source

    target = _shared_memory()
    fill()
    warm = [_timed(fill) for _ in range(20)]
    fresh = []
    for _ in range(10):
        target.close()  # giving the pages back is not the time of getting new ones
        target = _shared_memory()
        fresh.append(_timed(fill))
    return _NBYTES / median(warm), _NBYTES / median(fresh)


def _round_trips(count: int = 2000) -> list[float]:
    """64 bytes to another process and back through two pipes."""
    there, back = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(there[1])
        while data := os.read(there[0], 64):
            os.write(back[1], data)
        os._exit(0)
    message = bytes(64)
    samples = [_timed(lambda: (os.write(there[1], message), os.read(back[0], 64))) for _ in range(count)]
    for fd in (*there, *back):
        os.close(fd)
    os.waitpid(pid, 0)
    return samples[count // 10 :]  # the first ones warm up


def _fork_once() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def _import_torch() -> None:
    subprocess.run([sys.executable, "-c", "import torch"], check=True)


def main() -> None:
    """Measure everything and print it."""
    _import_torch()  # the files are in memory now, as they are for the pools
    import_torch = _timed(_import_torch)
    warm, fresh = _copy_rates()
    trips = _round_trips()
    import torch  # so that fork has a process of the usual size to copy

    torch.ones(1)
    limits = {
        "warm_copy": warm,
        "fresh_copy": fresh,
        "round_trip": percentile(trips, 50),
        "round_trip_p99": percentile(trips, 99),
        "fork": median([_timed(_fork_once) for _ in range(20)]),
        "import_torch": import_torch,
    }
    print(json.dumps(limits))


if __name__ == "__main__":
    main()
