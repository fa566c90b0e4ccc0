"""The few statistics that the report needs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that `percent` of all samples do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def paired_ratios(numerator: Mapping[int, float], denominator: Mapping[int, float]) -> list[float]:
    """Ratios of the rounds that both have, by round number: the same moment of the machine meets both."""
    return [numerator[turn] / denominator[turn] for turn in numerator if turn in denominator and denominator[turn] > 0]


def median(values: Sequence[float]) -> float:
    """The median; not a number if there is nothing."""
    return statistics.median(values) if values else math.nan


def crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """Where a curve of (x, ratio) first falls to 1, between two points on logarithmic axes.

    Returns:
        The x; the first x if the curve starts below 1, None if it never gets there.
    """
    previous: tuple[float, float] | None = None
    for x, ratio in sorted(points):
        if ratio <= 1:
            if previous is None:
                return x
            x0, ratio0 = previous
            part = math.log(ratio0) / (math.log(ratio0) - math.log(ratio))
            return x0 * math.exp(part * math.log(x / x0))
        previous = x, ratio
    return None
