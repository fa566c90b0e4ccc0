"""An engine without processes: each worker is a thread, payloads are pickles. For tests of the boundary itself."""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tpool.engine import WorkerLoss
from tpool.local.wire import Mode
from tpool.messages import (
    KillWorker,
    RecallSettled,
    RecallTasks,
    RetireWorker,
    SendTasks,
    StartWorker,
    TasksFinished,
    TasksRecalled,
    WorkerBecameReady,
    WorkerExited,
)


class FakeResult:
    """See ``tpool.engine.Result``."""

    seconds = 0.0

    def __init__(self, failed: bool, value: Any) -> None:
        self.failed = failed
        self._value = value
        self.nbytes = len(pickle.dumps(value))

    def take(self) -> Any:
        return self._value

    def discard(self) -> None:
        pass


@dataclass(eq=False)
class FakeWorker:
    """One thread, and what it has not started."""

    id: Any
    tasks: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    waiting: list[Any] = field(default_factory=list)
    sent: int = 0
    gone: bool = False


class FakeEngine:
    """See ``tpool.engine.Engine``; without loans, objects and memory."""

    sharing = "copy"
    shares_memory = False
    logs = None

    def __init__(self) -> None:
        self.may_give_back: Callable[[], bool] = lambda: False
        self.awaits_earlier: Callable[[], bool] = lambda: False
        self.tell_waiting: Callable[[str], object] = str
        self.pressing = self.can_lend = False
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._jobs: dict[Any, Any] = {}
        self._workers: dict[Any, FakeWorker] = {}
        self._lock = threading.Lock()

    def encode(self, obj: Any, patient: Any = None) -> bytes:
        return pickle.dumps(obj)

    def encode_call(self, function: Any, args: Any, kwds: Any) -> bytes:
        return pickle.dumps(((args, kwds), function))

    def weigh(self, encoded: bytes) -> tuple[int, tuple[()]]:
        return len(encoded), ()

    def call_now(self, job: Any, payload: bytes) -> None:
        return None

    def open_job(self, job: Any, mode: int, function: bytes | None) -> None:
        self._jobs[job] = mode, function

    def forget_job(self, job: Any) -> None:
        self._jobs.pop(job, None)

    def wake(self) -> None:
        self._events.put(None)

    def perform(self, action: Any) -> list[Any]:
        if isinstance(action, StartWorker):
            worker = self._workers[action.worker] = FakeWorker(action.worker)
            threading.Thread(target=self._run, args=(worker,), daemon=True).start()
            return []
        worker = self._workers.get(action.worker)
        if worker is None:
            return []
        if isinstance(action, SendTasks):
            with self._lock:
                worker.waiting += action.tasks
                worker.sent += len(action.tasks)
            for _ in action.tasks:
                worker.tasks.put("task")
        elif isinstance(action, RecallTasks):
            with self._lock:
                count, worker.waiting = len(worker.waiting), []
            if count:
                self._events.put(RecallSettled(worker.id))
            return [TasksRecalled(worker.id, count)]
        elif isinstance(action, RetireWorker):
            worker.tasks.put("retire")
        elif isinstance(action, KillWorker):
            self._lose(worker, -9)
        return []

    def _lose(self, worker: FakeWorker, exitcode: int) -> None:
        with self._lock:
            unstarted, worker.gone = len(worker.waiting), True
        self._workers.pop(worker.id, None)
        worker.tasks.put("retire")
        self._events.put(
            WorkerExited(worker.id, unstarted, worker.sent, WorkerLoss("a fake", None, exitcode, True, ""))
        )

    def _run(self, worker: FakeWorker) -> None:
        self._events.put(WorkerBecameReady(worker.id))
        while worker.tasks.get() == "task":
            with self._lock:
                if not worker.waiting or worker.gone:
                    continue
                task = worker.waiting.pop(0)
            result = self._call(task)
            with self._lock:
                if not worker.gone:
                    self._events.put(TasksFinished(worker.id, [(task.job, task.index, result, 0.0)]))
        if not worker.gone:
            self._lose(worker, 0)

    def _call(self, task: Any) -> FakeResult:
        mode, function = self._jobs[task.job]
        try:
            if function is None:
                (args, kwds), called = pickle.loads(task.payload)
                return FakeResult(False, called(*args, **kwds))
            assert mode == Mode.CALL
            return FakeResult(False, pickle.loads(function)(pickle.loads(task.payload)))
        except Exception as error:
            return FakeResult(True, error)

    def wait(self, timeout: float | None) -> list[Any]:
        try:
            event = self._events.get(timeout=timeout)
        except queue.Empty:
            return []
        return [] if event is None else [event]

    def close(self) -> None:
        for worker in list(self._workers.values()):
            self._lose(worker, -9)
