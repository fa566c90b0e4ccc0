"""How much shared memory a pool may use when its user did not say: most of what this machine or container has.

Moving a tensor into shared memory gives its heap memory back, so a low default would refuse work that plain torch
runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

__all__ = ["default_budget_nbytes", "memory_limit_nbytes"]

_CGROUP_MOUNT = PurePosixPath("/sys/fs/cgroup")


def default_budget_nbytes() -> int:
    """Three quarters of the memory that this process may use: of the machine's, or of its cgroup's limit if lower."""
    return memory_limit_nbytes(_read) * 3 // 4


def memory_limit_nbytes(read: Callable[[str], str | None]) -> int:
    """The memory of this machine, or the lowest limit of the cgroups this process lies in.

    Args:
        read: gives the text of a file by its path, None if there is none. Pure otherwise.
    """
    limits = [_physical_nbytes(read("/proc/meminfo") or "")]
    for path in _limit_files(read("/proc/self/cgroup") or ""):
        text = (read(path) or "").strip()
        if text.isdecimal():  # "max": no limit; version 1 writes a number beyond any memory instead
            limits.append(int(text))
    return min(limits)


def _physical_nbytes(meminfo: str) -> int:
    for line in meminfo.splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    return 1 << 32  # no /proc: a cautious guess rather than no pool


def _limit_files(self_cgroup: str) -> Iterator[str]:
    """Files that may hold a limit: of our cgroup and all above it, in version 2 and version 1 of the hierarchy.

    Inside a container the path is often that of the host while the mount shows only our part, so files may be missing;
    the mount's own root is then the limit that counts, and it is always among these.
    """
    for line in self_cgroup.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, file = _CGROUP_MOUNT, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = _CGROUP_MOUNT / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory == root or root in directory.parents:
                yield str(directory / file)


def _read(path: str) -> str | None:
    with contextlib.suppress(OSError):  # absent, or hidden from us: then it limits nothing that we could know
        return Path(path).read_text(encoding="ascii", errors="replace")
    return None
