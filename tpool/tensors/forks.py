"""Which of this process's forked children are still there: one pipe for each.

A child keeps the write end of its pipe and never writes; so do its own children. When the last of them has ended, or
has executed another program, the read end in the parent reaches its end. No process id is needed, and nobody is told.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["ForkPipes"]

# Stands for a child whose pipe could not be made (no descriptors left): taken to live for ever. What it may read is
# then never used again, which costs memory; the other choice costs correctness.
_IMMORTAL = -1


class ForkPipes:
    """The pipes, from the parent's side. Called from fork hooks and under the lock of the lease table.

    ``before``, then ``in_parent`` or ``in_child``; a fork that fails counts as a child that ended at once.
    """

    __slots__ = ("_kept", "_next", "living")

    def __init__(self) -> None:
        self.living: list[int] = []  # read ends
        self._next: tuple[int, int] | None = None
        self._kept: list[int] = []  # in a child: the write ends that tell its ancestors

    def before(self) -> None:
        """A fork follows and the child will have something to read."""
        self._next = (_IMMORTAL, _IMMORTAL)
        with contextlib.suppress(OSError):  # no descriptors left: see _IMMORTAL
            self._next = os.pipe()

    def in_parent(self) -> int | None:
        """The name of the child that was forked since ``before``; None without that."""
        pipe, self._next = self._next, None
        if pipe is None:
            return None
        child, kept_by_child = pipe
        if child != _IMMORTAL:
            os.close(kept_by_child)
            os.set_blocking(child, False)
        self.living.append(child)
        return child

    def in_child(self) -> None:
        """Keep our write end; the other children are no longer ours to watch."""
        pipe, self._next = self._next, None
        watched, self.living = self.living, []
        if pipe is not None and pipe[0] != _IMMORTAL:
            watched.append(pipe[0])
            self._kept.append(pipe[1])
        for fd in watched:
            if fd != _IMMORTAL:
                with contextlib.suppress(OSError):  # another fork hook may have closed what it does not know
                    os.close(fd)

    def take_ended(self) -> list[int]:
        """Names of children that are gone since the last call, without blocking."""
        ended = [fd for fd in self.living if fd != _IMMORTAL and _at_end(fd)]
        for fd in ended:
            self.living.remove(fd)
            os.close(fd)
        return ended


def _at_end(fd: int) -> bool:
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False
