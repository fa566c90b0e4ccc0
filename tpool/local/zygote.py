"""The zygote: a clean process that has imported torch and forks workers on request.

    caller's process                      zygote                                  worker
    ────────────────                      ──────                                  ──────
    shared_zygote() ── posix_spawn ─────► import torch, preload, freeze
      connect() ── CONNECT + socket ────► one connection per pool
      request ──── FORK + descriptors ──► fork ─────────────────────────────────► worker_main
      ◄─────────── FORKED + pidfd ─────── (opened before the child can be reaped)
      ◄─────────── EXITED + status ────── waitid

One zygote serves all pools of a process, as the standard library's fork server does, because the import is what
costs. It exits when the process that started it is gone, or ``LINGER_SECONDS`` after its last pool ended.

The tree always dies: the zygote watches its parent by pidfd (an inherited descriptor cannot keep it alive) and
kills its workers when the parent is gone or their pool's connection closes; workers carry ``PR_SET_PDEATHSIG`` and
die with the zygote. That signal is sent when the *thread* that forked ends, so the zygote forks from its only thread.

It must be single-threaded when it forks: OpenBLAS starts threads at import unless told not to.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic, sleep
from typing import NoReturn

from tpool.local.channel import Channel, Frame
from tpool.local.seeding import load_generators

# A program that makes one pool after the other finds the zygote warm; one that is done with pools gets rid of a
# process of some 100 MB soon.
LINGER_SECONDS = 10.0
PR_SET_PDEATHSIG = 1  # prctl(2)

CONNECT, FORK, FORKED, EXITED, FAILED = 1, 2, 3, 4, 5
FORKED_BODY = struct.Struct("<QI")
EXITED_BODY = struct.Struct("<Qi")
TOKEN = struct.Struct("<Q")


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends; exit if that has happened already."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def raise_not_single_threaded() -> None:
    """Refuse to fork from a process with several threads: their locks would stay locked in the child for ever."""
    count = len(os.listdir("/proc/self/task"))
    if count > 1:
        raise RuntimeError(
            f"the zygote has {count} threads after its imports, so it cannot fork safely; a module in preload "
            "starts threads when it is imported: leave it out of preload"
        )


def wait_for_single_thread(seconds: float = 0.5) -> None:
    """Wait for a thread that was joined to leave the kernel's list, which it does a moment later."""
    deadline = monotonic() + seconds
    while len(os.listdir("/proc/self/task")) > 1 and monotonic() < deadline:
        sleep(0.001)


@dataclass(slots=True)
class ZygoteConfig:
    """What the zygote does before it serves: the caller's ``sys.path``, and the modules to import."""

    path: list[str]
    preload: tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Child:
    token: int
    pid: int
    pidfd: int
    connection: int


