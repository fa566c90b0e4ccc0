"""The results as Markdown: the machine and its limits, targets, all pools side by side, their costs and failures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.stats import median, paired_ratios
from benchmarks.targets import Target
from benchmarks.verdicts import Results, Verdict, break_even, times, verdicts

_BASELINE = "torch"
_LIMIT_NAMES = {
    "warm_copy": "copy 16 MB into shared memory that is mapped already",
    "fresh_copy": "copy 16 MB into new shared memory",
    "round_trip": "64 bytes to another process and back (p50)",
    "round_trip_p99": "64 bytes to another process and back (p99)",
    "fork": "fork a process that has imported torch, and wait for it",
    "import_torch": "start an interpreter and import torch",
}
_UNITS = {"wakeups": "", "cpu_ms": " ms", "uss_mb": " MB", "over_best": "×", "parent_cpu_us": " µs"}
_VALUE_NAMES = {
    "wakeups": "wake-ups",
    "cpu_ms": "CPU",
    "uss_mb": "USS",
    "over_best": "time / best possible",
    "parent_cpu_us": "the caller's CPU per task",
}


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [
        _heading(results),
        _limits(results),
        _targets(results),
        _table(results),
        _costs(results),
        _break_even(results),
        _pools(results),
        _failures(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison(runs: Sequence[Results]) -> str:
    """The targets of several runs side by side.

    Two runs agree on a ratio where its spreads over their rounds meet; what is no ratio has no spread.
    """
    judged = [{verdict.target: verdict for verdict in verdicts(results)} for results in runs]
    rows = []
    for target in dict.fromkeys(target for each in judged for target in each):
        found = [verdict for each in judged if (verdict := each.get(target)) is not None and verdict.met is not None]
        if not found:
            continue
        outcomes = {verdict.met for verdict in found}
        met = "to either side" if len(outcomes) > 1 else "met" if True in outcomes else "**missed**"
        spreads = [verdict.spread for verdict in found if verdict.spread is not None]
        meet = not spreads or max(low for low, _ in spreads) <= min(high for _, high in spreads)
        cells = [" ".join(_measured(each[target])).strip() if target in each else "" for each in judged]
        agree = "" if len(spreads) < 2 else "agree" if meet else "**differ**"
        rows.append([target.case, target.pool, _bound(target), *cells, met, agree])
    head = ["case", "pool", "target", *(f"run {number} (range)" for number in range(1, len(runs) + 1)), "", "runs"]
    return _grid(head, rows) + "\n"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e6:.2g} µs"


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _heading(results: Results) -> str:
    machine, options = results["machine"], results["options"]
    where = f"{machine['cpu']}, {machine['cores']} cores{' (virtual)' if machine['virtual'] else ''}"
    return (
        "# Benchmarks\n\n"
        f"{where}, {machine['memory_gb']} GB, Linux {machine['kernel']}, Python {machine['python']}. "
        f"{options['workers']} workers, one thread each. Load before and after: "
        f"{machine['load_before']:.2f}, {machine['load_after']:.2f}."
        + (" A quick run: small sizes, few rounds; a first look, not a result." if options["quick"] else "")
    )


def _limits(results: Results) -> str:
    if not results["limits"]:
        return ""
    rows = []
    for name, text in _LIMIT_NAMES.items():
        values = [each[name] for each in results["limits"].values()]
        rows.append(
            [text, *(f"{each / 1e9:.2f} GB/s" if name.endswith("copy") else duration(each) for each in values)]
        )
    return "## The machine's limits\n\n" + _grid(["limit", *results["limits"]], rows)


def _targets(results: Results) -> str:
    judged = verdicts(results)
    if not judged:
        return ""
    met = sum(verdict.met is True for verdict in judged)
    missed = sum(verdict.met is False for verdict in judged)
    counts = f"{met} met, {missed} missed, {len(judged) - met - missed} not measured."
    rows = [_target_row(verdict) for verdict in judged]
    return f"## Targets\n\n{counts}\n\n" + _grid(["case", "pool", "target", "measured", "(range)", ""], rows)


def _target_row(verdict: Verdict) -> list[str]:
    target = verdict.target
    missed = "**failed**" if verdict.measured is None else "**missed**"
    outcome = {True: "met", False: missed, None: "not measured"}[verdict.met]
    return [target.case, target.pool, _bound(target), *_measured(verdict), outcome]


def _measured(verdict: Verdict) -> tuple[str, str]:
    """What was measured, and the spread."""
    spread = "" if verdict.spread is None else f"{verdict.spread[0]:.3g} – {verdict.spread[1]:.3g}"
    return "–" if verdict.measured is None else f"{verdict.measured:.3g}", spread


def _bound(target: Target) -> str:
    metric = "" if target.metric == "time" else f"{_VALUE_NAMES.get(target.metric, target.metric)} "
    return (
        metric
        + {
            "speedup": f"≥ {target.bound:g}× as fast as {target.against}",
            "time_ratio": f"≤ {target.bound:g}× the time of {target.against}",
            "bandwidth": f"≥ {target.bound:g} of the limit {target.against}",
            "limit_time": f"≤ {target.bound:g}× the limit {target.against}",
            "value": f"≤ {target.bound:g}{_UNITS.get(target.metric, '')}",
            "memory_batches": f"at most {target.bound:g} batches held",
            "break_even": f"overtakes the loop with 1/{target.bound:g} of the work that {target.against} needs",
        }[target.kind]
    )


def _present(results: Results) -> list[str]:
    return [name for name, pool in results["pools"].items() if "skipped" not in pool]


def _table(results: Results) -> str:
    pools = _present(results)
    rows = []
    for name, case in results["cases"].items():
        for kind in ("times", "values"):
            for metric in _metrics(case, kind):
                label = _VALUE_NAMES.get(metric, metric)
                title = case["description"] + _size(case["params"]) + (f" · {label}" if metric != "time" else "")
                cell = _time_cell if kind == "times" else _value_cell
                rows.append([name, title, *(cell(results, name, pool, metric) for pool in pools)])
    text = (
        "Time per item where a case has items (else in all), median of the rounds; in brackets how many times faster "
        f"than {_BASELINE}, the median of the ratios of paired rounds. –: the pool cannot run the case."
    )
    return f"## All pools\n\n{text}\n\n" + _grid(["case", "what", *pools], rows)


def _bytes(count: float) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} KB"


def _size(params: dict[str, Any]) -> str:
    """How many items of what size, as far as the case has them."""
    count = params.get("items", params.get("sends"))
    nbytes = params.get("nbytes")
    return (f", {count:,}" + (f" × {_bytes(nbytes)}" if nbytes else "") + " a round") if count else ""


def _metrics(case: dict[str, Any], kind: str) -> list[str]:
    """Names of the times or values that any pool has, in order; percentiles in place of their sum."""
    found = {metric: None for run in case["pools"].values() for each in run["rounds"] for metric in each[kind]}
    if "p50" in found or "over_best" in found:
        found.pop("time", None)
    return list(found)


def _time_cell(results: Results, name: str, pool: str, metric: str) -> str:
    case = results["cases"][name]
    measured = times(results, name, pool, metric)
    if not measured:
        return _missing(case, pool)
    whole = metric in ("p50", "p99")
    text = duration(median(list(measured.values())) / (1 if whole else case["divisor"]))
    ratios = paired_ratios(times(results, name, _BASELINE, metric), measured)
    return text if pool == _BASELINE or not ratios else f"{text} ({median(ratios):.2g}×)"


def _value_cell(results: Results, name: str, pool: str, metric: str) -> str:
    case = results["cases"][name]
    run = case["pools"].get(pool)
    values = [each["values"][metric] for each in run["rounds"] if metric in each["values"]] if run else []
    return f"{median(values):.3g}{_UNITS.get(metric, '')}" if values else _missing(case, pool)


def _missing(case: dict[str, Any], pool: str) -> str:
    run = case["pools"].get(pool)
    return "–" if run is None else f"**{run['status']}**" if run["status"] != "ok" else ""


def _costs(results: Results) -> str:
    pools = _present(results)
    rows = []
    for name, case in results["cases"].items():
        cells = [_cost_cell(case, pool) for pool in pools]
        if any(cells):
            rows.append([name, *cells])
    text = (
        "CPU time per item, caller + workers and helpers (medians); and where memory was watched, the rise of heap "
        "and shared memory at its peak in a round, and what was still held after it."
    )
    return f"## What it costs\n\n{text}\n\n" + _grid(["case", *pools], rows) if rows else ""


def _cost_cell(case: dict[str, Any], pool: str) -> str:
    run = case["pools"].get(pool)
    if run is None or run["status"] != "ok":
        return ""
    rounds = [each for each in run["rounds"] if "time" in each["parent_cpu"]]
    if not rounds:
        return ""
    parent, children = (
        duration(median([each[who]["time"] for each in rounds]) / case["divisor"])
        for who in ("parent_cpu", "children_cpu")
    )
    memory = run["memory"]
    rise = [(memory[when] - memory["before"]) / 1e6 for when in ("peak", "after")] if "peak" in memory else []
    return f"{parent} + {children}" + (f"; {rise[0]:.0f} MB, {rise[1]:.0f} MB" if rise else "")


def _break_even(results: Results) -> str:
    if not any(case["group"] == "break-even" for case in results["cases"].values()):
        return ""
    found = {pool: break_even(results, pool) for pool in _present(results)}
    rows = [[pool, "never" if work is None else f"{work:.0f} µs"] for pool, work in found.items()]
    return "## Break-even\n\nWork per 150 KB tensor from which two workers overtake the serial loop.\n\n" + _grid(
        ["pool", "work"], rows
    )


def _pools(results: Results) -> str:
    rows = [
        [name, pool["title"], pool.get("version", ""), pool.get("note", f"skipped: {pool.get('skipped')}")]
        for name, pool in results["pools"].items()
    ]
    return "## The pools\n\n" + _grid(["name", "", "version", "how it is used"], rows)


def _failures(results: Results) -> str:
    lines = [
        f"- {name}, {pool}: {run['status']} after {len(run['rounds'])} rounds: {run['reason']}"
        for name, case in results["cases"].items()
        for pool, run in case["pools"].items()
        if run["status"] != "ok"
    ]
    if results["left_out"]:
        lines.append(
            f"- left out, because the time was up or the run was interrupted: {', '.join(results['left_out'])}"
        )
    return "## Failures and gaps\n\n" + "\n".join(lines) if lines else ""
