"""Where the Python code of a worker is, also of one that hangs in C: its traceback, on demand.

    report ── signal ──► worker: faulthandler, in its signal handler ── pipe ──► report

faulthandler needs no interpreter lock and writes only to a descriptor, so it works in whatever the worker hangs. It
does not say where a traceback ends, so each worker is sent two signals: when a thread is told for the second time, the
first traceback is complete. The signal is a real-time one: those queue up, and nobody else uses this one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import select
import signal
import threading
from pathlib import Path
from time import monotonic

__all__ = ["SIGNAL", "Stacks", "shorten", "tell_on_signal"]

SIGNAL = int(signal.SIGRTMAX) - 5
"""Near the upper end, as programs that use such signals begin at the lower one."""

ANSWER_SECONDS = 1.0
"""A worker answers within a millisecond where it has a CPU. Longer: a report on many stopped workers takes longer.
Shorter: on a busy machine a stack may be missing."""

QUIET_SECONDS = 0.05
"""So long nothing comes when an answer is over. Longer: a report on many busy workers takes longer. Shorter: on a busy
machine the end of one worker's stack may be told as the next one's."""

_THREAD = re.compile(rb"^(?:Current thread|Thread) (0x[0-9a-f]+)", re.MULTILINE)
_READ_NBYTES = 1 << 16


class Stacks:
    """The pipe through which the workers of one pool tell where they are; any thread may ask.

    Attributes:
        fd: the end that is sent to workers.
    """

    def __init__(self) -> None:
        self._read_fd, self.fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._lock = threading.Lock()

    def ask(self, pid: int) -> str | None:
        """The traceback of each thread of a worker, the innermost call first; None if it does not answer."""
        with self._lock:
            if self._read_fd < 0:
                return None
            self._read()  # what came too late for an earlier question
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:  # it is gone
                return None
            try:
                return self._ask(pid, pidfd)
            except ProcessLookupError:
                return None
            finally:
                os.close(pidfd)

    def _ask(self, pid: int, pidfd: int) -> str | None:
        if not _listens(pid):
            return None
        signal.pidfd_send_signal(pidfd, SIGNAL)
        signal.pidfd_send_signal(pidfd, SIGNAL)
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        deadline = monotonic() + ANSWER_SECONDS
        text = b""
        while (left := deadline - monotonic()) > 0:
            ready = dict(poll.poll(min(left, QUIET_SECONDS) * 1000))
            if text and not ready:
                # Two threads took a signal each, at the same time: then faulthandler answers only one of them.
                signal.pidfd_send_signal(pidfd, SIGNAL)
            text += self._read()
            end = _first_end(text)
            if end is not None:
                self._read_rest(poll, text[:end], text[end:])
                return text[:end].decode(errors="replace").rstrip()
            if pidfd in ready:
                break
        return None

    def _read_rest(self, poll: select.poll, first: bytes, second: bytes) -> None:
        """Read the second answer to its end, or it would be taken for that of the worker who is asked next.

        It is over when it says what the first one said, which was not cut off by anything, or when nothing more comes.
        """
        deadline = monotonic() + ANSWER_SECONDS
        while second.rstrip() != first.rstrip() and monotonic() < deadline:
            if not dict(poll.poll(QUIET_SECONDS * 1000)).get(self._read_fd):
                return
            second += self._read()

    def _read(self) -> bytes:
        chunks = []
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._read_fd, _READ_NBYTES):
                chunks.append(chunk)
        return b"".join(chunks)

    def close(self) -> None:
        """Nobody can be asked any more; allowed twice."""
        with self._lock:
            if self._read_fd >= 0:
                os.close(self._read_fd)
                os.close(self.fd)
                self._read_fd = self.fd = -1


def tell_on_signal(fd: int) -> None:
    """In a worker: have ``SIGNAL`` write where all threads are to this descriptor, which is taken over."""
    faulthandler.register(SIGNAL, file=fd, all_threads=True, chain=False)


def _listens(pid: int) -> bool:
    """Whether the process handles the signal: one that is only starting would be killed by it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(caught >> (SIGNAL - 1) & 1)
    return False


def _first_end(text: bytes) -> int | None:
    """Where the second traceback begins."""
    seen = set()
    for found in _THREAD.finditer(text):
        if found[1] in seen:
            return found.start()
        seen.add(found[1])
    return None


def shorten(stack: str) -> str:
    """A traceback without our own frames: in the worker's main thread they are the outer ones of each task."""
    threads = re.split(r"(?m)^(?=Current thread |Thread )", stack)
    return "".join(map(_without_ours, threads)).rstrip()


def _without_ours(thread: str) -> str:
    lines = thread.splitlines(keepends=True)
    ours = [number for number, line in enumerate(lines) if f'File "{_HERE}/' in line]
    if not ours or not lines[ours[0] + 1 :] or ours[0] <= 1:
        return thread
    return "".join(lines[: ours[0]])


_HERE = str(Path(__file__).parent)
