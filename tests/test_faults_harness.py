"""The harness of the fault cases sees what it is there to see."""

from __future__ import annotations

import pytest
from faults import cases_harness, harness
from faults.harness import Batch, Outcome, run_batch
from faults.script import CASES

pytestmark = pytest.mark.timeout(120)

EXPECTED = {
    "passes": ("pass", ""),
    "fails": ("fail", "as it should"),
    "hangs": ("hang", ""),
    "hangs_in_c": ("hang", ""),
    "crashes": ("fail", "status 3"),
    "impossible": ("n/a", "not here"),
    "leaves_process": ("leak", "processes: python"),
    "leaves_strangers": ("leak", "processes: python"),
    "leaves_daemons": ("leak", "processes: python"),
    "leaves_descriptors": ("leak", " descriptors"),
}


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULTS_SLACK", "0.5")


def play(*names: str, pool: str = "multiprocessing") -> dict[str, Outcome]:
    return {one.case: one for one in run_batch(Batch(pool, "fork", "cases_harness", names))}


def test_each_outcome_of_a_batch_is_seen_and_put_down_to_its_case() -> None:
    outcomes = play(*EXPECTED)

    seen = {name: one.outcome for name, one in outcomes.items()}
    assert seen == {name: outcome for name, (outcome, _) in EXPECTED.items()}
    for name, (_, reason) in EXPECTED.items():
        assert reason in outcomes[name].reason
    assert outcomes["passes"].notes == ["a note"]
    assert "in hangs" in "".join(outcomes["hangs"].notes), "the dump of the stacks is missing"


def test_what_is_printed_is_put_down_to_its_case() -> None:
    outcomes = play("passes", "prints_traceback", "may_print_traceback", "passes_again", pool="tpool")

    assert [one.outcome for one in outcomes.values()] == ["pass", "fail", "pass", "pass"]
    assert "printed: Traceback" in outcomes["prints_traceback"].reason


@pytest.mark.parametrize(
    ("name", "outcome", "reason"),
    [
        ("leaves_shm", "leak", "/dev/shm: faults-leak"),
        ("leaves_file", "leak", "temporary files: left"),
        ("hangs_at_exit", "hang", "at the interpreter's end"),
    ],
)
def test_what_is_left_after_the_interpreter_is_seen(name: str, outcome: str, reason: str) -> None:
    (one,) = play(name).values()

    if one.outcome == "n/a":
        pytest.skip(one.reason)
    assert one.outcome == outcome
    assert reason in one.reason


def test_what_a_pool_cannot_do_is_no_failure() -> None:
    (outcome,) = run_batch(Batch("concurrent.futures", "fork", "cases_end", ("terminate_sleeping",)))

    assert outcome.outcome == "n/a"
    assert "terminate" in outcome.reason


def test_a_peer_that_breaks_is_seen_to_break() -> None:
    (outcome,) = run_batch(Batch("concurrent.futures", "fork", "cases_workers", ("kill_among_others",)))

    assert outcome.outcome == "fail"
    assert "nobody killed" in outcome.reason


def test_a_plan_plays_each_chosen_case_once() -> None:
    chosen = harness.select("tpool", ("forkserver", "spawn"), everything=True)

    batches = harness.plan("tpool", chosen)

    planned = sorted((batch.method, name) for batch in batches for name in batch.names)
    assert planned == sorted((method, case.name) for method, case in chosen)
    assert all(len(batch.names) == 1 for batch in batches if any(CASES[name].alone for name in batch.names))
    assert all(CASES[name].module == batch.module for batch in batches for name in batch.names)


def test_the_cases_of_the_harness_itself_are_not_in_the_table() -> None:
    assert cases_harness.passes.__name__ in CASES
    assert not [case for _, case in harness.select("tpool", ("fork",)) if case.module == "cases_harness"]
