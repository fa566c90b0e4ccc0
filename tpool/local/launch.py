"""The three ways to start a worker's process behind one boundary: zygote, fork, spawn.

A launcher is told to start a worker with its end of a channel and its claims, and says what became of it in
``LaunchEvent``s. It belongs to the handler thread. That matters: the kernel kills a process that asked to die with
its parent when the *thread* that forked it ends, and the handler thread lives as long as the pool.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

from tpool.local import zygote
from tpool.local.channel import Channel
from tpool.local.interpreter import CHILD_FD, spawn_interpreter
from tpool.local.process import Inheritance, worker_main
from tpool.local.shared_zygote import shared_zygote
from tpool.waiting import uninterrupted


@dataclass(slots=True)
class Launched:
    """A process runs. Its pidfd belongs to whoever takes this event."""

    token: int
    pid: int
    pidfd: int


@dataclass(slots=True)
class LaunchFailed:
    """No process could be started; ``reason`` says why."""

    token: int
    reason: str


@dataclass(slots=True)
class Reaped:
    """A process has ended with this exit code, negative for a signal; None where it could not be had."""

    token: int
    exitcode: int | None


LaunchEvent = Launched | LaunchFailed | Reaped


class Launcher(Protocol):
    """How processes are started."""

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when ``receive`` has something to say, or None."""

    def launch(self, token: int, sock_fd: int, claims_fd: int) -> list[LaunchEvent]:
        """Start a worker; the descriptors stay the caller's. What is known at once is returned."""

    def receive(self) -> list[LaunchEvent]:
        """What was learnt since; must not block."""

    def reap(self, token: int, pidfd: int) -> list[LaunchEvent]:
        """The process behind this pidfd has ended: its ``Reaped``, if this launcher can say it now."""

    def close(self) -> None:
        """Let go of everything; all processes have been reaped."""


# Zygote -------------------------------------------------------------------------------------------------------------


class ZygoteLauncher:
    """Workers forked by the process's zygote.

    Requests that the zygote took with it when it died are made again to a new one.
    """

    def __init__(self, preload: tuple[str, ...]) -> None:
        self._zygote = shared_zygote(preload)
        self._channel = Channel(self._connect())
        self._waiting: dict[int, tuple[int, int]] = {}
        self._running: set[int] = set()
        self._restarts = 0

    def _connect(self) -> socket.socket:
        sock = uninterrupted(self._zygote.connect, socket.socket.close)  # its state outlives this pool
        sock.setblocking(False)
        return sock

    def fileno(self) -> int:
        """See Launcher."""
        return self._channel.fileno()

    def launch(self, token: int, sock_fd: int, claims_fd: int) -> list[LaunchEvent]:
        """See Launcher. The descriptors are duplicated until the zygote has answered."""
        fds: list[int] = []
        try:
            fds += [os.dup(sock_fd)]
            fds += [os.dup(claims_fd)]
        except OSError as error:  # at the limit of descriptors
            for fd in fds:
                os.close(fd)
            return [LaunchFailed(token, str(error))]
        self._waiting[token] = (fds[0], fds[1])
        self._request(token)
        return []

    def _request(self, token: int) -> None:
        streams = tuple(fd for fd in (1, 2) if _is_open(fd))
        fds = self._waiting[token] + (streams if len(streams) == 2 else ())
        self._channel.put(zygote.FORK, zygote.TOKEN.pack(token), fds)
        # A full socket (hundreds of requests) is flushed at the next answer; a dead zygote is noticed in receive().
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.flush()

    def receive(self) -> list[LaunchEvent]:
        """See Launcher."""
        events: list[LaunchEvent] = []
        try:
            if self._channel.backlogged:
                self._channel.flush()
            for frame in self._channel.receive():
                events.append(self._understand(frame.kind, frame.body, frame.fds))
        except BlockingIOError:
            pass
        except (EOFError, OSError):
            events += self._start_over()
        return events

    def _understand(self, kind: int, body: bytes, fds: list[int]) -> LaunchEvent:
        if kind == zygote.FORKED:
            token, pid = zygote.FORKED_BODY.unpack(body)
            self._forget_request(token)
            self._running.add(token)
            self._restarts = 0
            return Launched(token, pid, fds.pop())
        if kind == zygote.EXITED:
            token, exitcode = zygote.EXITED_BODY.unpack(body)
            self._running.discard(token)
            return Reaped(token, exitcode)
        (token,) = zygote.TOKEN.unpack_from(body)
        self._forget_request(token)
        return LaunchFailed(token, body[zygote.TOKEN.size :].decode())

    def _start_over(self) -> list[LaunchEvent]:
        """The zygote died: its workers die with it, their status unknown; requests go to a new one."""
        events: list[LaunchEvent] = [Reaped(token, None) for token in self._running]
        self._running.clear()
        self._channel.close()
        self._channel = Channel(self._connect())
        self._restarts += 1
        if self._restarts > 3:
            for token in list(self._waiting):
                self._forget_request(token)
                events.append(LaunchFailed(token, "the zygote process died each time it was started"))
        for token in self._waiting:
            self._request(token)
        return events

    def _forget_request(self, token: int) -> None:
        for fd in self._waiting.pop(token, ()):
            os.close(fd)

    def reap(self, token: int, pidfd: int) -> list[LaunchEvent]:
        """See Launcher: the zygote reaps, and says so on its own."""
        return []

    def close(self) -> None:
        """See Launcher."""
        for token in list(self._waiting):
            self._forget_request(token)
        self._channel.close()


