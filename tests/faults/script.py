"""What a case may use, and the program that runs cases: ``python -m faults.cases_x --pool tpool --case a,b``.

A case is a function of one :class:`Env`. It passes by returning, fails by raising, and hangs when its watchdog fires:
that one needs no interpreter lock, writes the stack of every thread to a file and ends the process, so the harness
sees a case that began and never ended.

Tasks tell what happened to them by *marks*: lines appended to one file, which survive whatever becomes of the worker.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import procs
from .adapters import ADAPTERS, Adapter

# Time limits of the issue are for a quiet machine; a shared one gets this factor. The time itself is reported.
SLACK = float(os.environ.get("FAULTS_SLACK", "3"))
# Deadlines of cases are for a busy machine; this shortens or lengthens them all.
DEADLINE_FACTOR = float(os.environ.get("FAULTS_DEADLINE", "1"))
METHODS = ("forkserver", "fork", "spawn")
# Descriptors that a first pool may leave for good (helpers of the process), and the noise of a later one.
FD_ALLOWANCE_FIRST, FD_ALLOWANCE = 8, 2
SHARED_PROCESSES = 2
# For the interpreter to end, after its last case.
EXIT_DEADLINE = 5.0


class NotPossible(Exception):
    """This machine (or this pool) cannot play the case."""


class Leak(AssertionError):
    """Something was left behind."""


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        function: plays it.
        item: the number in the list of faults that it belongs to.
        title: one line for the table.
        needs: what the pool must be able to do, see ``Adapter.can``.
        deadline: seconds until it counts as hanging.
        alone: gets an interpreter of its own.
        spawn: is played with the start method ``spawn`` in CI too (dear: every worker imports torch anew).
        methods: start methods that it makes sense for.
        prints: what the task does makes somebody print, so stderr is not judged.
        slow: not in CI.
    """

    function: Callable[[Env], None]
    item: int
    title: str
    needs: frozenset[str]
    deadline: float
    alone: bool
    spawn: bool
    methods: tuple[str, ...]
    prints: bool
    slow: bool

    @property
    def name(self) -> str:
        return self.function.__name__

    def seconds(self, method: str) -> float:
        """The deadline for a start method: workers of ``spawn`` import torch each time."""
        return self.deadline * DEADLINE_FACTOR * (2 if method == "spawn" else 1)

    @property
    def module(self) -> str:
        return self.function.__module__.rpartition(".")[2]


CASES: dict[str, Case] = {}
ROLES: dict[str, Callable[[Env], None]] = {}


def case(
    item: int,
    title: str,
    *,
    needs: str = "",
    deadline: float = 30,
    alone: bool = False,
    spawn: bool = False,
    methods: tuple[str, ...] = METHODS,
    prints: bool = False,
    slow: bool = False,
) -> Callable[[Callable[[Env], None]], Callable[[Env], None]]:
    """Registers a case; the arguments are those of :class:`Case`, ``needs`` in one string."""

    def register(function: Callable[[Env], None]) -> Callable[[Env], None]:
        made = Case(function, item, title, frozenset(needs.split()), deadline, alone, spawn, methods, prints, slow)
        assert made.name not in CASES, f"two cases are called {made.name}"
        CASES[made.name] = made
        return function

    return register


def role(function: Callable[[Env], None]) -> Callable[[Env], None]:
    """Registers a program that a case starts and then ill-treats."""
    ROLES[function.__name__] = function
    return function


# Marks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """What a task wrote: when is on the clock that all processes share."""

    kind: str
    value: str
    pid: int
    when: float


def _marks_path() -> str:
    return os.path.join(os.environ["FAULTS_DIR"], "marks")


