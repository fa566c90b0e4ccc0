"""What a task costs in the scheduler alone: microseconds in ``handle`` per task, with simulated workers.

Each worker runs its messages one after the other on a simulated clock and answers each message as one, so the order of
events is what real workers would give. Only the time inside ``handle`` counts. Run: ``python
benchmarks/micro_scheduler.py``
"""

from __future__ import annotations

import heapq
from time import perf_counter

from tpool.messages import (
    Event,
    JobOpened,
    JobSealed,
    ResolveTasks,
    SendTasks,
    StartWorker,
    TasksFinished,
    TasksSubmitted,
    WorkerBecameReady,
)
from tpool.scheduler import Scheduler
from tpool.task import JobId, Task


class Simulation:
    def __init__(self, processes: int, task_seconds: float, max_tasks: int | None) -> None:
        self.scheduler = Scheduler(processes, max_tasks)
        self.task_seconds = task_seconds
        self.now = self.spent = 0.0
        self.events = self.resolved = self.messages = 0
        self.agenda: list[tuple[float, int, Event]] = []  # (when, tie-breaker, what happens then)
        self.free_at: dict[int, float] = {}
        for action in self.scheduler.begin():
            if isinstance(action, StartWorker):
                self.free_at[action.worker] = 0.0
                self.say(WorkerBecameReady(action.worker))

    def say(self, event: Event) -> None:
        self.events += 1
        before = perf_counter()
        actions = self.scheduler.handle(event, self.now)
        self.spent += perf_counter() - before
        for action in actions:
            if isinstance(action, SendTasks):
                self.messages += 1
                done_at = max(self.now, self.free_at[action.worker]) + self.task_seconds * len(action.tasks)
                self.free_at[action.worker] = done_at
                results = [(task.job, task.index, None, self.task_seconds) for task in action.tasks]
                heapq.heappush(self.agenda, (done_at, self.messages, TasksFinished(action.worker, results)))
            elif isinstance(action, ResolveTasks):
                self.resolved += len(action.outcomes)

    def run(self, jobs: int, tasks: int) -> None:
        for number in range(jobs):
            job = JobId(number)
            self.say(JobOpened(job))
            self.say(TasksSubmitted(job, [Task(job, index, None) for index in range(tasks)]))
            self.say(JobSealed(job))
        while self.agenda:
            self.now, _, event = heapq.heappop(self.agenda)
            self.say(event)
        assert self.resolved == jobs * tasks


def measure(
    name: str, processes: int, jobs: int, tasks: int, task_seconds: float, max_tasks: int | None = None
) -> None:
    best: Simulation | None = None
    for _ in range(3):
        simulation = Simulation(processes, task_seconds, max_tasks)
        simulation.run(jobs, tasks)
        if best is None or simulation.spent < best.spent:
            best = simulation
    assert best is not None
    total = jobs * tasks
    print(
        f"{name:34} {processes:4} workers {best.spent / total * 1e6:8.3f} µs/task"
        f" {best.spent / best.events * 1e6:8.3f} µs/event {total / best.messages:6.1f} tasks/message"
    )


if __name__ == "__main__":
    for processes in (2, 8, 64):
        measure("1 job of 200,000 × 1 µs", processes, 1, 200_000, 1e-6)
    for processes in (2, 64):
        measure("1 job of 20,000 × 5 ms", processes, 1, 20_000, 5e-3)
    for processes in (2, 64):
        measure("100 jobs of 2,000 × 1 µs", processes, 100, 2_000, 1e-6)
    for processes in (2, 64):
        measure("20,000 jobs of 1 × 1 µs", processes, 20_000, 1, 1e-6)
    for processes in (2, 64):
        measure("1 job of 200,000 × 1 µs, max_tasks", processes, 1, 200_000, 1e-6, max_tasks=1_000_000)
