"""What the kernel says about a tree of processes: CPU time, wake-ups and memory, read from ``/proc``.

Everything here may be asked about processes that are just ending; what has gone counts as nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """The process and all its descendants, itself first."""
    found = [pid]
    for parent in found:  # grows while we walk it
        found.extend(_children(parent))
    return found


def _children(pid: int) -> Iterator[int]:
    for task in _tasks(pid):
        # A child belongs to the thread that forked it, so each thread has a list of its own.
        with contextlib.suppress(OSError):
            yield from map(int, (task / "children").read_text().split())


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def cpu_seconds(pid: int) -> float:
    """CPU time of one process, its ended threads included, to the nanosecond."""
    try:
        # The kernel's CPU clock of any process: CPUCLOCK_SCHED (2) of ~pid (include/linux/posix-timers_types.h).
        # /proc/<pid>/stat would count in ticks of 10 ms, longer than many a round.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _reaped_cpu_seconds(pid: int) -> float:
    """CPU time of the children that `pid` has already waited for."""
    if pid == os.getpid():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[13]) + int(fields[14])) / _TICKS  # cutime, cstime


def tree_cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU time of the process, and of its descendants, living and waited for."""
    own, *others = tree(pid)
    below = sum(cpu_seconds(each) + _reaped_cpu_seconds(each) for each in others)
    return cpu_seconds(own), below + _reaped_cpu_seconds(own)


def tree_wakeups(pid: int) -> int:
    """How often threads of the tree have gone to sleep and been woken, the main thread of `pid` left out."""
    tasks = [task for each in tree(pid) for task in _tasks(each) if task.name != str(pid)]
    return sum(_field(task / "status", "voluntary_ctxt_switches") for task in tasks)


def tree_anonymous_nbytes(pid: int) -> int:
    """Heap memory of the tree; pages that several processes share by copy-on-write count once."""
    return 1024 * sum(_field(Path(f"/proc/{each}/smaps_rollup"), "Pss_Anon") for each in tree(pid))


def shared_nbytes() -> int:
    """Shared memory of the whole machine: mapped or not, named or not."""
    return 1024 * _field(Path("/proc/meminfo"), "Shmem")


def unique_nbytes(pid: int) -> int:
    """USS: the memory that would come back if this process ended."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    return 1024 * (_field(rollup, "Private_Clean") + _field(rollup, "Private_Dirty"))


def available_fraction() -> float:
    """The share of the machine's memory that programs can still get."""
    meminfo = Path("/proc/meminfo")
    return _field(meminfo, "MemAvailable") / _field(meminfo, "MemTotal")


def _field(path: Path, name: str) -> int:
    """The number after ``name:`` in a status file, 0 if the file has gone or lacks it."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            key, _, rest = line.partition(":")
            if key == name:
                return int(rest.split()[0])
    return 0


def describe_machine() -> dict[str, str | int | float]:
    """The machine by name, as far as it matters to the numbers."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(1024 * _field(Path("/proc/meminfo"), "MemTotal") / 1e9, 1),
        "kernel": platform.release(),
        "virtual": "hypervisor" in cpuinfo,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }
