"""Runs cases on pools in lockstep and gathers what the drivers report. Knows nothing about pools or tables.

A failed pool is dropped for the case at hand, with the reason; its driver is killed, and another started for the next
case.
"""

from __future__ import annotations

import fnmatch
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import limits, proc
from benchmarks.case import WORKERS, Case, Parameter
from benchmarks.fleet import Fleet
from benchmarks.remote import DriverFailed

_QUICK_DEADLINE_SECONDS = 20.0

# A worker that comes to one chunk more than ever before takes new memory for its results, which costs more than the
# round: with 128 of 1 MB both ways 30 to 45 ms instead of 20, in three to five of the first twelve rounds.
_STEADY_ROUNDS = 3
_WARM_UP_SECONDS = 2.0
_NOISE_NBYTES = 1 << 20


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        cases: the cases, in order.
        pools: names of pools, in the order of their turns.
        rounds: counted rounds; None for each case's own number.
        quick: small sizes, pools kept from case to case, one round only of whatever needs more than a second.
        out: folder for results and the drivers' logs.
        sizes: parameters that replace those of any case.
        budget: seconds after which no further case or round is begun.
        with_limits: whether to measure the machine's limits.
    """

    cases: Sequence[Case]
    pools: Sequence[str]
    rounds: int | None = None
    quick: bool = False
    out: Path = Path("benchmark-results")
    sizes: dict[str, Parameter] = field(default_factory=dict)
    budget: float = float("inf")
    with_limits: bool = True


@dataclass
class PoolRun:
    """What one pool did in one case, as it goes into the results."""

    status: str = "ok"
    reason: str = ""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    warm_up_seconds: float = 0.0


Step = Callable[[str, PoolRun], None]


def run(options: Options) -> dict[str, Any]:
    """Run everything; after a Ctrl-C the rest is left out.

    Returns:
        The results, ready for JSON: ``machine``, ``limits``, ``pools``, ``cases``, ``left_out``, ``options``,
        ``seconds``.
    """
    begun = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = proc.describe_machine()
    measured = {"before": limits.measure()} if options.with_limits else {}
    fleet = Fleet(options.pools, options.out)
    cases: dict[str, Any] = {}
    left_out: list[str] = []
    try:
        fleet.greet()
        for name, pool in fleet.pools.items():
            _say(f"{name}: " + (f"skipped, {pool['skipped']}" if "skipped" in pool else pool["version"]))
        for case in options.cases:
            if time.monotonic() - begun > options.budget:
                left_out.append(case.name)
                continue
            _say(case.name)
            cases[case.name] = CaseRun(case, options, fleet, begun + options.budget).run()
    except KeyboardInterrupt:  # half an hour of measuring must not be lost
        _say("interrupted: the cases that were finished are kept")
        left_out = [case.name for case in options.cases if case.name not in cases]
    finally:
        fleet.stop()
    if measured and not options.quick:
        measured["after"] = limits.measure()
    machine["load_after"] = os.getloadavg()[0]
    return {
        "machine": machine,
        "limits": measured,
        "pools": fleet.pools,
        "cases": cases,
        "left_out": left_out,
        "options": {"quick": options.quick, "rounds": options.rounds, "workers": WORKERS},
        "seconds": time.monotonic() - begun,
    }


class CaseRun:
    """One case: each step is done by every pool that is still in it before the next step begins.

    Args:
        case: what to run.
        options: of the whole run.
        fleet: the drivers.
        end: the time (monotonic) after which no further round is begun.
    """

    def __init__(self, case: Case, options: Options, fleet: Fleet, end: float) -> None:
        self._case = case
        self._fleet = fleet
        self._end = end
        self._quick = options.quick
        self._deadline = min(case.deadline, _QUICK_DEADLINE_SECONDS) if self._quick else case.deadline
        self._count = options.rounds or case.rounds
        self._sizes = {**case.sizes(options.quick), **options.sizes}
        self._runs = {name: PoolRun() for name, pool in fleet.pools.items() if takes_part(name, pool, case)}

    def run(self) -> dict[str, Any]:
        """All steps; returns what goes into the results."""
        self._for_each(self._prepare)
        if self._case.warm_up:
            self._for_each(self._warm_up)
        for turn in range(self._count):
            self._for_each(lambda name, run, turn=turn: self._counted_round(name, run, turn))  # type: ignore[misc]
        if self._case.memory:
            self._for_each(self._memory_round)
        if not self._quick:
            # No pool is kept for the next case: what a case leaves behind must not count against another.
            self._for_each(lambda name, _run: self._fleet.close(name))
        return {
            "description": self._case.description,
            "params": self._sizes,
            "moved_nbytes": self._case.moved_nbytes(self._sizes),
            "divisor": self._case.divisor(self._sizes),
            "group": self._case.group,
            "x": self._case.x,
            "pools": {name: asdict(run) for name, run in self._runs.items()},
        }

    def _for_each(self, step: Step) -> None:
        for name, run in self._runs.items():
            if run.status != "ok" or time.monotonic() > self._end:
                continue
            try:
                step(name, run)
            except DriverFailed as failure:
                run.status, run.reason = failure.status, str(failure)
                self._fleet.forget(name)
                _say(f"  {name}: {failure.status}, {failure}")

    def _prepare(self, name: str, run: PoolRun) -> None:
        """Open the pool, or close it if the case wants pools of its own; then see how much memory there is."""
        if self._case.pool == "shared":
            self._fleet.open(name, int(self._sizes.get("workers", WORKERS)))
        else:
            self._fleet.close(name)
        if self._case.memory:
            run.memory = {"before": _held_nbytes(self._fleet.driver(name).pid)}

    def _warm_up(self, name: str, run: PoolRun) -> None:
        """One round; of a case that moves memory, on to where a pool that keeps it needs no more: the steady state."""
        begun = time.monotonic()
        self._round(name, warm_up=True)
        run.warm_up_seconds = time.monotonic() - begun
        if self._quick or not self._case.moved_nbytes(self._sizes):
            return
        held, steady = proc.shared_nbytes(), 0
        while steady < _STEADY_ROUNDS and time.monotonic() < begun + _WARM_UP_SECONDS:
            self._round(name, warm_up=True)
            before, held = held, proc.shared_nbytes()
            steady = steady + 1 if held < before + _NOISE_NBYTES else 0

    def _counted_round(self, name: str, run: PoolRun, turn: int) -> None:
        if self._quick and run.warm_up_seconds > 1 and run.rounds:
            return  # one round of a slow pool is enough for a first look
        if self._case.pool == "fresh":
            self._fleet.restart(name)
        run.rounds.append({"turn": turn, **self._round(name)})

    def _memory_round(self, name: str, run: PoolRun) -> None:
        """A further round whose time does not count, because sampling the memory disturbs it."""
        pid = self._fleet.driver(name).pid
        samples: list[int] = []
        self._round(name, sample=lambda: samples.append(_held_nbytes(pid)))
        run.memory |= {"peak": max(samples, default=0), "after": _held_nbytes(pid)}

    def _round(self, name: str, warm_up: bool = False, sample: Callable[[], None] | None = None) -> dict[str, Any]:
        driver = self._fleet.driver(name)
        return driver.ask("round", self._deadline, sample, case=self._case.name, params=self._sizes, warm_up=warm_up)


def takes_part(name: str, pool: dict[str, Any], case: Case) -> bool:
    """Whether a pool that described itself so is there and can run the case."""
    return (
        "skipped" not in pool
        and case.needs <= set(pool["features"])
        and any(fnmatch.fnmatchcase(case.name, pattern) for pattern in pool["cases"])
        and (case.only is None or name in case.only)
    )


def _held_nbytes(pid: int) -> int:
    """What the tree holds: its heaps, and the machine's shared memory, as no pool keeps all of its own mapped."""
    return proc.tree_anonymous_nbytes(pid) + proc.shared_nbytes()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
