"""Where the Python code of a worker is, also of one that hangs in C: its traceback, on demand.

    report ── signal ──► worker: a Python handler, between two bytecodes ──────── pipe ──► report
    report ── another ─► worker that does not come to it: faulthandler, at once ─ pipe ──► report

faulthandler needs no interpreter lock, so it answers from whatever a worker hangs in. But a worker that runs Python
code dies of it now and then, as the frames that it reads are just being made: with CPython 3.11, 179 times in 27,000
signals where the only thread called functions (see also https://github.com/python/cpython/issues/116008). Hence the
order: a worker is asked in Python first, and only one that has taken that signal, was at work or asleep since, and did
not come to its handler is asked by faulthandler: its main thread is in C, and the frames of that thread stand still.
Nothing is told of its other threads then, whose frames may not.

The signals are real-time ones: nobody else uses these.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import functools
import os
import re
import select
import signal
import sys
import threading
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import NamedTuple

__all__ = ["IN_C", "IN_PYTHON", "Stacks", "shorten", "tell_on_signal"]

IN_PYTHON = int(signal.SIGRTMAX) - 5
"""Near the upper end, as programs that use such signals begin at the lower one."""
IN_C = IN_PYTHON + 1

ANSWER_SECONDS = 1.0
"""A worker answers within a millisecond where it has a CPU. Longer: a report on many stopped workers takes longer.
Shorter: on a busy machine a stack may be missing."""

PATIENCE_SECONDS = 0.1
"""After this long a worker counts as one that is in C. Longer: a report on many such workers takes longer. Shorter:
more often only the main thread is told of one that was to answer a little later."""

_LOOK_SECONDS = 0.005
"""How often it is looked whether a worker in C has answered; nothing else tells when its answer is over."""

_ANSWER_NBYTES = 1 << 15
"""Half of what a pipe holds: an answer must go into it whole, as a worker does not wait for a reader."""

_DEPTH = 100
"""So many calls are told of each thread, the innermost ones; faulthandler has the same number."""

PIDFD_SIGNAL_THREAD = 1  # pidfd_send_signal(2)

_READ_NBYTES = 1 << 16
_ANSWER = re.compile(rb"^process (\d+)\n(.*?)^end of process \1\n", re.MULTILINE | re.DOTALL)


class Stacks:
    """The pipe through which the workers of one pool tell where they are; any thread may ask.

    Attributes:
        fd: the end that is sent to workers.
    """

    def __init__(self) -> None:
        self._read_fd, self.fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._lock = threading.Lock()

    def ask(self, pid: int) -> str | None:
        """The traceback of each thread of a worker, the innermost call first; None if it does not answer.

        Only the main thread's where that one is in C.
        """
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
            except (OSError, ValueError, IndexError):  # it ends, and Linux tells less and less of it
                return None
            finally:
                os.close(pidfd)

    def _ask(self, pid: int, pidfd: int) -> str | None:
        before = _MainThread.look(pid)
        if not before.signals("SigCgt") >= {IN_PYTHON, IN_C}:  # one that is only starting would be killed
            return None
        signal.pidfd_send_signal(pidfd, IN_PYTHON)
        poll = select.poll()
        poll.register(self._read_fd, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        now = monotonic()
        patient_until, deadline = now + PATIENCE_SECONDS, now + ANSWER_SECONDS
        text, told_in_c = b"", False
        while (now := monotonic()) < deadline:
            ready = dict(poll.poll(1000 * (_LOOK_SECONDS if told_in_c else max(0.0, patient_until - now))))
            main = _MainThread.look(pid)
            text += self._read()
            if answer := _answer_in_python(text, pid):
                return answer
            if pidfd in ready:
                return None
            if told_in_c:
                rest = _ANSWER.sub(b"", text)  # what others say too late
                if rest and not main.has(IN_C):
                    return _answer_in_c(rest)
            elif monotonic() >= patient_until:
                patient_until += PATIENCE_SECONDS
                if not main.has(IN_PYTHON) and main.moved_or_sleeps(before):
                    _signal_main_thread(pidfd, IN_C)
                    told_in_c = True
        return None

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


class _MainThread(NamedTuple):
    """What Linux says of the main thread of a process; see proc(5)."""

    status: str
    state: str
    ticks: int

    @classmethod
    def look(cls, pid: int) -> _MainThread:
        root = Path(f"/proc/{pid}/task/{pid}")
        status = (root / "status").read_text()
        fields = (root / "stat").read_text().rpartition(")")[2].split()
        return cls(status, fields[0], int(fields[11]) + int(fields[12]))

    def signals(self, name: str) -> set[int]:
        mask = int(self.status.partition(f"{name}:")[2].split()[0], 16)
        return {number for number in (IN_PYTHON, IN_C) if mask >> (number - 1) & 1}

    def has(self, number: int) -> bool:
        """Whether the signal waits for this thread, or its handler runs there, which blocks it meanwhile."""
        return any(number in self.signals(name) for name in ("SigPnd", "ShdPnd", "SigBlk"))

    def moved_or_sleeps(self, before: _MainThread) -> bool:
        """Whether it would have come to a handler of Python since then: a thread without a CPU could not."""
        return self.state in ("S", "D") or self.ticks > before.ticks + 1


def _signal_main_thread(pidfd: int, number: int) -> None:
    """Before Linux 6.9 Linux chooses the thread: the main one, unless another signal waits for that one."""
    try:
        signal.pidfd_send_signal(pidfd, number, None, PIDFD_SIGNAL_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        signal.pidfd_send_signal(pidfd, number)


def _answer_in_python(text: bytes, pid: int) -> str | None:
    return next((_decode(found[2]) for found in _ANSWER.finditer(text) if int(found[1]) == pid), None)


def _answer_in_c(text: bytes) -> str:
    _, _, calls = text.partition(b"\n")
    return _decode(b"Main thread, in C code (most recent call first):\n" + calls)


def _decode(text: bytes) -> str:
    return text.decode(errors="replace").rstrip()


def tell_on_signal(fd: int) -> None:
    """In a worker's main thread: have signals write where it is to this descriptor, which is taken over."""
    signal.signal(IN_PYTHON, functools.partial(_tell, fd))
    faulthandler.register(IN_C, file=fd, all_threads=False, chain=False)


