"""Cases as tests: all that were selected run in the background, two interpreters at a time; each test awaits its own.

``FAULTS=all`` in the environment also runs what CI leaves out: slow cases, and every case under ``fork`` and ``spawn``
(CI has ten minutes; the tests of the pool itself run under all three start methods).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from . import harness
from .script import CASES, METHODS

MARKS = [
    # A test waits for its batch, and the first of them for those before it.
    pytest.mark.timeout(900),
    pytest.mark.leaves("its cases run in the background, and the harness counts what each of them leaves"),
]


def parameters(*modules: str) -> list[object]:
    """Start method and name of each case of these modules."""
    everything = os.environ.get("FAULTS") == "all"
    methods = METHODS if everything else METHODS[:1]
    chosen = harness.select("tpool", methods, modules=modules, everything=everything)
    # In the order in which batches run, so that a test seldom waits while others are done.
    order = [(batch.method, name) for batch in harness.plan("tpool", chosen) for name in batch.names]
    return [pytest.param(method, name, id=f"{method}-{name}") for method, name in order]


def run_selected(request: pytest.FixtureRequest) -> Iterator[harness.Runner]:
    """The body of a fixture of module scope: runs those cases of the module that this session has selected."""
    wanted = [item.callspec.params for item in request.session.items if item.module is request.module]
    chosen = [(params["method"], CASES[params["name"]]) for params in wanted]
    runner = harness.Runner("tpool", chosen)
    yield runner
    runner.close()


def judge(outcome: harness.Outcome) -> None:
    """Passes, skips or fails the test by what became of its case."""
    story = "\n".join([f"{outcome.outcome}: {outcome.reason}", *outcome.notes])
    if outcome.outcome == "n/a":
        pytest.skip(outcome.reason)
    if outcome.outcome != "pass":
        pytest.fail(story, pytrace=False)
