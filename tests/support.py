"""Helpers that any test may use: waiting with a deadline, reading the process table, running a script.

Nothing here knows tpool; a test that needs a fresh interpreter, a deadline or a look at the processes of this
machine finds it here, and not in a copy of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

__all__ = ["ProcessInfo", "ScriptResult", "process_info", "processes", "run_script", "wait_until"]

T = TypeVar("T")

# Long enough to cost nothing while polling, short enough that a test does not feel it.
POLL_SECONDS = 0.01
# How long the tracebacks of a script that ran out of time may take to reach its stderr.
LAST_WORDS_SECONDS = 2.0
# Carried by every process that descends from a script, also by one that left the script's session.
SCRIPT_MARK = "TPOOL_TEST_SCRIPT"


def wait_until(predicate: Callable[[], T], deadline: float, what: str = "") -> T:
    """Return the first true value that ``predicate`` gives, asked again and again.

    Args:
        predicate: cheap, free of side effects.
        deadline: seconds after which the wait is given up.
        what: what was waited for; stands in the message.

    Raises:
        AssertionError: the deadline passed first.
    """
    end = time.monotonic() + deadline
    pause = threading.Event()
    while not (value := predicate()):
        if time.monotonic() >= end:
            raise AssertionError(f"not within {deadline:g} s: {what or getattr(predicate, '__name__', predicate)}")
        pause.wait(POLL_SECONDS)
    return value


# Processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessInfo:
    """One line of the process table."""

    pid: int
    name: str
    state: str  # one letter of /proc/PID/stat: R, S, D, T, Z (zombie), ...
    parent: int
    group: int
    session: int

    @property
    def alive(self) -> bool:
        """Whether it can still do something: a zombie only waits to be reaped."""
        return self.state not in "ZX"

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name}, state {self.state}, child of {self.parent}): {self.command()}"

    def command(self) -> str:
        """Its command line; empty for a zombie and for one that is gone."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return ""


def process_info(pid: int) -> ProcessInfo | None:
    """Look one process up; None if there is none of that id."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            line = file.read().decode(errors="replace")
    except OSError:
        return None
    # The name may hold spaces and parentheses; the last ")" ends it.
    head, _, tail = line.rpartition(")")
    state, parent, group, session = tail.split()[:4]
    return ProcessInfo(pid, head.partition("(")[2], state, int(parent), int(group), int(session))


def processes() -> Iterator[ProcessInfo]:
    """Every process that this one can see."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (info := process_info(int(entry))) is not None:
            yield info


# Scripts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScriptResult:
    """What a script left: its output, its end, and what still ran some time after its end."""

    returncode: int  # negative for the signal that ended it
    stdout: str
    stderr: str
    timed_out: bool  # it was killed at the deadline; stderr then holds the traceback of each of its threads
    seconds: float
    survivors: tuple[str, ...]  # processes it left behind, killed since

    def expect_success(self) -> ScriptResult:
        """Give itself back after asserting that the script ended well, in time and left no process."""
        assert not self.timed_out, f"ran out of time after {self.seconds:.1f} s\n{self}"
        assert self.returncode == 0, f"exit status {self.returncode}\n{self}"
        assert not self.survivors, f"left behind: {self.survivors}\n{self}"
        return self

    def __str__(self) -> str:
        return f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}\n---"


def run_script(
    source: str,
    timeout: float,
    env: Mapping[str, str | None] | None = None,
    args: Sequence[str] = (),
    *,
    options: Sequence[str] = (),
    grace: float = 2.0,
) -> ScriptResult:
    """Run ``source`` as the main script of a fresh interpreter, in a session of its own.

    It imports what this interpreter imports (``sys.path`` is passed on), runs in an empty folder of its own, with
    nothing on stdin. Whatever it leaves running is killed before this returns.

    Args:
        source: the script; indentation that all lines share is removed.
        timeout: seconds until it is killed with all its processes.
        env: variables to set, or with None to remove, on top of this process's environment.
        args: its ``sys.argv[1:]``.
        options: options for the interpreter, as ``-W error``.
        grace: seconds that processes on their way out have after the script's end before they count as survivors.
    """
    with tempfile.TemporaryDirectory(prefix="tpool-script-") as folder:
        script = Path(folder, "script.py")
        script.write_text(textwrap.dedent(source))
        # Files, not pipes: a survivor that keeps a pipe open would hold up its reader.
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            start = time.monotonic()
            mark = uuid.uuid4().hex
            process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", *options, str(script), *args],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env=_script_environment(env or {}, mark),
                start_new_session=True,
            )
            try:
                timed_out = _ran_out_of_time(process, timeout)
                seconds = time.monotonic() - start
                survivors = _survivors(process.pid, mark, 0.0 if timed_out else grace)
            finally:
                _kill_all(process, mark)
            stdout.seek(0)
            stderr.seek(0)
            output, errors = (file.read().decode(errors="replace") for file in (stdout, stderr))
    return ScriptResult(process.returncode, output, errors, timed_out, seconds, survivors)


def _script_environment(changes: Mapping[str, str | None], mark: str) -> dict[str, str]:
    """This process's environment with the changes; the script finds the modules that we find."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), SCRIPT_MARK: mark}
    for name, value in changes.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment


def _ran_out_of_time(process: subprocess.Popen[bytes], timeout: float) -> bool:
    """Wait for the end; at the deadline have the script print its tracebacks and go."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler answers it
        with contextlib.suppress(subprocess.TimeoutExpired):  # then SIGKILL follows, with all the others
            process.wait(LAST_WORDS_SECONDS)
        return True
    return False


def _members(session: int, mark: str) -> list[ProcessInfo]:
    """The script's living processes: by session, and by mark should one have left the session."""
    needle = f"{SCRIPT_MARK}={mark}".encode()
    found = []
    for info in processes():
        environment = b""
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            environment = Path(f"/proc/{info.pid}/environ").read_bytes()
        if info.alive and (info.session == session or needle in environment):
            found.append(info)
    return found


def _survivors(session: int, mark: str, grace: float) -> tuple[str, ...]:
    with contextlib.suppress(AssertionError):  # some stay; they are told below
        wait_until(lambda: not _members(session, mark), grace)
    return tuple(str(info) for info in _members(session, mark))


def _kill_all(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill until nobody is left: a process may fork while we go through the table."""

    def nobody_left() -> bool:
        members = _members(process.pid, mark)
        for info in members:
            with contextlib.suppress(ProcessLookupError):  # it went by itself
                os.kill(info.pid, signal.SIGKILL)
        return not members

    wait_until(nobody_left, 10.0, "the processes of a script to die")
    process.wait()
