"""All cases by name, in the order of the table of targets."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.cases import lifecycle, scaling, streams, tasks, tensors

CASES: dict[str, Case] = {
    case.name: case for module in (tensors, streams, tasks, lifecycle, scaling) for case in module.cases()
}