def mark(kind: str, value: object = "") -> None:
    """Leaves a mark; for any process. One write to a file opened for appending, so lines never mix."""
    fd = os.open(_marks_path(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(fd, f"{kind} {value} {os.getpid()} {time.monotonic()}\n".encode())
    finally:
        os.close(fd)


def read_marks(offset: int = 0) -> list[Mark]:
    """All marks behind this offset of the file."""
    try:
        with open(_marks_path(), "rb") as file:
            file.seek(offset)
            lines = file.read().decode().splitlines()
    except FileNotFoundError:
        return []
    fields = (line.split(" ") for line in lines)
    return [Mark(kind, value, int(pid), float(when)) for kind, value, pid, when in fields]


def wait_for_marks(kind: str, count: int, seconds: float = 20, offset: int = 0) -> list[Mark]:
    """The marks of this kind, once there are so many. For tasks that must meet, and for the case that watches them."""

    def found() -> list[Mark]:
        return [one for one in read_marks(offset) if one.kind == kind]

    if not procs.wait_until(lambda: len(found()) >= count, seconds):
        raise AssertionError(f"only {len(found())} of {count} tasks reached {kind!r} within {seconds} s")
    return found()


def refuse_timeout(error: BaseException, what: str = "nothing came") -> None:
    """A timeout is no outcome: the caller would have waited for ever."""
    if "Timeout" in type(error).__name__:
        raise AssertionError(f"{what}: {error!r}") from error


# Small tasks that many cases share --------------------------------------------------------------------------------


def square(value: int) -> int:
    return value * value


def die(signum: int = signal.SIGKILL) -> None:
    mark("dying")
    os.kill(os.getpid(), signum)
    signal.pause()


def meet(kind: str, count: int) -> int:
    """A task that ends only when ``count`` of its kind run at the same time: one worker each."""
    mark(kind)
    wait_for_marks(kind, count)
    return os.getpid()


def nap(seconds: float, kind: str = "napping") -> float:
    mark(kind)
    time.sleep(seconds)
    return seconds


# The environment of a case ----------------------------------------------------------------------------------------


@dataclass
class Role:
    """A running program, and everything that it started."""

    popen: subprocess.Popen[bytes]
    tag: str
    stderr_path: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def family(self) -> list[procs.Process]:
        return procs.family(self.tag)

    def stderr(self) -> str:
        return self.stderr_path.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Its exit status; an AssertionError if it does not end in time."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.send_signal(signal.SIGUSR1)  # asks for the stacks of its threads
            procs.wait_until(lambda: "most recent call first" in self.stderr(), 1.0)
            raise AssertionError(f"not ended after {seconds:.1f} s: {self.stderr()[-1500:]}") from None

    def assert_all_gone(self, seconds: float = 1.0) -> float:
        """Waits until nothing of it is left and says how long that took."""
        begin = time.monotonic()
        if not procs.wait_until(lambda: not self.family(), seconds * SLACK, step=0.02):
            raise AssertionError(f"left after {seconds * SLACK:.1f} s: {procs.describe(self.family())}")
        return time.monotonic() - begin


@dataclass
class Env:
    """What a case gets: the pool to try, and the means to observe."""

    adapter: Adapter
    method: str
    notes: list[str] = field(default_factory=list)
    detection: float | None = None
    _pools: list[Any] = field(default_factory=list)
    _roles: list[Role] = field(default_factory=list)
    _shared: Any = None
    _shared_used: bool = False
    _offset: int = 0

    @property
    def is_tpool(self) -> bool:
        return self.adapter.name == "tpool"

    def note(self, text: str) -> None:
        """Something for the report."""
        self.notes.append(text)

    # Pools

    def pool(self, processes: int = 2, **options: Any) -> Any:
        """A new pool of the kind under test, ended after the case. ``memory`` is for tpool alone."""
        if not self.is_tpool:
            options.pop("memory", None)
        made = self.adapter.pool(processes, self.method, **options)
        self._pools.append(made)
        return made

    def shared(self) -> Any:
        """A pool of two workers that goes from case to case, as a pool that survives faults can (peers: a new one)."""
        if not self.is_tpool:
            return self.pool(SHARED_PROCESSES)
        if self._shared is None:
            self._shared = self.adapter.pool(SHARED_PROCESSES, self.method)
        self._shared_used = True
        return self._shared

    def end(self, pool: Any) -> None:
        """Ends a pool the quickest way it has."""
        self.adapter.end(pool)

    def worker_pids(self, pool: Any, processes: int = 2) -> list[int]:
        """The ids of all workers, from tasks that wait for each other."""
        kind = f"meet{time.monotonic_ns()}"
        results = [pool.apply_async(meet, (kind, processes)) for _ in range(processes)]
        pids = sorted({result.get(30) for result in results})
        assert len(pids) == processes, f"{processes} tasks that wait for each other ran in {len(pids)} workers"
        return pids

    # Marks

    def marks(self, kind: str) -> list[Mark]:
        """The marks of this kind since the case began."""
        return [one for one in read_marks(self._offset) if one.kind == kind]

    def wait_for(self, kind: str, count: int = 1, seconds: float = 20) -> list[Mark]:
        return wait_for_marks(kind, count, seconds, self._offset)

    # Judgements

    @contextlib.contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """What happens inside must not take longer (times the slack of this machine)."""
        begin = time.monotonic()
        yield
        took = time.monotonic() - begin
        self.note(f"{what}: {took:.3f} s")
        assert took < seconds * SLACK, f"{what} took {took:.2f} s, allowed are {seconds} s (slack {SLACK:g})"

    def lost(
        self,
        get: Callable[[], Any],
        exitcode: int | None = None,
        task: str | None = None,
        *,
        dies_slowly: bool = False,
    ) -> BaseException:
        """Asserts that this raises because the worker is gone, and measures how long that took to be noticed.

        ``dies_slowly``: what it does last takes the kernel time before it is dead, which is nobody's fault.
        """
        try:
            value = get()
        except Exception as error:
            seen, caught = time.monotonic(), error
        else:
            raise AssertionError(f"the lost task returned {value!r}")
        refuse_timeout(caught, "the loss was not noticed")
        dying = self.marks("dying")
        if dying:
            self.detection = seen - dying[-1].when
            limit = 0.05 if SLACK <= 1 else 0.5 * SLACK
            assert dies_slowly or self.detection < limit, f"noticed after {self.detection:.3f} s"
        if self.is_tpool:
            self._assert_story(caught, exitcode, task)
        return caught

    def _assert_story(self, error: BaseException, exitcode: int | None, task: str | None) -> None:
        import tpool

        assert isinstance(error, tpool.WorkerLostError), f"got {error!r}"
        text = str(error)
        dying = {one.pid for one in self.marks("dying")}
        assert isinstance(error.pid, int), "the error does not know the worker"
        assert not dying or error.pid in dying, f"the error names worker {error.pid}, dead are {dying}"
        assert str(error.pid) in text, f"the message does not name the worker: {text}"
        if exitcode is not None:
            assert error.exitcode == exitcode, f"exit code {error.exitcode}, not {exitcode}: {text}"
            told = signal.Signals(-exitcode).name if exitcode < 0 else str(exitcode)
            assert told in text or str(abs(exitcode)) in text, f"the message does not say {told}: {text}"
        if task is not None:
            assert task in text, f"the message does not name the task {task}: {text}"

    def raises(self, get: Callable[[], Any], kinds: type | tuple[type, ...] = Exception) -> BaseException:
        """Asserts that this raises one of these; a timeout means that nothing came."""
        try:
            value = get()
        except BaseException as error:
            caught = error
        else:
            raise AssertionError(f"returned {value!r}")
        refuse_timeout(caught)
        assert isinstance(caught, kinds), f"raised {caught!r}"
        return caught

    def usable(self, pool: Any, count: int = 10) -> None:
        """The pool goes on: new tasks run, each with its own result."""
        results = [pool.apply_async(square, (value,)) for value in range(count)]
        try:
            got = [result.get(20) for result in results]
        except Exception as error:
            raise AssertionError(f"the pool does not go on: {error!r}") from error
        assert got == [value * value for value in range(count)], f"wrong results: {got}"

    def needs_tpool(self, name: str) -> type:
        """A class of tpool's, for cases that run on peers too: there any exception will do."""
        if not self.is_tpool:
            return Exception
        import tpool

        return getattr(tpool, name)

    # Programs

    def role(self, name: str, wrapper: Sequence[str] = ()) -> Role:
        """Starts the role of this name as a program of its own, leader of its own process group.

        Args:
            name: a function marked with :func:`role`.
            wrapper: a command that runs the command which follows it.
        """
        number = f"{os.getpid()}.{time.monotonic_ns()}"
        module = sys.modules[ROLES[name].__module__]
        stderr_path = Path(os.environ["FAULTS_DIR"]) / f"stderr.{number}"
        command = [
            *wrapper,
            sys.executable,
            "-m",
            module.__spec__.name,
            "--pool",
            self.adapter.name,
            "--method",
            self.method,
        ]
        with open(stderr_path, "wb") as stderr:
            popen = subprocess.Popen(
                [*command, "--role", name],
                env={**os.environ, "FAULTS_TAG": number},
                stderr=stderr,
                preexec_fn=os.setpgrp,
            )
        made = Role(popen, f"FAULTS_TAG={number}", stderr_path)
        self._roles.append(made)
        return made

    # Between cases

    def finish(self) -> None:
        """Ends what the case made."""
        for started in self._roles:
            procs.kill(started.family())
            started.popen.wait()
        for pool in self._pools:
            self.end(pool)
        self._pools.clear()
        self._roles.clear()


# The program ------------------------------------------------------------------------------------------------------


def _report(**record: Any) -> None:
    """One JSON line; the file is opened each time, because tasks and cases close descriptors."""
    record["stderr"] = os.path.getsize(os.environ["FAULTS_STDERR"])
    with open(os.environ["FAULTS_REPORT"], "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _open_dump() -> int:
    """Where the watchdog writes; a bare descriptor, which no forked child complains of when it ends."""
    return os.open(Path(os.environ["FAULTS_DIR"]) / "dump", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)


def _others() -> list[procs.Process]:
    found = procs.family(f"FAULTS_RUN={os.environ['FAULTS_RUN']}", os.getsid(0))
    return [one for one in found if one.pid != os.getpid()]


def _assert_nothing_grew(env: Env, before: set[int], fds: int, first: bool) -> None:
    """After a case, in the same interpreter: its processes and descriptors are gone."""
    gc.collect()
    shared = SHARED_PROCESSES if env._shared_used else 0
    helpers = env.adapter.helpers(env.method) + shared

    def left() -> list[procs.Process]:
        return [one for one in _others() if one.pid not in before]

    if not procs.wait_until(lambda: len(left()) <= helpers, SLACK):
        raise Leak(f"processes: {procs.describe(left())}")
    allowed = fds + (FD_ALLOWANCE_FIRST if first else FD_ALLOWANCE) + (16 if shared else 0)
    if not procs.wait_until(lambda: procs.fd_count() <= allowed, 1.0):
        raise Leak(f"{procs.fd_count() - fds} descriptors")


def _play(one: Case, env: Env) -> tuple[str, str]:
    """Outcome and reason of the case itself."""
    try:
        one.function(env)
    except NotPossible as error:
        return "n/a", str(error)
    except BaseException as error:
        return "fail", f"{type(error).__name__}: {error}" if str(error) else repr(error)
    return "pass", ""


def _clear_up(env: Env, outcome: tuple[str, str], check: Callable[[], None]) -> tuple[str, str]:
    """Ends what the case made and looks at what is left; gives the outcome, which only a pass can lose here."""
    try:
        env.finish()
        if outcome[0] == "pass":
            check()
    except Leak as error:
        outcome = "leak", str(error)
    except BaseException as error:
        if outcome[0] == "pass":
            outcome = "fail", f"at the end: {error!r}"
    if outcome[0] != "pass" and env._shared_used:  # whatever is wrong with it must not fail the next case
        broken, env._shared = env._shared, None
        with contextlib.suppress(Exception):
            env.end(broken)
    return outcome


def _run(one: Case, env: Env, first: bool) -> None:
    """Plays one case under its watchdog and reports it."""
    env.notes, env.detection, env._shared_used = [], None, False
    with contextlib.suppress(FileNotFoundError):
        env._offset = os.path.getsize(_marks_path())
    dump = _open_dump()
    before, fds = {other.pid for other in _others()}, procs.fd_count()
    _report(event="start", case=one.name)
    begin = time.monotonic()
    faulthandler.dump_traceback_later(one.seconds(env.method), exit=True, file=dump)
    outcome = _play(one, env)
    seconds = time.monotonic() - begin
    outcome = _clear_up(env, outcome, lambda: _assert_nothing_grew(env, before, fds, first))
    faulthandler.cancel_dump_traceback_later()
    with contextlib.suppress(OSError):  # a case may have closed it
        os.close(dump)
    _report(
        event="end",
        case=one.name,
        outcome=outcome[0],
        reason=" ".join(outcome[1].split())[:600],
        seconds=round(seconds, 3),
        detection=env.detection,
        notes=env.notes,
    )


def main() -> None:
    """The program of a case module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pool", choices=ADAPTERS, default="tpool")
    parser.add_argument("--method", default="forkserver")
    parser.add_argument("--case", default="")
    parser.add_argument("--role", default="")
    arguments = parser.parse_args()
    # A shell ignores it for what it starts in the background, and so would whatever is started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    env = Env(ADAPTERS[arguments.pool](), arguments.method)
    if arguments.role:
        faulthandler.register(signal.SIGUSR1)
        atexit.register(mark, "unwound")  # after whatever pools register
        ROLES[arguments.role](env)
        return
    if env.is_tpool:
        import tpool  # noqa: F401  # the time of the import is not the case's
    for number, name in enumerate(arguments.case.split(",")):
        _run(CASES[name], env, first=number == 0)
    if env._shared is not None:
        env.end(env._shared)
    _report(event="leaving")
    # Until the very end, so that it tells where an interpreter hangs that should be gone.
    dump = _open_dump()
    faulthandler.dump_traceback_later(EXIT_DEADLINE * SLACK, exit=True, file=dump)
