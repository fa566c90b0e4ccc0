"""Limits that hold for root too: a control group, where this machine lets us make one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .script import NotPossible

ROOT = Path("/sys/fs/cgroup")


def _directories(controller: str) -> list[Path]:
    """Where a group of ours may lie, by either version; named by the run, so that others can remove it."""
    name = f"faults{os.environ['FAULTS_RUN']}"
    return [ROOT / controller / name, ROOT / name]


def make_cgroup(controller: str, limit: str) -> Path:
    """A new group whose ``limit`` can be set."""
    for directory in _directories(controller):
        if not (directory.parent / "cgroup.procs").exists():
            continue  # an ordinary directory
        try:
            directory.mkdir(exist_ok=True)
        except OSError:
            continue
        if os.access(directory / limit, os.W_OK):
            return directory
        directory.rmdir()
    raise NotPossible(f"no {controller} cgroup can be made here")


def remove_cgroups(controller: str) -> None:
    """Removes ours, once its processes are gone; a zombie that nobody reaps keeps it."""
    for directory in filter(Path.exists, _directories(controller)):
        with contextlib.suppress(OSError):
            directory.rmdir()
