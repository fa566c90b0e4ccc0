"""The results as pictures, if matplotlib is there: bars by size, latency percentiles, scaling, break-even."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.stats import median, paired_ratios
from benchmarks.verdicts import Results, times

# matplotlib's own without the red, which is tpool's, and more of them.
_COLORS = [
    *(f"tab:{color}" for color in ("blue", "orange", "green", "purple", "brown", "pink", "gray", "olive", "cyan")),
    "navy",
    "gold",
    "teal",
]


def draw(results: Results, out: Path) -> list[Path]:
    """Draw what the results have data for.

    Returns:
        The files written; none without matplotlib.
    """
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        return []
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    drawn = []
    for name, plot in _PLOTS.items():
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        axes.set_prop_cycle(color=_COLORS)
        if plot(results, axes):
            axes.legend(fontsize="small")
            path = out / f"{name}.svg"
            figure.savefig(path)
            drawn.append(path)
        pyplot.close(figure)
    return drawn


def _group(results: Results, group: str) -> list[tuple[float, str]]:
    """The cases of a sweep in order: (x, name)."""
    return sorted((case["x"], name) for name, case in results["cases"].items() if case["group"] == group)


def _pools(results: Results) -> list[str]:
    return [name for name, pool in results["pools"].items() if "skipped" not in pool]


def _style(pool: str) -> dict[str, Any]:
    """tpool stands out; the baseline is black; the others keep matplotlib's colours."""
    return {"tpool": {"linewidth": 3, "color": "tab:red"}, "torch": {"linewidth": 2, "color": "black"}}.get(pool, {})


def _bars(results: Results, axes: Any) -> bool:
    """Speed relative to torch by size, tensors both ways (or whichever direction was run)."""
    cases = next((found for way in ("both", "result", "argument") if (found := _group(results, f"tensor-{way}"))), [])
    pools = [pool for pool in _pools(results) if any(times(results, name, pool) for _, name in cases)]
    if not cases or "torch" not in pools:
        return False
    for place, pool in enumerate(pools):
        heights = [
            median(paired_ratios(times(results, name, "torch"), times(results, name, pool))) for _, name in cases
        ]
        width = 0.8 / len(pools)
        color = _style(pool).get("color")
        axes.bar([x + place * width for x in range(len(cases))], heights, width, label=pool, color=color)
    axes.set_xticks([x + 0.4 for x in range(len(cases))], [name.removeprefix("tensor-") for _, name in cases])
    axes.set(yscale="log", ylabel="times as fast as torch.multiprocessing", title="Tensors by size")
    axes.axhline(1, color="black", linewidth=0.8)
    return True


def _latency(results: Results, axes: Any) -> bool:
    """Percentiles of the round trip of ``apply``."""
    case = results["cases"].get("apply")
    drawn = False
    for pool, run in case["pools"].items() if case else ():
        curves = [each["samples"]["apply"] for each in run["rounds"]]
        if curves:
            merged = [median([curve[percent] for curve in curves]) * 1e6 for percent in range(101)]
            axes.plot(range(101), merged, label=pool, **_style(pool))
            drawn = True
    axes.set(yscale="log", xlabel="percentile", ylabel="round trip (µs)", title="apply of a no-op")
    return drawn


def _sweep(group: str, title: str, x: str, y: str, value: Callable[[Results, str, str], float | None]) -> Any:
    """A plot of one line per pool over the cases of a group."""

    def plot(results: Results, axes: Any) -> bool:
        drawn = False
        for pool in _pools(results):
            points = [(at, value(results, name, pool)) for at, name in _group(results, group)]
            known = [(at, found) for at, found in points if found is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", label=pool, **_style(pool))
                drawn = True
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=title)
        return drawn

    return plot


def _microseconds_per(parameter: str) -> Callable[[Results, str, str], float | None]:
    def value(results: Results, name: str, pool: str) -> float | None:
        measured = list(times(results, name, pool).values())
        params = results["cases"][name]["params"]
        return 1e6 * median(measured) / params["items"] / params.get(parameter, 1) if measured else None

    return value


def _bandwidth(results: Results, name: str, pool: str) -> float | None:
    measured = list(times(results, name, pool).values())
    return results["cases"][name]["moved_nbytes"] / median(measured) / 1e9 if measured else None


def _parent_cpu(results: Results, name: str, pool: str) -> float | None:
    run = results["cases"][name]["pools"].get(pool)
    return median([each["values"]["parent_cpu_us"] for each in run["rounds"]]) if run and run["rounds"] else None


def _peak_megabytes(results: Results, name: str, pool: str) -> float | None:
    memory = results["cases"][name]["pools"].get(pool, {}).get("memory", {})
    return max(1.0, (memory["peak"] - memory["before"]) / 1e6) if "peak" in memory else None


def _against_loop(results: Results, name: str, pool: str) -> float | None:
    ratios = paired_ratios(times(results, name, pool, "serial"), times(results, name, pool))
    return median(ratios) if ratios else None


_PLOTS: dict[str, Callable[[Results, Any], bool]] = {
    "tensors-by-size": _bars,
    "latency": _latency,
    "scaling-workers": _sweep(
        "scaling-workers", "Sleeping tasks", "workers", "the caller's CPU time per task (µs)", _parent_cpu
    ),
    "scaling-tensors": _sweep(
        "scaling-tensors", "Tensors per message", "tensors", "time per tensor (µs)", _microseconds_per("tensors")
    ),
    "scaling-size": _sweep("scaling-size", "Results by size", "bytes per tensor", "GB/s", _bandwidth),
    "stream-length": _sweep("stream-length", "Memory of a stream of 19 MB batches", "batches", "MB", _peak_megabytes),
    "break-even": _sweep(
        "break-even",
        "Two workers against a serial loop",
        "work per 150 KB tensor (µs)",
        "times as fast as the loop",
        _against_loop,
    ),
}
