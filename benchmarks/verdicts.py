"""Whether the targets were met, from the results alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.stats import crossing, median, paired_ratios
from benchmarks.targets import TARGETS, Target

Results = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured.

    Attributes:
        measured: in the unit of the target's bound; None if it could not be measured.
        met: None as well then; but False if the pool failed in the case.
        spread: smallest and largest ratio of a pair, where ratios are what counts.
    """

    target: Target
    measured: float | None
    met: bool | None
    spread: tuple[float, float] | None = None


def verdicts(results: Results) -> list[Verdict]:
    """All targets whose case was run."""
    return [_judge(results, target) for target in TARGETS if _was_run(results, target)]


def _was_run(results: Results, target: Target) -> bool:
    return target.case in results["cases"] or any(case["group"] == target.case for case in results["cases"].values())


def _judge(results: Results, target: Target) -> Verdict:
    ratios = _ratios(results, target)
    if ratios:
        measured: float | None = median(ratios)
        spread = min(ratios), max(ratios)
    else:
        measured, spread = _single(results, target), None
    if measured is None:
        return Verdict(target, None, False if _failed(results, target) else None)
    at_least = target.kind in ("speedup", "bandwidth", "break_even")
    met = measured >= target.bound if at_least else measured <= target.bound
    return Verdict(target, measured, met, spread)


def _failed(results: Results, target: Target) -> bool:
    case = results["cases"].get(target.case)
    run = case["pools"].get(target.pool) if case else None
    return run is not None and run["status"] != "ok"


def _ratios(results: Results, target: Target) -> list[float]:
    if target.kind not in ("speedup", "time_ratio"):
        return []
    ours = times(results, target.case, target.pool, target.metric)
    theirs = times(results, target.case, target.against, target.metric)
    return paired_ratios(theirs, ours) if target.kind == "speedup" else paired_ratios(ours, theirs)


def _single(results: Results, target: Target) -> float | None:
    if target.kind == "break_even":
        ours, theirs = break_even(results, target.pool), break_even(results, target.against)
        return theirs / ours if ours and theirs else None
    case = results["cases"][target.case]
    run = case["pools"].get(target.pool)
    if run is None or run["status"] != "ok" or not run["rounds"]:
        return None
    if target.kind == "value":
        return median([each["values"][target.metric] for each in run["rounds"]])
    if target.kind == "memory_batches":
        memory = run["memory"]
        return (memory["peak"] - memory["before"]) / float(case["params"]["nbytes"]) if "peak" in memory else None
    seconds = median(list(times(results, target.case, target.pool, target.metric).values()))
    limit = limits(results).get(target.against)
    if limit is None:
        return None
    return float(case["moved_nbytes"]) / seconds / limit if target.kind == "bandwidth" else seconds / limit


def limits(results: Results) -> dict[str, float]:
    """The machine's limits, the mean of before and after."""
    measured = list(results["limits"].values())
    return {name: sum(each[name] for each in measured) / len(measured) for name in measured[0]} if measured else {}


def times(results: Results, case: str, pool: str, metric: str = "time") -> dict[int, float]:
    """Seconds of the counted rounds by turn; empty if the pool was not in the case or failed in it.

    A pool that failed in a later round has no times: the rounds before might be its good ones.
    """
    run = results["cases"][case]["pools"].get(pool)
    if run is None or run["status"] != "ok":
        return {}
    return {each["turn"]: each["times"][metric] for each in run["rounds"] if metric in each["times"]}


def break_even(results: Results, pool: str) -> float | None:
    """Microseconds of work per tensor at which two workers overtake the loop; None if they never do."""
    points = []
    for name, case in results["cases"].items():
        if case["group"] == "break-even":
            ratios = paired_ratios(times(results, name, pool), times(results, name, pool, "serial"))
            if ratios:
                points.append((case["x"], median(ratios)))
    return crossing(points)