# Children of our own ----------------------------------------------------------------------------------------------


class _ChildLauncher:
    """What fork and spawn share: the workers are our own children."""

    def fileno(self) -> None:
        """See Launcher."""
        return None

    def receive(self) -> list[LaunchEvent]:
        """See Launcher."""
        return []

    def reap(self, token: int, pidfd: int) -> list[LaunchEvent]:
        """See Launcher."""
        try:
            result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        except ChildProcessError:  # somebody else's wait() took the status, or SIGCHLD is ignored
            return [Reaped(token, None)]
        assert result is not None
        killed = result.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
        return [Reaped(token, -result.si_status if killed else result.si_status)]

    def close(self) -> None:
        """See Launcher."""


class ForkLauncher(_ChildLauncher):
    """Workers forked from the caller's process, inheriting everything.

    Args:
        inheritance: what the workers need not be sent.
        close_inherited: called in the child to close what belongs to the pool in the parent.
    """

    def __init__(self, inheritance: Inheritance, close_inherited: Callable[[int, int], None]) -> None:
        self._inheritance: Inheritance | None = inheritance
        self._close_inherited = close_inherited

    def launch(self, token: int, sock_fd: int, claims_fd: int) -> list[LaunchEvent]:
        """See Launcher."""
        parent_pid = os.getpid()
        for stream in (sys.stdout, sys.stderr):
            # What is buffered would otherwise be written twice.
            with contextlib.suppress(Exception):
                stream.flush()
        try:
            pid = os.fork()
        except OSError as error:
            return [LaunchFailed(token, f"fork failed: {error}")]
        if pid == 0:
            self._become_worker(sock_fd, claims_fd, parent_pid)
        return [Launched(token, pid, os.pidfd_open(pid))]

    def close(self) -> None:
        """See Launcher."""
        self._inheritance = None

    def _become_worker(self, sock_fd: int, claims_fd: int, parent_pid: int) -> NoReturn:
        inheritance = self._inheritance  # closing what is inherited drops it here
        try:
            zygote.die_with_parent(parent_pid)
            self._close_inherited(sock_fd, claims_fd)
            worker_main(sock_fd, claims_fd, inheritance)
        finally:
            os._exit(1)


class SpawnLauncher(_ChildLauncher):
    """Workers in fresh interpreters."""

    def launch(self, token: int, sock_fd: int, claims_fd: int) -> list[LaunchEvent]:
        """See Launcher."""
        code = f"spawned_main({CHILD_FD}, {CHILD_FD + 1}, {os.getpid()}, end_watch)"
        try:
            pid = spawn_interpreter("tpool.local.launch", "spawned_main", code, sock_fd, dict(os.environ), claims_fd)
        except OSError as error:
            return [LaunchFailed(token, f"a new interpreter could not be started: {error}")]
        return [Launched(token, pid, os.pidfd_open(pid))]


def spawned_main(sock_fd: int, claims_fd: int, parent_pid: int, end_watch: Callable[[], None]) -> NoReturn:
    """Be a worker in a fresh interpreter."""
    zygote.die_with_parent(parent_pid)
    end_watch()
    for fd in (sock_fd, claims_fd):
        os.set_inheritable(fd, False)
    worker_main(sock_fd, claims_fd)


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
