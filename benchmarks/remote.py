"""The runner's end of a driver: ask, wait with a deadline, watch the memory, and end it with all below it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import proc

#: How often a wait looks at the machine's memory: rarely enough not to disturb, often enough to stop a pool in time
#: (fresh memory fills at about a gigabyte per second).
_WATCH_SECONDS = 0.25
#: Below this share of free memory the driver is killed, before the kernel kills somebody.
_LEAST_AVAILABLE = 0.12
#: Helpers of pools that clean up after the dead and then end by themselves; killing them would leave files behind.
_JANITORS = ("torch_shm_manager", "resource_tracker")

_ROOT = Path(__file__).resolve().parent.parent


class DriverFailed(Exception):
    """A driver hung, died, ran out of memory or reported an error; it is of no further use.

    Attributes:
        status: one word for tables.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Remote:
    """One driver process.

    Args:
        name: the pool it drives.
        log: file to which its output is appended.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        ours, theirs = socket.socketpair()
        with theirs, log.open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.driver", name, str(theirs.fileno())],
                cwd=_ROOT,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._control = ours
        self._unread = b""
        self.pid = self._process.pid

    def ask(
        self, op: str, seconds: float, sample: Callable[[], None] | None = None, **details: object
    ) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Args:
            op: the operation.
            seconds: the deadline.
            sample: called every 20 ms while waiting; only for rounds whose time does not count.
            details: the rest of the request.

        Raises:
            DriverFailed: the driver is not usable any more; it has been killed.
        """
        try:
            self._control.sendall(json.dumps({"op": op, **details}).encode() + b"\n")
            line = self._read_line(seconds, sample)
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise DriverFailed("failed", answer["error"])
        except OSError as error:
            self.kill()
            raise DriverFailed("crashed", f"the driver has ended: {error}") from error
        except BaseException:
            self.kill()
            raise
        return answer

    def _read_line(self, seconds: float, sample: Callable[[], None] | None) -> bytes:
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            if time.monotonic() > deadline:
                raise DriverFailed("timeout", f"no answer within {seconds:.0f} s: hung, or that slow")
            if proc.available_fraction() < _LEAST_AVAILABLE:
                raise DriverFailed("memory", "stopped before it took all of the machine's memory")
            ready = select.select([self._control], [], [], 0.02 if sample else _WATCH_SECONDS)[0]
            if ready:
                data = self._control.recv(1 << 20)
                if not data:
                    raise DriverFailed("crashed", f"the driver ended with status {self._process.wait()}")
                self._unread += data
            elif self._process.poll() is not None:
                # Workers that outlive it may hold the other end of the socket open.
                raise DriverFailed("crashed", f"the driver ended with status {self._process.returncode}")
            if sample:
                sample()
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def stop(self, seconds: float) -> None:
        """End the driver in good order, or by force."""
        if self._process.poll() is None:
            with contextlib.suppress(DriverFailed):
                self.ask("close", seconds)
        self._control.close()  # the driver's loop ends with its input
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self.kill()

    def kill(self) -> None:
        """Kill the driver and everything below it."""
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGSTOP)  # so that it starts no one while we look
            for pid in reversed(proc.tree(self.pid)):
                if not _is_janitor(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._process.wait()
        self._control.close()


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": path}


def _is_janitor(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return any(name in command for name in _JANITORS)
