"""The benchmark runner: that it runs, and judges rightly. No times are asserted."""

from __future__ import annotations

import json
import math
from typing import ClassVar

import pytest

pytest.importorskip("numpy")

from benchmarks import __main__ as command
from benchmarks import micro_steps, plots, report, runner, stats
from benchmarks.cases import CASES
from benchmarks.cases.tasks import best_in_order
from benchmarks.peers import PEERS
from benchmarks.remote import DriverFailed, Remote
from benchmarks.runner import Options, run, takes_part
from benchmarks.targets import TARGETS, Target
from benchmarks.verdicts import verdicts


def test_two_tiny_cases_run_with_multiprocessing(tmp_path):
    results = run(
        Options(
            cases=[CASES["tensor-4KB-both"], CASES["noop-imap"]],
            pools=["multiprocessing"],
            rounds=2,
            quick=True,
            out=tmp_path,
            sizes={"items": 4},
            with_limits=False,
        )
    )

    assert results == json.loads(json.dumps(results))
    for case in results["cases"].values():
        played = case["pools"]["multiprocessing"]
        assert (played["status"], [each["turn"] for each in played["rounds"]]) == ("ok", [0, 1])
        assert all(each["times"]["time"] > 0 for each in played["rounds"])
    text = report.markdown(results)
    assert "tensor-4KB-both" in text
    assert "not measured" in text  # tpool's targets: it was not in the run


