"""Workers that cannot start, and things that do not pickle or unpickle.

The cases are in ``tests/faults``; each runs in a fresh interpreter with a deadline and a count of what is left.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults.harness import Runner
from faults.pytest_cases import MARKS, judge, parameters, run_selected

pytestmark = MARKS


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    yield from run_selected(request)


@pytest.mark.parametrize(("method", "name"), parameters("cases_start", "cases_pickle"))
def test_fault(runner: Runner, method: str, name: str) -> None:
    judge(runner.outcome(method, name))
