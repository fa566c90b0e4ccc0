"""Runs cases in fresh interpreters, watches the clock, counts what is left, and judges.

A batch is one interpreter that plays several cases in turn. When one hangs or takes the interpreter down, the rest of
the batch goes on in a new one, so a fault costs its own case only. What is found left after the interpreter ended is
put down to the last case of the batch; ``isolate`` gives each case its own interpreter and so names the culprit.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import procs
from .adapters import ADAPTERS
from .script import CASES, EXIT_DEADLINE, METHODS, SLACK, Case

MODULES = (
    "cases_workers",
    "cases_transit",
    "cases_soak",
    "cases_start",
    "cases_pickle",
    "cases_parent",
    "cases_zygote",
    "cases_end",
    "cases_limits",
    "cases_hostile",
    "cases_threads",
    "cases_growth",
)
# More cases to an interpreter save imports of torch; fewer lose less time when one hangs.
BATCH = 20
TESTS = Path(__file__).resolve().parent.parent
# What a user would take for a defect when it appears on the terminal.
ALARMING = re.compile(r"Traceback|Exception ignored|Fatal Python|leaked|Warning|Error\b")

for _module in MODULES:
    importlib.import_module(f".{_module}", __package__)


@functools.cache
def private_shm() -> bool:
    """Whether a ``/dev/shm`` of its own can be given to each interpreter, so that strangers' entries do not count."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-m", "sh", "-c", "mount --bind /tmp /dev/shm"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@dataclass
class Outcome:
    """What became of one case."""

    pool: str
    method: str
    case: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    detection: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """Cases for one interpreter."""

    pool: str
    method: str
    module: str
    names: tuple[str, ...]


def select(
    pool: str,
    methods: Iterable[str],
    patterns: Iterable[str] = ("*",),
    modules: Iterable[str] = MODULES,
    everything: bool = False,
) -> list[tuple[str, Case]]:
    """The cases to run, with their start method.

    Args:
        pool: name of an adapter.
        methods: start methods to run.
        patterns: shell patterns; a case is taken if one fits its name.
        modules: case modules.
        everything: also what is left out in CI: slow cases, and most cases under ``spawn``.
    """
    chosen = []
    adapter = ADAPTERS[pool]
    for method in methods:
        for one in CASES.values():
            if one.module not in modules or not any(fnmatch.fnmatch(one.name, pattern) for pattern in patterns):
                continue
            if not everything and (one.slow or (method == "spawn" and not one.spawn and pool == "tpool")):
                continue
            if method in one.methods or method not in METHODS:
                chosen.append((method if method in adapter.methods else adapter.methods[0], one))
    return chosen