def test_after_an_interrupt_the_finished_cases_are_kept(tmp_path, monkeypatch):
    outcomes = iter([{"pools": {}}, KeyboardInterrupt()])

    def play(case_run):
        if isinstance(outcome := next(outcomes), BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(runner.CaseRun, "run", play)
    cases = [CASES["tensor-4KB-both"], CASES["noop-imap"], CASES["apply"]]
    results = run(Options(cases=cases, pools=[], quick=True, out=tmp_path, with_limits=False))

    assert list(results["cases"]) == ["tensor-4KB-both"]
    assert results["left_out"] == ["noop-imap", "apply"]


def test_a_driver_that_does_not_answer_in_time_is_killed(tmp_path):
    driver = Remote("multiprocessing", tmp_path / "log")

    with pytest.raises(DriverFailed, match="no answer within 0 s") as failure:
        driver.ask("hello", 0.0)

    assert failure.value.status == "timeout"
    assert driver._process.returncode is not None


def test_every_target_names_a_case_a_pool_and_a_baseline_that_exist():
    groups = {case.group for case in CASES.values()}
    baselines = {*PEERS, "warm_copy", "fresh_copy", "import_torch"}

    for target in TARGETS:
        assert target.case in (groups if target.kind == "break_even" else CASES), target
        assert target.pool in PEERS, target
        assert target.against in baselines, target
        assert target.bound >= 0, target
        if target.kind in ("bandwidth", "memory_batches"):
            assert "nbytes" in CASES[target.case].params, target
        if target.kind == "memory_batches":
            assert CASES[target.case].memory, target


def test_names_on_the_command_line():
    assert {case.name for case in command.chosen_cases("apply,noop-*", quick=False)} == {
        "apply",
        "noop-imap-unordered",
        "noop-imap",
        "noop-map",
        "noop-map-singly",
    }
    assert command.chosen_cases("break-even-*", quick=True) == []
    assert command.main(["--cases", "no-such-case"]) == 2
    assert command.main(["--pools", "no-such-pool"]) == 2


def test_a_pool_takes_part_in_what_it_can_run():
    loader = {"features": [], "cases": ["*"]}

    assert takes_part("dataloader", loader, CASES["tensor-4KB-result"])
    assert not takes_part("dataloader", loader, CASES["tensor-4KB-argument"])
    assert not takes_part("dataloader", {"skipped": "not there"}, CASES["tensor-4KB-result"])


class _Rounds:
    """A fleet of one pool that only counts its rounds, and a machine whose shared memory grows with them."""

    pools: ClassVar = {"tpool": {"features": ["arguments"], "cases": ["*"]}}
    pid = 0

    def __init__(self, held):
        self.held = held  # bytes, after each round
        self.done = []

    def driver(self, name):
        return self

    def open(self, name, workers):
        pass

    close = restart = forget = lambda *_: None

    def ask(self, op, seconds, sample, **what):
        self.done.append("warm-up" if what["warm_up"] else "counted")
        return {"values": {}}

    def shared_nbytes(self):
        return self.held[min(len(self.done), len(self.held)) - 1]


def _rounds(monkeypatch, case, held, **options):
    fleet = _Rounds(held)
    monkeypatch.setattr(runner.proc, "shared_nbytes", fleet.shared_nbytes)
    ran = runner.CaseRun(CASES[case], Options([CASES[case]], ["tpool"], rounds=2, **options), fleet, math.inf).run()
    assert ran["pools"]["tpool"]["status"] == "ok"
    return fleet.done


def test_what_moves_memory_is_warmed_up_until_the_pool_takes_no_more(monkeypatch):
    grows = [128 << 20, 144 << 20, 144 << 20, 160 << 20]
    assert _rounds(monkeypatch, "tensor-1MB-both", grows) == ["warm-up"] * 7 + ["counted"] * 2
    assert _rounds(monkeypatch, "tensor-1MB-both", grows, quick=True) == ["warm-up"] + ["counted"] * 2
    assert _rounds(monkeypatch, "noop-map", grows) == ["warm-up"] + ["counted"] * 2


def test_a_pool_that_takes_more_each_time_is_not_warmed_up_for_ever(monkeypatch):
    monkeypatch.setattr(runner, "_WARM_UP_SECONDS", 0.05)
    done = _rounds(monkeypatch, "tensor-1MB-both", [count << 30 for count in range(1_000_000)])
    assert done.count("warm-up") > 3
    assert done[-3:] == ["warm-up", "counted", "counted"]


def _results(**pools):
    """Results of the case ``apply`` from lists of p50 by pool."""
    runs = {
        name: {
            "status": "ok",
            "reason": "",
            "memory": {},
            "rounds": [
                {
                    "turn": turn,
                    "times": {"p50": seconds, "p99": seconds},
                    "values": {},
                    "parent_cpu": {},
                    "children_cpu": {},
                    "samples": {"apply": [seconds] * 101},
                }
                for turn, seconds in enumerate(times)
                if seconds is not None
            ],
        }
        for name, times in pools.items()
    }
    case = {"description": "", "params": {}, "moved_nbytes": 0, "divisor": 1, "group": "", "x": 0, "pools": runs}
    machine = {"cpu": "", "cores": 2, "virtual": False, "memory_gb": 1, "kernel": "", "python": ""}
    return {
        "machine": machine | {"load_before": 0.0, "load_after": 0.0},
        "limits": {},
        "pools": {name: {"title": name} for name in pools},
        "cases": {"apply": case},
        "left_out": [],
        "options": {"quick": False, "workers": 2},
    }


def test_ratios_are_taken_pair_by_pair():
    # The second turn met a slow moment of the machine; the fourth was not played by tpool.
    results = _results(torch=[1.0, 9.0, 1.0, 5.0], tpool=[0.5, 4.5, 0.7, None])

    p50, p99 = verdicts(results)

    assert (p50.target.metric, p50.measured, p50.met, p50.spread) == ("p50", 0.5, True, (0.5, 0.7))
    assert (p99.target.metric, p99.met) == ("p99", True)


def test_a_pool_that_failed_meets_no_target():
    results = _results(torch=[1.0], tpool=[0.1])
    results["cases"]["apply"]["pools"]["tpool"]["status"] = "timeout"

    assert [verdict.met for verdict in verdicts(results)] == [False, False]
    assert "**timeout**" in report.markdown(results)


def test_runs_agree_where_their_spreads_meet():
    runs = [
        _results(torch=[1.0, 1.0], tpool=[0.5, 0.7]),
        _results(torch=[1.0, 1.0], tpool=[0.3, 0.5]),
        _results(torch=[1.0, 1.0], tpool=[0.8, 0.9]),
    ]

    two, three = ([line for line in report.comparison(runs[:count]).splitlines() if "p50" in line] for count in (2, 3))

    assert two == ["| apply | tpool | p50 ≤ 0.6× the time of torch | 0.6 0.5 – 0.7 | 0.4 0.3 – 0.5 | met | agree |"]
    assert three[0].endswith("| 0.85 0.8 – 0.9 | to either side | **differ** |")


@pytest.mark.leaves("matplotlib keeps the fonts open that it has used")
def test_plots_are_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")

    assert plots.draw(_results(torch=[1.0], tpool=[0.5]), tmp_path) == [tmp_path / "latency.svg"]


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)

    assert plots.draw(_results(torch=[1.0]), tmp_path) == []


def test_statistics():
    assert stats.percentile(range(1, 101), 99) == 99
    assert stats.percentile([3.0], 0) == 3.0
    assert math.isnan(stats.median([]))
    assert stats.crossing([(10, 4.0), (1000, 0.25)]) == pytest.approx(100)
    assert stats.crossing([(10, 0.5)]) == 10
    assert stats.crossing([(10, 2.0)]) is None


@pytest.mark.parametrize(("position", "best"), [(0, 0.5 * (63 + 20)), (63, 31 + 1 + 20 - 0.5)])
def test_the_best_order_without_foresight(position, best):
    durations = [1.0] * 64
    durations[position] = 20.0

    assert best_in_order(durations, 2) == pytest.approx(best, abs=0.5)


def test_a_target_reads_as_a_sentence():
    assert report._bound(Target("apply", "time_ratio", 0.6, metric="p50")) == "p50 ≤ 0.6× the time of torch"


def test_each_hot_step_can_be_measured(monkeypatch):
    monkeypatch.setattr(micro_steps, "ROUNDS", 1)
    monkeypatch.setattr(micro_steps, "COUNT", 20)

    bench = micro_steps.Bench()

    found = {step.name: step.measure() for step in bench.steps()}
    bench.close()

    assert len(found) >= 11
    assert all(microseconds > 0 for microseconds in found.values())
