"""Who did what when: pool.timeline(), with real processes; its two forms, checked as their readers would."""

from __future__ import annotations

import itertools
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pool_tasks as tasks
import pytest
import torch
from support import wait_until

import tpool
from tpool.local.trace import Trace
from tpool.timeline.columns import Columns
from tpool.timeline.picture import svg_picture
from tpool.timeline.spans import Spans, TaskSpan
from tpool.timeline.timeline import Timeline

DEADLINE = 60
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def seen():
    """A timeline of some of everything, with when it was made, and the pool's stats."""
    with tpool.Pool(2, timeline=True) as pool:
        pool.map(tasks.double, range(8), chunksize=1)
        before = time.monotonic()
        pool.map(tasks.sleep, [0.02] * 6, chunksize=1)
        pool.map(tasks.double, [torch.ones(1 << 18)] * 3, chunksize=1)
        list(pool.imap_unordered(tasks.identity, itertools.chain(range(2999), [torch.ones(1 << 18)])))
        for number in range(5):
            pool.apply(tasks.identity, (number,))
        with pytest.raises(tpool.WorkerLostError):
            pool.submit(tasks.kill_self).result(DEADLINE)
        span = before - pool._engine.look().began, time.monotonic() - pool._engine.look().began
        stats = pool.stats()
    return pool.timeline(), span, stats


# What it tells ----------------------------------------------------------------------------------------------------


def test_every_task_is_there_once(seen):
    timeline, _, stats = seen
    done = [(task.call, task.task) for task in timeline.tasks if not task.fate]
    streamed = [task for call, task in done if call == "imap_unordered(identity)"]
    assert sorted(streamed) == list(range(3000))
    counts = {call: sum(name == call for name, _ in done) for call, _ in done}
    assert counts == {
        "map(double)": 11, "map(sleep)": 6, "imap_unordered(identity)": 3000, "apply(identity)": 5
    }  # fmt: skip
    assert len(done) == stats.tasks_done
    assert timeline.dropped == 0
    assert repr(timeline) == f"<tpool.Timeline of {len(timeline.tasks)} tasks>"


def test_times_are_those_of_the_callers_clock(seen):
    timeline, (before, after), stats = seen
    for task in timeline.tasks:
        assert task.began <= task.received <= task.ran <= task.ended <= after
        assert task.began >= before or task.call == "map(double)"
    assert all(0.02 <= task.ran - task.received < 1 for task in timeline.tasks if task.call == "map(sleep)")
    for worker in stats.workers:
        own = [task for task in timeline.tasks if task.worker == worker.id]
        assert all(one.ended <= other.began for one, other in itertools.pairwise(own))
        done = [task for task in own if not task.fate]
        assert sum(task.ended - task.began for task in done) == pytest.approx(worker.busy_seconds)
        parts = sum(task.received - task.began + task.ended - task.ran for task in done)
        assert parts == pytest.approx(worker.transfer_seconds)


def test_bytes_and_what_the_caller_encoded(seen):
    timeline, _, _ = seen
    heavy = [task for task in timeline.tasks if task.received_nbytes >= 1 << 20]
    assert len(heavy) == 4
    assert all(task.sent_nbytes >= 1 << 20 for task in heavy)
    assert {span.thread for span in timeline.encodings} == {"MainThread", "feeder 1"}
    assert [span.thread for span in timeline.encodings if span.nbytes >= 1 << 20] == ["MainThread"] * 3 + ["feeder 1"]
    assert sum(span.thread == "feeder 1" for span in timeline.encodings) == 1
    assert all(span.began <= span.ended for span in timeline.encodings)


def test_a_lost_worker(seen):
    timeline, _, _ = seen
    (lost,) = [task for task in timeline.tasks if task.fate == "lost"]
    assert lost.call == "apply(kill_self)"
    (life,) = [life for life in timeline.lives if life.lost and "SIGKILL" in life.why]
    assert (life.worker, life.ended) == (lost.worker, lost.ended)
    assert life.began < life.ready < lost.began


def test_what_runs_and_an_earlier_worker_of_the_place(tmp_path):
    with tpool.Pool(1, maxtasksperchild=2, timeline=True) as pool:
        pool.map(tasks.identity, range(5), chunksize=1)
        pool.submit(tasks.tell_pid_and_wait, str(tmp_path / "pid"), str(tmp_path / "gate"))
        wait_until(lambda: (tmp_path / "pid").exists(), DEADLINE)
        timeline = pool.timeline()
        assert [task.fate for task in timeline.tasks] == [""] * 5 + ["running"]
        assert timeline.tasks[-1].call == "apply(tell_pid_and_wait)"
        assert [life.ended is None for life in timeline.lives] == [False, False, True]
        assert not any(life.lost for life in timeline.lives)
        assert len({life.pid for life in timeline.lives}) == 3
        (tmp_path / "gate").touch()


def test_the_oldest_is_dropped_and_that_is_said(tmp_path):
    with tpool.Pool(1, timeline=100) as pool:
        list(pool.imap(tasks.identity, itertools.chain(range(850), ["x" * 2000] * 150)))
        timeline = pool.timeline()
    kept = [task.task for task in timeline.tasks]
    assert 100 <= len(kept) <= 200
    assert kept == list(range(1000 - len(kept), 1000))
    assert len(timeline.encodings) == 100
    assert timeline.dropped == (1000 - len(kept)) + (150 - 100)
    assert f"{timeline.dropped} older events dropped" in repr(timeline)
    assert "older events were dropped" in timeline._repr_html_()
    timeline.save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["otherData"] == {"dropped_events": timeline.dropped}


