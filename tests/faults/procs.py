"""Who is alive, and what have they left? Read from ``/proc``; used by the harness and inside the cases."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Process:
    """One line of the process table."""

    pid: int
    parent: int
    session: int
    state: str
    name: str


def process(pid: int) -> Process | None:
    """The process with this id, or None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    return Process(pid, int(fields[1]), int(fields[3]), fields[0], name)


def alive(pid: int) -> bool:
    """Whether this process still runs. A zombie does not: who has to reap it is another question."""
    found = process(pid)
    return found is not None and found.state not in "ZX"


def _all() -> Iterator[Process]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (found := process(int(entry))) is not None and found.state not in "ZX":
            yield found


def _tagged(pid: int, tag: bytes) -> bool:
    try:
        return tag in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone meanwhile, or another user's
        return False


def family(tag: str, session: int | None = None) -> list[Process]:
    """All live processes that inherited ``NAME=value`` in their environment, or that belong to the session.

    Both, because a task may start a session of its own, and may start a program with an empty environment.
    """
    needle = tag.encode()
    return [found for found in _all() if (session and found.session == session) or _tagged(found.pid, needle)]


def describe(processes: list[Process]) -> str:
    """Names, ids, states and parents for a message."""
    return ", ".join(f"{found.name}[{found.pid}] {found.state}, of {found.parent}" for found in processes)


def kill(processes: list[Process]) -> None:
    """SIGKILL each of them; one that is gone already is fine."""
    for found in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], object], seconds: float, step: float = 0.002) -> bool:
    """Look again and again until the condition holds. False if it does not within the deadline."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(step)
    return True


def fd_count(pid: int | str = "self") -> int:
    """How many descriptors this process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def thread_count(pid: int | str = "self") -> int:
    """How many threads this process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def memory_nbytes(pid: int | str = "self") -> tuple[int, int]:
    """Resident memory of this process: its own (heap, stack), and what it has mapped of shared memory.

    By kind and not by who shares it: pages that a forked child still shares would count as ours only later.
    """
    text = Path(f"/proc/{pid}/status").read_text()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Rss")}
    return found["RssAnon"], found["RssShmem"]


def shm_entries() -> set[str]:
    """Names in ``/dev/shm``: segments, and POSIX semaphores (``sem.*``)."""
    return set(os.listdir(SHM))


def shm_left(before: set[str], tag: str) -> list[str]:
    """Entries of ``/dev/shm`` that were not there before, without those that a stranger has mapped."""
    new = shm_entries() - before
    if not new:
        return []
    strangers: set[int] = set()
    for found in _all():
        if not _tagged(found.pid, tag.encode()):
            strangers |= mapped_shm(found.pid)
    return sorted(name for name in new & shm_entries() if shm_inode(name) not in strangers)


def mapped_shm(pid: int) -> set[int]:
    """Inodes of what this process has mapped of ``/dev/shm``.

    Names would not do: who makes a semaphore maps it under a passing name, before it is linked to its own.
    """
    found = set()
    with contextlib.suppress(OSError):  # gone, or another user's
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            _, _, _, _, inode, *path = line.split(maxsplit=5)
            if path and path[0].startswith(f"{SHM}/"):
                found.add(int(inode))
    return found


def shm_inode(name: str) -> int:
    """The inode of this entry of ``/dev/shm``, 0 if there is none."""
    with contextlib.suppress(OSError):
        return (SHM / name).stat().st_ino
    return 0


def listeners(pids: list[int]) -> list[str]:
    """Sockets of these processes that others could connect to: named Unix sockets, listening ports."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    found = os.stat(f"/proc/{pid}/fd/{fd}")
                    if stat.S_ISSOCK(found.st_mode):
                        inodes.add(str(found.st_ino))
    named = []
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] in inodes and len(fields) > 7:
            named.append("unix " + fields[7])
    for family_name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family_name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                named.append(f"{family_name} {fields[1]}")
    return named
