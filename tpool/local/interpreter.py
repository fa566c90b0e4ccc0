"""A fresh Python interpreter that runs one function of ours and dies with us."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from multiprocessing import spawn
from typing import Any

__all__ = ["CHILD_FD", "spawn_interpreter"]

CHILD_FD = 60
"""Where a child finds its first descriptor; high enough to be free in a fresh interpreter."""


def spawn_interpreter(
    module: str, name: str, code: str, fd: int, environment: dict[str, str], second_fd: int | None = None
) -> int:
    """Run ``code`` after importing ``name`` from ``module`` in a fresh interpreter; returns its pid.

    The descriptors arrive as ``CHILD_FD`` and the one after it; standard input is empty.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    watch = os.path.join(os.path.dirname(os.path.abspath(__file__)), "deathwatch.py")
    program = (
        f"import importlib.util as u; s = u.spec_from_file_location('deathwatch', {watch!r}); "
        f"m = u.module_from_spec(s); s.loader.exec_module(m); end_watch = m.watch({os.getpid()}); "
        f"import sys; sys.path.insert(0, {root!r}); from {module} import {name}; {code}"
    )
    executable = os.fsdecode(spawn.get_executable())
    arguments = [executable, *subprocess._args_from_interpreter_flags(), "-c", program]  # type: ignore[attr-defined]
    # Duplicates above the targets, so that one dup2 cannot overwrite the source of another.
    with contextlib.ExitStack() as stack:
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        for target, source in enumerate([fd] if second_fd is None else [fd, second_fd], start=CHILD_FD):
            high = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, CHILD_FD + 2)
            stack.callback(os.close, high)
            actions.append((os.POSIX_SPAWN_DUP2, high, target))
        return os.posix_spawn(executable, arguments, environment, file_actions=actions)