def plan(pool: str, chosen: Iterable[tuple[str, Case]], isolate: bool = False) -> list[Batch]:
    """Puts cases of one module and start method together; those that must be alone, and all of a peer's, are alone."""
    batches: list[Batch] = []
    waiting: dict[tuple[str, str], list[str]] = {}
    for method, one in chosen:
        if isolate or one.alone or pool != "tpool":
            batches.append(Batch(pool, method, one.module, (one.name,)))
        else:
            waiting.setdefault((method, one.module), []).append(one.name)
    for (method, module), names in waiting.items():
        parts = -(-len(names) // BATCH)
        batches += [Batch(pool, method, module, tuple(names[part::parts])) for part in range(parts)]
    return batches


def run_batch(batch: Batch) -> list[Outcome]:
    """Plays the batch, in as many interpreters as it takes."""
    outcomes: list[Outcome] = []
    remaining = []
    for name in batch.names:
        if CASES[name].needs <= ADAPTERS[batch.pool].can:
            remaining.append(name)
        else:
            missing = ", ".join(sorted(CASES[name].needs - ADAPTERS[batch.pool].can))
            outcomes.append(Outcome(batch.pool, batch.method, name, "n/a", f"it has no {missing}"))
    while remaining:
        done = _Interpreter(batch, remaining).play()
        outcomes += done
        remaining = remaining[len(done) :]
    return outcomes


class _Interpreter:
    """One interpreter that plays some cases, and what it leaves."""

    def __init__(self, batch: Batch, names: list[str]) -> None:
        self.batch = batch
        self.names = names
        # Short, because a peer's socket lies in it, and those have room for 108 characters.
        self.root = Path(tempfile.mkdtemp(prefix="faults"))
        self.directory, self.tmp = self.root / "d", self.root / "t"
        self.report, self.stderr = self.root / "report", self.root / "stderr"
        self.run = f"{os.getpid()}.{time.monotonic_ns()}"
        self.directory.mkdir()
        self.tmp.mkdir()
        self.shm = Path(tempfile.mkdtemp(prefix="faults", dir=procs.SHM)) if private_shm() else None

    def play(self) -> list[Outcome]:
        shm = procs.shm_entries()
        try:
            popen = self._start()
            hung = self._wait(popen)
            begin = time.monotonic()
            gone = hung or procs.wait_until(lambda: not self._family(popen), 1.0 * SLACK, step=0.01)
            took = time.monotonic() - begin
            leftovers = [] if hung else self._leftovers(popen, gone, shm)
            procs.kill(self._family(popen))
            outcomes = self._read(popen.returncode, hung)
        finally:
            shutil.rmtree(self.root, ignore_errors=True)
            if self.shm:
                shutil.rmtree(self.shm, ignore_errors=True)
        last = outcomes[-1]
        if leftovers and last.outcome in ("pass", "leak"):
            among = f" (among {', '.join(self.names)})" if len(self.names) > 1 else ""
            last.outcome, last.reason = "leak", "; ".join([*leftovers, last.reason]).rstrip("; ") + among
        elif took > 0.1:
            last.notes.append(f"all gone {took:.2f} s after the interpreter")
        return outcomes

    def _start(self) -> subprocess.Popen[bytes]:
        batch = self.batch
        path = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "TMPDIR": str(self.tmp),
            "FAULTS_DIR": str(self.directory),
            "FAULTS_REPORT": str(self.report),
            "FAULTS_STDERR": str(self.stderr),
            "FAULTS_RUN": self.run,
            "FAULTS_PRIVATE_SHM": "1" if self.shm else "",
        }
        command = [sys.executable, "-m", f"{__package__.rpartition('.')[2]}.{batch.module}"]
        command += ["--pool", batch.pool, "--method", batch.method, "--case", ",".join(self.names)]
        if self.shm:
            command = ["unshare", "-m", "sh", "-c", 'mount --bind "$0" /dev/shm && exec "$@"', str(self.shm), *command]
        with open(self.stderr, "ab") as stderr:
            return subprocess.Popen(
                command,
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def _wait(self, popen: subprocess.Popen[bytes]) -> bool:
        """Waits for the interpreter; True if it had to be killed, which its own watchdog should have done."""
        deadline = sum(CASES[name].seconds(self.batch.method) for name in self.names)
        end = time.monotonic() + deadline + 30
        leaving = None
        while popen.poll() is None:
            time.sleep(0.02)
            if leaving is None and '"leaving"' in self._text(self.report)[-100:]:
                leaving = time.monotonic()
            if time.monotonic() > (end if leaving is None else min(end, leaving + EXIT_DEADLINE * SLACK + 5)):
                popen.send_signal(signal.SIGKILL)
                popen.wait()
                return True
        return False

    def _family(self, popen: subprocess.Popen[bytes]) -> list[procs.Process]:
        return procs.family(f"FAULTS_RUN={self.run}", popen.pid)

    def _leftovers(self, popen: subprocess.Popen[bytes], gone: bool, shm: set[str]) -> list[str]:
        left = []
        if not gone:
            left.append(f"processes: {procs.describe(self._family(popen))}")
        if not procs.wait_until(lambda: not self._shm_left(shm), 2.0, step=0.1):
            left.append(f"/dev/shm: {', '.join(self._shm_left(shm)[:5])}")
        if names := [path.name for path in self.tmp.iterdir()]:
            left.append(f"temporary files: {', '.join(names[:5])}")
        return left

    def _shm_left(self, before: set[str]) -> list[str]:
        if self.shm:
            return os.listdir(self.shm)
        # Asked again for a while: the names of a stranger who has just ended look like ours until they are removed.
        return procs.shm_left(before, f"FAULTS_RUN={self.run}")

    @staticmethod
    def _text(path: Path) -> str:
        return path.read_text(errors="replace") if path.exists() else ""

    def _read(self, returncode: int, hung: bool) -> list[Outcome]:
        """From the report, one outcome for each case that was begun (at least one)."""
        batch, outcomes = self.batch, []
        stderr = self.stderr.read_bytes()  # bytes, because tasks write garbage and the offsets count bytes
        records = [json.loads(line) for line in self._text(self.report).splitlines()]
        ends = {record["case"]: record for record in records if record["event"] == "end"}
        starts = {record["case"]: record["stderr"] for record in records if record["event"] == "start"}
        bounds = [*starts.values(), len(stderr)]
        for number, name in enumerate(starts):
            said = stderr[bounds[number] : bounds[number + 1]].decode(errors="replace")
            if name in ends:
                record = ends[name]
                fields = {key: record[key] for key in ("outcome", "reason", "seconds", "detection", "notes")}
                outcomes.append(Outcome(batch.pool, batch.method, name, **fields))
                self._judge_output(outcomes[-1], said)
            else:
                outcomes.append(self._judge_broken(name, returncode, hung, said))
        if not outcomes:
            reason = f"the interpreter ended with {returncode}: {stderr.decode(errors='replace')[-400:]}"
            return [Outcome(batch.pool, batch.method, self.names[0], "fail", reason)]
        last = outcomes[-1]
        if last.case in ends and last.outcome == "pass" and len(ends) == len(self.names) and (hung or returncode):
            dump = self._text(self.directory / "dump")
            last.outcome = "hang" if hung or dump else "fail"
            last.reason = f"at the interpreter's end, status {returncode}"
            last.notes.append(dump)
        return outcomes

    def _judge_output(self, outcome: Outcome, said: str) -> None:
        found = ALARMING.search(said)
        if found is None or CASES[outcome.case].prints:
            return
        line = said[said.rfind("\n", 0, found.start()) + 1 :].strip()
        if outcome.pool != "tpool":
            outcome.notes.append(f"printed: {line.splitlines()[0][:80]}")
        elif outcome.outcome == "pass":
            outcome.outcome, outcome.reason = "fail", f"printed: {line[-600:]}"

    def _judge_broken(self, name: str, returncode: int, hung: bool, said: str) -> Outcome:
        """A case that began and did not end: the watchdog ended the interpreter, or the fault took it along."""
        dump = self._text(self.directory / "dump")
        if dump or hung:
            return Outcome(self.batch.pool, self.batch.method, name, "hang", CASES[name].title, notes=[dump])
        reason = f"took the interpreter down, status {returncode}: {said[-300:]}"
        return Outcome(self.batch.pool, self.batch.method, name, "fail", reason)


def run(batches: Iterable[Batch], jobs: int = 2, tell: Callable[[Outcome], None] | None = None) -> list[Outcome]:
    """Runs all batches, so many at a time, and tells each outcome as it comes."""
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(jobs) as executor:
        for done in executor.map(run_batch, batches):
            outcomes += done
            for one in done:
                if tell:
                    tell(one)
    return outcomes


class Runner:
    """For pytest: starts all selected cases in the background; each test waits for its own."""

    def __init__(self, pool: str, chosen: list[tuple[str, Case]], jobs: int = 2) -> None:
        self._executor = ThreadPoolExecutor(jobs)
        self._futures: dict[tuple[str, str], Future[Any]] = {}
        for batch in plan(pool, chosen):
            future = self._executor.submit(run_batch, batch)
            self._futures |= {(batch.method, name): future for name in batch.names}

    def outcome(self, method: str, name: str) -> Outcome:
        """What became of this case."""
        found = [one for one in self._futures[method, name].result() if one.case == name]
        return found[0]

    def close(self) -> None:
        """Runs nothing more."""
        self._executor.shutdown(cancel_futures=True)