def test_off_unless_asked_for():
    with tpool.Pool(1) as pool:
        assert pool.apply(tasks.has_trace) is False
        with pytest.raises(ValueError, match=r"writes no timeline; make it with Pool\(\.\.\., timeline=True\)"):
            pool.timeline()


@pytest.mark.parametrize(
    ("error", "match", "value"),
    [
        (TypeError, "timeline must be True, False or a number", "yes"),
        (ValueError, "timeline must be True, False or a number from 1", -5),
    ],
)
def test_bad_values(error, match, value):
    with pytest.raises(error, match=match):
        tpool.Pool(1, timeline=value)


# The trace --------------------------------------------------------------------------------------------------------


def test_a_trace_goes_round_and_leaves_out_what_is_torn():
    trace = Trace.create(10)
    capacity = trace.capacity
    for number in range(capacity + 5):
        trace.begin(1, number, 1.0 + number)
        trace.end(1.3 + number, 1.1 + number, 1.2 + number, 0, 0)
    records, gone = trace.read()
    # The place that may be written next is not trusted.
    assert [record.task for record in records] == list(range(6, capacity + 5))
    assert gone == 6
    trace.begin(1, 0, 5.0)
    trace.end(7.0, 4.0, 6.0, 0, 0)
    assert len(trace.read()[0]) == len(records) - 1
    trace.begin(1, 99, 100.0)
    trace.note_definitions(100.1, 100.2, 5)
    assert trace.take_running() == (1, 99, 100.0)
    assert trace.running() is None
    trace.close()


# The trace for Perfetto -------------------------------------------------------------------------------------------


def test_the_json_is_a_trace(seen, tmp_path):
    timeline, _, _ = seen
    timeline.save(tmp_path / "timeline.json")
    whole = json.loads((tmp_path / "timeline.json").read_text())
    names, stacks = {}, {}
    for event in whole["traceEvents"]:
        assert {"ph", "name", "pid", "tid"} <= event.keys()
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            names.setdefault(event["name"], {})[event["tid"]] = event["args"]
            continue
        assert event["ts"] >= 0
        assert event["ph"] in ("X", "i")
        if event["ph"] == "X":
            assert event["dur"] >= 0
            stacks.setdefault(event["tid"], []).append(event)
        else:
            assert event["s"] == "t"
    assert {entry["name"] for entry in names["thread_name"].values()} == {
        "worker 0", "worker 1", "MainThread", "feeder 1"
    }  # fmt: skip
    assert names["process_name"]
    assert len({entry["sort_index"] for entry in names["thread_sort_index"].values()}) == 4
    assert stacks.keys() == names["thread_name"].keys()
    for events in stacks.values():
        check_nesting(events)
    assert sum(event["cat"] == "task" for events in stacks.values() for event in events) == len(timeline.tasks)


def check_nesting(events):
    """Within a thread complete events lie within each other or beside each other; readers put them in stacks."""
    open_until = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        end = round(event["ts"] + event["dur"], 3)
        while open_until and open_until[-1] <= event["ts"]:
            open_until.pop()
        assert not open_until or end <= open_until[-1], event
        open_until.append(end)


# The picture ------------------------------------------------------------------------------------------------------


def test_the_picture(seen, tmp_path):
    timeline, _, _ = seen
    timeline.save(tmp_path / "timeline.svg")
    text = (tmp_path / "timeline.svg").read_text()
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter(f"{SVG}text")]
    assert {"worker 0", "worker 1", "MainThread", "feeder 1"} <= set(words)
    assert "imap_unordered(identity) (3,000)" in words
    width, height = map(float, root.get("viewBox").split()[2:])
    for rect in root.iter(f"{SVG}rect"):
        x, y, wide, high = (float(rect.get(name, 0)) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= width
        assert 0 <= y <= y + high <= height
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert any(title.startswith("map(sleep), task") for title in titles)
    assert any("was killed by SIGKILL" in title for title in titles)
    assert timeline._repr_html_() == text
    timeline.save(str(tmp_path / "timeline.html"))
    page = (tmp_path / "timeline.html").read_text()
    assert text in page
    assert re.findall(r"https?://[^'\"]*", page) == ["http://www.w3.org/2000/svg"], "it needs something from elsewhere"


def test_a_picture_of_many_tasks_is_small():
    spans = Spans(tasks=[TaskSpan(n % 3, "map(f)", n, n * 1e-5, n * 1e-5 + 1e-6, n * 1e-5 + 8e-6, n * 1e-5 + 9e-6)
                         for n in range(20_000)])  # fmt: skip
    text = svg_picture("many", spans)
    ElementTree.fromstring(text)
    assert len(text) < 300_000


def test_a_picture_of_nothing(tmp_path):
    timeline = Timeline("<nothing>", Spans())
    ElementTree.fromstring(timeline._repr_html_())
    for name in ("t.svg", "t.html", "T.JSON"):
        timeline.save(tmp_path / name)
    assert len(list(Path(tmp_path).iterdir())) == 3
    with pytest.raises(ValueError, match=r"saved as \.json .* not as 't\.png'"):
        timeline.save("t.png")


def test_narrow_things_are_added_up():
    columns = Columns(lambda seconds: seconds, 0.0)
    for number in range(10):
        columns.add(number + 0.25, number + 0.75, "a")
    columns.add(20.0, 21.5, "b")
    assert list(columns.bars()) == [(0.0, 10.0, 0.5, 0.0, "a"), (20.0, 1.0, 1.0, 0.0, "b"), (21.0, 1.0, 0.5, 0.0, "b")]