def _tell(fd: int, number: int, interrupted: FrameType | None) -> None:
    """Runs in the middle of whatever the main thread does: it must not raise, wait or take a lock.

    It does raise where it cannot even be called: a task that is one call below the recursion limit.
    """
    with contextlib.suppress(Exception):
        pid, ours = os.getpid(), threading.get_ident()
        others = [(f"Thread {ident:#018x}", top) for ident, top in sys._current_frames().items() if ident != ours]
        threads = [_thread(name, top) for name, top in [("Main thread", _outside(interrupted)), *others]]
        body = "\n".join(threads).encode(errors="replace")[:_ANSWER_NBYTES]
        text = b"process %d\n%b\nend of process %d\n" % (pid, body, pid)
        while text:
            text = text[os.write(fd, text) :]


def _outside(frame: FrameType | None) -> FrameType | None:
    """What was interrupted: who is asked again, just when it has answered, may still be in this handler."""
    top = frame
    while frame is not None:
        if frame.f_code is _tell.__code__:
            top = frame.f_back
        frame = frame.f_back
    return top


def _thread(name: str, top: FrameType | None) -> str:
    lines = [f"{name} (most recent call first):\n"]
    while top is not None and len(lines) <= _DEPTH:
        lines.append(f'  File "{top.f_code.co_filename}", line {top.f_lineno} in {top.f_code.co_name}\n')
        top = top.f_back
    return "".join([*lines, "  ...\n"] if top is not None else lines)


def shorten(stack: str) -> str:
    """A traceback without our own frames: in the worker's main thread they are the outer ones of each task."""
    threads = re.split(r"(?m)^(?=Main thread|Thread )", stack)
    return "".join(map(_without_ours, threads)).rstrip()


def _without_ours(thread: str) -> str:
    lines = thread.splitlines(keepends=True)
    ours = [number for number, line in enumerate(lines) if f'File "{_HERE}/' in line]
    if not ours or not lines[ours[0] + 1 :] or ours[0] <= 1:
        return thread
    return "".join(lines[: ours[0]])


_HERE = str(Path(__file__).parent)