class ZygoteServer:
    """The zygote's loop; lives in the zygote's only thread.

    State: ``_connections`` by descriptor, one per pool; ``_children`` by pidfd, the workers not yet reaped.
    """

    def __init__(self, control: Channel, parent_pid: int, error: str | None) -> None:
        self._control = control
        self._error = error
        self._parent_pidfd = os.pidfd_open(parent_pid)
        self._connections: dict[int, Channel] = {}
        self._children: dict[int, _Child] = {}
        self._poll = select.poll()
        for fd in (control.fileno(), self._parent_pidfd):
            self._poll.register(fd, select.POLLIN)

    def serve(self) -> None:
        """Serve until the parent is gone or nobody has needed us for a while."""
        while True:
            idle = not self._connections and not self._children
            ready = self._poll.poll(LINGER_SECONDS * 1000 if idle else None)
            if not ready and idle:
                return
            for fd, _ in ready:
                if fd == self._parent_pidfd:
                    self._kill(list(self._children.values()))
                    return
                self._handle(fd)

    def close(self) -> None:
        """Close every connection."""
        for channel in (self._control, *self._connections.values()):
            channel.close()

    def _handle(self, fd: int) -> None:
        if fd == self._control.fileno():
            self._accept()
        elif fd in self._children:
            self._reap(self._children.pop(fd))
        elif fd in self._connections:
            self._answer(self._connections[fd])

    def _accept(self) -> None:
        try:
            frames = self._control.receive()
        except (EOFError, OSError):
            # The parent's end was closed, but the parent lives (its pidfd is quiet): nobody can connect any more.
            self._poll.unregister(self._control.fileno())
            return
        self.connect(frames)

    def connect(self, frames: list[Frame]) -> None:
        """Serve the connections that came with these frames."""
        for frame in frames:
            channel = Channel(socket.socket(fileno=frame.fds.pop()))
            self._connections[channel.fileno()] = channel
            self._poll.register(channel.fileno(), select.POLLIN)

    def _answer(self, channel: Channel) -> None:
        try:
            for frame in channel.receive():
                self._fork(channel, frame)
        except (EOFError, OSError):
            self._disconnect(channel)

    def _disconnect(self, channel: Channel) -> None:
        """The pool is gone: so are its workers, and nobody wants to know how they ended."""
        fd = channel.fileno()
        self._kill([child for child in self._children.values() if child.connection == fd])
        self._poll.unregister(fd)
        del self._connections[fd]
        channel.close()

    def _fork(self, channel: Channel, frame: Frame) -> None:
        (token,) = TOKEN.unpack(frame.body)
        try:
            if self._error is not None:
                raise RuntimeError(self._error)
            raise_not_single_threaded()
            zygote_pid = os.getpid()
            pid = os.fork()
        except (OSError, RuntimeError) as error:
            frame.close_fds()
            channel.put(FAILED, TOKEN.pack(token) + str(error).encode())
            channel.flush()
            return
        if pid == 0:
            self._become_worker(frame, zygote_pid)
        frame.close_fds()
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = _Child(token, pid, pidfd, channel.fileno())
        self._poll.register(pidfd, select.POLLIN)
        channel.put(FORKED, FORKED_BODY.pack(token, pid), (pidfd,))
        channel.flush()

    def _become_worker(self, frame: Frame, zygote_pid: int) -> NoReturn:
        """In the forked child: keep nothing of the zygote's but its imports."""
        from tpool.local.process import worker_main

        die_with_parent(zygote_pid)
        os.close(self._parent_pidfd)
        for pidfd in self._children:
            os.close(pidfd)
        for channel in self._connections.values():
            channel.close()
        self._control.close()
        sock_fd, claims_fd, *streams = frame.fds
        for target, fd in zip((1, 2), streams):
            os.dup2(fd, target)
            os.close(fd)
        gc.enable()
        worker_main(sock_fd, claims_fd)

    def _reap(self, child: _Child) -> None:
        self._poll.unregister(child.pidfd)
        _, status = os.waitpid(child.pid, 0)
        os.close(child.pidfd)
        channel = self._connections.get(child.connection)
        if channel is not None:
            channel.put(EXITED, EXITED_BODY.pack(child.token, os.waitstatus_to_exitcode(status)))
            with contextlib.suppress(OSError):  # the pool has gone meanwhile; its connection says so next
                channel.flush()

    def _kill(self, children: list[_Child]) -> None:
        for child in children:
            # Not reaped yet, so neither the pid nor its group can belong to anybody else.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)


def _import_all(config: ZygoteConfig) -> str | None:
    """Import what workers need; returns the story of a failure, for every request to hear."""
    sys.path[:] = config.path
    try:
        import torch  # noqa: F401 - its pages are what the workers share

        for name in config.preload:
            importlib.import_module(name)
        load_generators()
    except Exception as error:
        return f"{error}\n{traceback.format_exc()}"
    return None


def zygote_main(control_fd: int, parent_pid: int, end_watch: Callable[[], None]) -> None:
    """Be the zygote; returns when it is no longer needed.

    Args:
        control_fd: a socket on which the caller's process sends a ``ZygoteConfig`` and then connections.
        parent_pid: the caller's process.
        end_watch: ends the watch over the parent that began before the imports; see ``deathwatch``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=control_fd)
    sock.setblocking(True)
    os.set_inheritable(control_fd, False)
    control = Channel(sock)
    frames: list[Frame] = []
    while not frames:
        frames = control.receive()
    error = _import_all(pickle.loads(frames.pop(0).body))
    end_watch()
    wait_for_single_thread()
    gc.collect()
    gc.freeze()  # the collector would write into every object's header, and so copy every shared page
    gc.disable()
    if os.getppid() != parent_pid:
        return
    server = ZygoteServer(control, parent_pid, error)
    server.connect(frames)
    try:
        server.serve()
    finally:
        server.close()
    os._exit(0)  # nothing is left to be done, and taking torch down would take half a second
