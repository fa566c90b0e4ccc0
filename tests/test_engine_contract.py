"""What every engine promises to the handler: the same scenes with a fake, with processes, and with actors of Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pool_tasks as tasks
import pytest
from fake_engine import FakeEngine
from ray_support import REASON

from tpool.engine import Engine, WorkerLoss
from tpool.local.engine import LocalEngine
from tpool.local.setup import Settings
from tpool.local.wire import Mode
from tpool.messages import (
    KillWorker,
    RecallSettled,
    RecallTasks,
    RetireWorker,
    RunFinished,
    SendTasks,
    StartWorker,
    TasksFinished,
    TasksRecalled,
    WorkerBecameReady,
    WorkerExited,
)
from tpool.task import JobId, Slot, Task, WorkerId

DEADLINE = 60.0


def local_engine(request: pytest.FixtureRequest) -> Engine:
    return LocalEngine(Settings(2, "forkserver", None, (), (), 1 << 26, "share"))


def ray_engine(request: pytest.FixtureRequest) -> Engine:
    pytest.importorskip("ray")
    request.getfixturevalue("local_ray")
    from tpool.ray.making import make_ray_engine
    from tpool.ray.spec import RayEngine

    return make_ray_engine(RayEngine(), 2, None, ())[0]


MAKERS = [
    pytest.param(lambda request: FakeEngine(), id="fake"),
    pytest.param(local_engine, id="local"),
    pytest.param(ray_engine, id="ray", marks=[pytest.mark.ray, pytest.mark.leaves(REASON)]),
]


def results_of(event: Any) -> list[Any]:
    """(job, index, result, seconds) of each of its results."""
    if isinstance(event, RunFinished):
        seconds = event.seconds / len(event.results)
        return [(event.job, index, result, seconds) for index, result in enumerate(event.results, event.index)]
    return event.results if isinstance(event, TasksFinished) else []


class Stage:
    """An engine and all that it has said."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[Any] = []

    def do(self, action: Any) -> None:
        self.events += self.engine.perform(action)

    def until(self, kind: type, worker: int = 0, after: int = 0) -> Any:
        """The first event of this kind of a worker, from a place on; waits for it."""
        end = time.monotonic() + DEADLINE
        while True:
            for event in self.events[after:]:
                if isinstance(event, kind) and event.worker == worker:
                    return event
            assert time.monotonic() < end, f"no {kind.__name__} among {self.events}"
            self.events += self.engine.wait(1.0)

    def start(self, worker: int = 0) -> None:
        self.do(StartWorker(WorkerId(worker), Slot(0)))
        self.until(WorkerBecameReady, worker)

    def results(self, count: int) -> list[Any]:
        """(index, value) of so many results, in the order in which they came."""

        def seen() -> list[Any]:
            return [result for event in self.events for result in results_of(event)]

        end = time.monotonic() + DEADLINE
        while len(seen()) < count:
            assert time.monotonic() < end, self.events
            self.events += self.engine.wait(1.0)
        return [(index, result.take()) for _, index, result, _ in seen()]


@pytest.fixture(params=MAKERS)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    make: Callable[[pytest.FixtureRequest], Engine] = request.param
    stage = Stage(make(request))
    yield stage
    for worker in {event.worker for event in stage.events} - {
        event.worker for event in stage.events if isinstance(event, WorkerExited)
    }:
        stage.do(KillWorker(worker))
        stage.until(WorkerExited, worker)
    stage.engine.close()


def test_a_life(stage: Stage) -> None:
    """Ready, tasks in order, an error as a result, a call of its own, retirement, and a successor in the same slot."""
    engine, job, single = stage.engine, JobId(1), JobId(2)
    stage.start()
    engine.open_job(job, Mode.CALL, engine.encode(tasks.raise_if_odd))
    engine.open_job(single, Mode.APPLY, None)
    sent = [Task(job, index, engine.encode(2 * index)) for index in range(3)]
    stage.do(SendTasks(WorkerId(0), sent))
    stage.do(SendTasks(WorkerId(0), [Task(single, 0, engine.encode_call(tasks.add, (1,), {"y": 2}))]))
    assert stage.results(4) == [(0, 0), (1, 2), (2, 4), (0, 3)]
    engine.forget_job(single)

    before = len(stage.events)
    stage.do(SendTasks(WorkerId(0), [Task(job, 7, engine.encode(7))]))
    ((_, index, result, seconds),) = stage.until(TasksFinished, 0, before).results
    assert (index, result.failed, type(result.take())) == (7, True, ValueError)
    assert seconds >= 0

    stage.do(RetireWorker(WorkerId(0)))
    exited = stage.until(WorkerExited)
    assert (exited.unstarted, exited.sent, exited.cause.exitcode) == (0, 5, 0)
    stage.start(1)


def test_tasks_are_taken_back_and_a_kill_loses_what_runs(stage: Stage, tmp_path: Any) -> None:
    engine, job = stage.engine, JobId(1)
    stage.start()
    engine.open_job(job, Mode.CALL, engine.encode(tasks.wait_for_file))
    gates = [str(tmp_path / f"gate {index}") for index in range(4)]
    stage.do(SendTasks(WorkerId(0), [Task(job, index, engine.encode(gate)) for index, gate in enumerate(gates)]))
    for gate in gates[:1]:
        open(gate, "w").close()
    stage.results(1)  # so the second one runs, and the others wait
    stage.do(RecallTasks(WorkerId(0)))
    recalled = stage.until(TasksRecalled)
    assert recalled.count in (2, 3), "two wait, or three if the second has not begun"
    open(gates[1], "w").close()  # a local worker settles when it reads on, after the task that it runs
    stage.until(RecallSettled)
    stage.results(4 - recalled.count)
    before = len(stage.events)
    stage.do(SendTasks(WorkerId(0), [Task(job, 4, engine.encode(gates[2]))]))
    stage.do(KillWorker(WorkerId(0)))
    exited = stage.until(WorkerExited, 0, before)
    assert isinstance(exited.cause, WorkerLoss)
    assert exited.unstarted in (0, 1)
    assert exited.sent == 5
    assert not [event for event in stage.events[before:] if results_of(event)]


def test_wake_ends_a_wait(stage: Stage) -> None:
    stage.start()
    stage.engine.wake()
    began = time.monotonic()
    while stage.engine.wait(DEADLINE) and time.monotonic() < began + DEADLINE:
        pass
    assert time.monotonic() < began + DEADLINE / 2
