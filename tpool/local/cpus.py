"""How many CPUs this process may use: affinity, and the quota of its control group."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")


def parse_cpu_max(text: str) -> float | None:
    """The quota in CPUs of a cgroup v2 ``cpu.max`` file (``quota period`` in microseconds), None for ``max``."""
    fields = text.split()
    if len(fields) != 2 or not fields[0].isdigit() or not fields[1].isdigit() or int(fields[1]) == 0:
        return None
    return int(fields[0]) / int(fields[1])


def parse_cgroup_paths(text: str) -> dict[str, str]:
    """``/proc/self/cgroup``: path by controller; the empty name stands for cgroup v2."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _quota(root: Path, paths: dict[str, str]) -> float | None:
    """The tightest quota from this process's group up to the root, of either cgroup version."""
    quotas: list[float] = []
    groups = [(root, paths.get("", "/"), "v2"), (root / "cpu", paths.get("cpu", "/"), "v1")]
    for base, path, version in groups:
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(base):
                break
            quota = _group_quota(directory, version)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _group_quota(directory: Path, version: str) -> float | None:
    with contextlib.suppress(OSError):  # no such group or no such controller: no limit from there
        if version == "v2":
            return parse_cpu_max((directory / "cpu.max").read_text())
        quota = (directory / "cpu.cfs_quota_us").read_text().strip()  # -1: none
        return parse_cpu_max(f"{quota} {(directory / 'cpu.cfs_period_us').read_text().strip()}")
    return None


def available_cpus(root: Path = _CGROUP_ROOT) -> int:
    """How many CPUs this process may keep busy, at least 1.

    The smaller of its affinity mask and its cgroup's CPU quota, rounded up.
    """
    cpus = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):
        quota = _quota(root, parse_cgroup_paths(Path("/proc/self/cgroup").read_text()))
        if quota is not None:
            cpus = min(cpus, math.ceil(quota))
    return max(1, cpus)
