"""What a test may leave behind: nothing. Snapshots of the process before and after, and their difference.

Looked at are threads, processes, file descriptors and ``/dev/shm``. Helpers that serve the whole process and stay
on purpose (the zygote; the standard library's resource tracker and fork server) are no leak, and neither are native
threads, which numeric libraries keep.

A look costs less than a millisecond, so that every test can afford two: processes that were there before are not
looked at again, and only new ones have their ancestors followed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from faults.procs import SHM, mapped_shm, shm_inode
from support import ProcessInfo, process_info, processes, wait_until

__all__ = ["Snapshot", "expected_descriptors", "expected_processes", "find_leaks"]

# For what is on its way out. Only a test that leaks waits that long.
DEADLINE_SECONDS = 5.0
# Kept open by libraries for the process's life, opened at first use: hypothesis' examples, the driver of the GPU, the
# heap of multiprocessing's shared values.
IGNORED_TARGETS = ("/.hypothesis/", "/dev/nvidia", "/pym-")


def expected_processes() -> set[int]:
    """Ids of the processes that serve this whole process and outlive a test on purpose."""
    found = {_attribute("multiprocessing.resource_tracker", "_resource_tracker", "_pid")}
    found.add(_attribute("multiprocessing.forkserver", "_forkserver", "_forkserver_pid"))
    return {pid for pid in found if pid is not None} | _zygote_traces()[0]


def expected_descriptors() -> set[int]:
    """Descriptors that lead to :func:`expected_processes`."""
    found = {_attribute("multiprocessing.resource_tracker", "_resource_tracker", "_fd")}
    found.add(_attribute("multiprocessing.forkserver", "_forkserver", "_forkserver_alive_fd"))
    return {fd for fd in found if fd is not None} | _zygote_traces()[1]


def _zygote_traces() -> tuple[set[int], set[int]]:
    traces = _attribute("tpool.local.shared_zygote", "zygote_traces")
    return traces() if traces is not None else (set(), set())


def _collect_memory() -> None:
    """Have the table of shared memory look around: it does so only when it is used, and holds a pipe for each fork."""
    table = (_attribute("tpool.tensors.leases", "_process_table") or {}).get("table")
    if table is not None:
        table.collect()


def _attribute(module: str, *names: str) -> Any:
    """Look into a module only if somebody has imported it; it cannot have started anything otherwise."""
    found: Any = sys.modules.get(module)
    for name in names:
        found = getattr(found, name, None)
    return found


@dataclass(frozen=True)
class Snapshot:
    """What there is now."""

    threads: frozenset[threading.Thread]
    pids: frozenset[int]  # of the whole machine: reading their parents would cost more than the listing
    descriptors: frozenset[tuple[int, str]]  # with what they lead to, as a number is used again
    shm: frozenset[str]

    @classmethod
    def take(cls) -> Snapshot:
        """Look around."""
        return cls(frozenset(_threads()), frozenset(_pids()), frozenset(_descriptors()), frozenset(_shm_names()))

    def leaks(self) -> list[str]:
        """What is there now that was not there then, in words."""
        found = [f"thread {thread.name}" for thread in _threads() if thread not in self.threads]
        found += [str(info) for info in _new_processes(self.pids)]
        expected = expected_descriptors()
        found += [
            f"descriptor {fd} -> {target}"
            for fd, target in _descriptors()
            if (fd, target) not in self.descriptors and fd not in expected and fd > 2
        ]
        return found + [f"/dev/shm/{name}" for name in _shm_names() if name not in self.shm]


def find_leaks(before: Snapshot, deadline: float | None = None) -> list[str]:
    """Tell what was left since ``before`` and does not go away by itself.

    Args:
        before: how it was.
        deadline: seconds for what is on its way out; by default ``DEADLINE_SECONDS``.
    """
    if not before.leaks():
        return []
    # What only a reference cycle keeps (a pytest.raises block makes one) belongs to nobody any more.
    gc.collect()

    def nothing_left() -> bool:
        _collect_memory()
        return not _ours(before.leaks())

    try:
        wait_until(nothing_left, DEADLINE_SECONDS if deadline is None else deadline)
    except AssertionError:
        return _ours(before.leaks())
    return []


def _threads() -> Iterator[threading.Thread]:
    # A dummy stands for a native thread that once called Python; it is nobody's to end.
    return (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _descriptors() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, closed since
            target = os.readlink(f"/proc/self/fd/{name}")
            if not any(part in target for part in IGNORED_TARGETS):
                yield int(name), target


def _shm_names() -> list[str]:
    # Shared memory is files. Folders there are somebody's temporary files; other programs keep theirs there too.
    with contextlib.suppress(FileNotFoundError), os.scandir(SHM) as entries:
        return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    return []


def _new_processes(before: frozenset[int]) -> Iterator[ProcessInfo]:
    """Our descendants that were not there, zombies too, and orphans that they left."""
    expected = expected_processes()
    ancestors = _ancestors(os.getpid())
    for pid in _pids():
        if pid in before or pid in expected:
            continue
        info = process_info(pid)
        if info is not None and (_descends_from_us(info) or _is_our_orphan(info, ancestors)):
            yield info


def _ancestors(pid: int) -> list[int]:
    """Parent, grandparent and so on, up to init."""
    found: list[int] = []
    while pid > 1 and (info := process_info(pid)) is not None:
        pid = info.parent
        found.append(pid)
    return found


def _descends_from_us(info: ProcessInfo) -> bool:
    return os.getpid() in _ancestors(info.pid)


def _is_our_orphan(info: ProcessInfo, ancestors: list[int]) -> bool:
    """Whether it runs and was started by a descendant of ours that is gone.

    Such a process keeps our group and is handed to init or to a reaper among our ancestors. Our own parent does
    not count unless it is init: what it starts beside us (another test run) is in our group too. Dead orphans
    are init's to reap.
    """
    return info.alive and info.group == os.getpgrp() and info.parent in {1, *ancestors[1:]}


def _ours(leaks: list[str]) -> list[str]:
    """Leave out entries of /dev/shm that a process which is not ours named after itself, or has mapped."""
    suspects = {leak: shm_inode(leak) for leak in leaks if leak.startswith(str(SHM))}
    if not suspects:
        return leaks
    others = [info.pid for info in processes() if info.pid != os.getpid() and not _descends_from_us(info)]
    mapped = set().union(*map(mapped_shm, others))
    # What has gone since has no inode.
    strangers = {leak for leak, inode in suspects.items() if not inode or inode in mapped or _maker(leak) in others}
    return [leak for leak in leaks if leak not in strangers]


def _maker(leak: str) -> int:
    """The id of the process that made this entry, 0 if its name does not tell.

    torch, joblib and multiprocessing put it first: ``torch_<pid>_<random>_<count>``, ``pym-<pid>-<random>``.
    """
    return next((int(part) for part in re.split("[-_.]", leak) if part.isdecimal()), 0)
