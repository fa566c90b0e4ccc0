"""One example of events and actions per rule of the scheduler. All rules together: test_scheduler_machine.py."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tpool import deadlines, dispatch, jobs, killing, roster, scheduler, slots, task
from tpool.dispatch import AHEAD_SECONDS, MAX_BATCH, RECALL_SECONDS
from tpool.errors import ProtocolError
from tpool.messages import (
    InitializerFailed,
    JobCancelled,
    JobOpened,
    JobSealed,
    JobSubmitted,
    LoanWanted,
    PoolClosed,
    PoolTerminated,
    RecallSettled,
    Resized,
    TaskFaltered,
    TasksFinished,
    TasksRecalled,
    TasksSubmitted,
    TimePassed,
    WorkerBecameReady,
    WorkerExited,
    WorkerReturned,
)
from tpool.scheduler import MAX_START_FAILURES, START_GRACE_SECONDS, Scheduler
from tpool.task import JobId, Rules, Task, TimedOut, WorkerId

PARTS = [scheduler, slots, killing, jobs, dispatch, roster, deadlines, task]

FAST = 1e-6
HALF = MAX_BATCH // 2  # what travels in one message of fast tasks
SLOW = 1.0


def brief(action: Any) -> tuple[Any, ...]:
    """An action as a short tuple: its name, then ids and numbers; tasks as (job, index)."""

    def short(value: Any) -> Any:
        if isinstance(value, Task):
            return (value.job, value.index)
        if isinstance(value, list):
            return [short(item) for item in value]
        return tuple(map(short, value)) if isinstance(value, tuple) else value

    return (type(action).__name__, *(short(getattr(action, name)) for name in action.__dataclass_fields__))


class World:
    """A scheduler with ``processes`` workers 0, 1, … and short names for what happens to it."""

    def __init__(
        self, processes: int, max_tasks: int | None = None, ready: bool = True, grace: float = START_GRACE_SECONDS
    ) -> None:
        self.scheduler = Scheduler(processes, max_tasks, grace)
        self.now = 100.0
        self.submitted: dict[int, int] = {}
        self.held: dict[int, list[Task]] = {}
        self.sent: dict[int, int] = {}
        self.begun = [brief(action) for action in self.scheduler.begin()]
        if ready:
            for worker in reversed(range(processes)):  # Last in, first out: 0 is sent something first.
                self.ready(worker)

    def say(self, event: Any, after: float = 0.0) -> list[tuple[Any, ...]]:
        self.now += after
        actions = self.scheduler.handle(event, self.now)
        self.scheduler.check()
        for action in actions:
            if type(action).__name__ == "SendTasks":
                self.held.setdefault(action.worker, []).extend(action.tasks)
                self.sent[action.worker] = self.sent.get(action.worker, 0) + len(action.tasks)
        return [brief(action) for action in actions]

    def ready(self, worker: int) -> list[tuple[Any, ...]]:
        return self.say(WorkerBecameReady(WorkerId(worker)))

    def open(
        self, job: int, tasks: int = 0, weight: int = 1, batch: int = 1, seal: bool = False, rules: Rules | None = None
    ) -> list[Any]:
        actions = self.say(JobOpened(JobId(job), batch, rules))
        actions += self.submit(job, tasks, weight)
        return actions + (self.seal(job) if seal else [])

    def submit(self, job: int, tasks: int, weight: int = 1) -> list[tuple[Any, ...]]:
        first = self.submitted.get(job, 0)
        self.submitted[job] = first + tasks
        new = [Task(JobId(job), index, None, weight) for index in range(first, first + tasks)]
        return self.say(TasksSubmitted(JobId(job), new))

    def seal(self, job: int) -> list[tuple[Any, ...]]:
        return self.say(JobSealed(JobId(job)))

    def cancel(self, job: int, kill: bool = False, asker: Any = None) -> list[tuple[Any, ...]]:
        return self.say(JobCancelled(JobId(job), kill, asker))

    def finish(self, worker: int, count: int = 1, seconds: float = SLOW, after: float = 0.0) -> list[tuple[Any, ...]]:
        done, self.held[worker] = self.held[worker][:count], self.held[worker][count:]
        results = [(task.job, task.index, "result", seconds) for task in done]
        return self.say(TasksFinished(WorkerId(worker), results), after)

    def falter(self, worker: int, seconds: float = SLOW) -> list[tuple[Any, ...]]:
        task = self.held[worker].pop(0)
        return self.say(TaskFaltered(WorkerId(worker), task.job, task.index, "its error", seconds))

    def time_passes(self, seconds: float) -> list[tuple[Any, ...]]:
        return self.say(TimePassed(), after=seconds)

    def resize(self, processes: int) -> list[tuple[Any, ...]]:
        return self.say(Resized(processes))

    def recalled(self, worker: int, count: int) -> list[tuple[Any, ...]]:
        self.held[worker] = self.held[worker][: len(self.held[worker]) - count]
        return self.say(TasksRecalled(WorkerId(worker), count))

    def settled(self, worker: int) -> list[tuple[Any, ...]]:
        return self.say(RecallSettled(WorkerId(worker)))

    def exit(self, worker: int, unstarted: int = 0, cause: Any = "lost") -> list[tuple[Any, ...]]:
        return self.say(WorkerExited(WorkerId(worker), unstarted, self.sent.get(worker, 0), cause))

    def learn(self, job: int, seconds: float) -> None:
        """Let a job's tasks be known to take so long, on idle worker 0: opens it and runs one task."""
        self.open(job, tasks=1)
        self.finish(0, seconds=seconds)


def sent(actions: list[tuple[Any, ...]]) -> list[tuple[int, int]]:
    """(worker, number of tasks) of each message."""
    return [(action[1], len(action[2])) for action in actions if action[0] == "SendTasks"]


def named(actions: list[tuple[Any, ...]], *names: str) -> list[tuple[Any, ...]]:
    return [action for action in actions if action[0] in names]


class TestLayers:
    @pytest.mark.parametrize("module", PARTS)
    def test_imports_nothing_that_acts(self, module: Any) -> None:
        tree = ast.parse(Path(module.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        pure = {"__future__", "collections", "collections.abc", "copy", "dataclasses", "enum", "heapq", "typing"}
        inner = {"tpool.errors", "tpool.messages", *(part.__name__ for part in PARTS)}
        assert imported <= pure | inner


class TestLending:
    def test_an_idle_worker_is_lent_and_comes_back(self) -> None:
        world = World(2)
        assert world.scheduler.can_lend
        assert world.say(LoanWanted()) == [("LendWorker", 0)]
        assert world.open(7, tasks=2) == [("SendTasks", 1, [(7, 0)])]
        assert world.scheduler.wants_workers
        assert world.say(WorkerReturned(WorkerId(0))) == [("SendTasks", 0, [(7, 1)])]
        assert not world.scheduler.wants_workers

    def test_nobody_is_lent_where_nobody_is_idle(self) -> None:
        world = World(1)
        world.open(7, tasks=1)
        assert not world.scheduler.can_lend
        assert world.say(LoanWanted()) == []

    def test_nobody_is_lent_whose_tasks_are_counted(self) -> None:
        assert World(1, max_tasks=5).say(LoanWanted()) == []

    def test_a_lent_worker_that_exits_is_replaced(self) -> None:
        world = World(1)
        world.say(LoanWanted())
        assert world.exit(0) == [("StartWorker", 1, 0)]

    def test_a_closed_pool_wants_its_workers_back(self) -> None:
        world = World(1)
        world.say(LoanWanted())
        assert world.say(PoolClosed()) == []
        assert world.scheduler.wants_workers
        assert world.say(LoanWanted()) == []
        assert world.say(WorkerReturned(WorkerId(0))) == [("RetireWorker", 0)]

    def test_a_terminated_pool_kills_what_is_lent(self) -> None:
        world = World(1)
        world.say(LoanWanted())
        assert world.say(PoolTerminated("stopped")) == [("KillWorker", 0)]
        assert world.say(WorkerReturned(WorkerId(0))) == []  # too late
        assert world.exit(0) == [("EndPool", None)]


class TestJobs:
    def test_a_job_may_come_with_all_its_tasks(self) -> None:
        world = World(1)
        tasks = [Task(JobId(7), 0, None)]
        assert world.say(JobSubmitted(JobId(7), tasks)) == [("SendTasks", 0, [(7, 0)])]
        assert world.finish(0) == [("ResolveTasks", [((7, 0), "result")]), ("FinishJob", 7)]

    def test_a_job_that_comes_too_late_fails(self) -> None:
        world = World(1)
        world.say(PoolTerminated("stopped"))
        late = world.say(JobSubmitted(JobId(7), [Task(JobId(7), 0, None)]))
        assert late == [("FailTask", (7, 0), "stopped"), ("FinishJob", 7)]

    def test_a_task_is_sent_resolved_and_ends_its_job(self) -> None:
        world = World(1)
        assert world.open(7, tasks=1) == [("SendTasks", 0, [(7, 0)])]
        assert world.seal(7) == []
        assert world.finish(0) == [("ResolveTasks", [((7, 0), "result")]), ("FinishJob", 7)]

    def test_an_empty_job_is_finished_when_sealed(self) -> None:
        world = World(1)
        assert world.open(7) == []
        assert world.seal(7) == [("FinishJob", 7)]

    def test_a_job_is_not_finished_before_it_is_sealed(self) -> None:
        world = World(1)
        world.open(7, tasks=1)
        assert named(world.finish(0), "FinishJob") == []
        assert world.seal(7) == [("FinishJob", 7)]

    def test_tasks_wait_for_a_worker(self) -> None:
        world = World(1, ready=False)
        assert world.open(7, tasks=2) == []
        assert world.ready(0) == [("SendTasks", 0, [(7, 0)])]

    def test_jobs_take_turns(self) -> None:
        world = World(1)
        world.open(1, tasks=3)
        world.open(2, tasks=2)
        order = [world.finish(0)[1][2][0] for _ in range(4)]
        assert order == [(1, 1), (2, 0), (1, 2), (2, 1)]

    def test_a_job_with_long_tasks_takes_its_turn_among_short_ones(self) -> None:
        world = World(1)
        world.learn(1, FAST)
        world.submit(1, 4000)
        world.open(2, tasks=1)
        assert len(world.held[0]) == MAX_BATCH
        assert sent(world.finish(0, HALF, FAST)) == [(0, HALF)]  # It was the short ones' turn.
        assert named(world.finish(0, HALF, FAST), "SendTasks") == []  # It runs down for the unknown one …
        assert named(world.finish(0, HALF, FAST), "SendTasks") == [("SendTasks", 0, [(2, 0)])]  # … alone.
        assert sent(world.finish(0)) == [(0, HALF), (0, HALF)]

    def test_cancelling_drops_the_queue_and_lets_running_tasks_run(self) -> None:
        world = World(1)
        world.open(7, tasks=3, seal=True)
        assert world.cancel(7) == [("DropTask", (7, 1)), ("DropTask", (7, 2))]
        assert world.finish(0) == [("ResolveTasks", [((7, 0), "result")]), ("FinishJob", 7)]

    def test_cancelling_twice_or_too_late_is_ignored(self) -> None:
        world = World(1)
        world.open(7, tasks=1, seal=True)
        assert world.cancel(7) == []
        assert world.cancel(7) == []
        world.finish(0)
        assert world.cancel(7) == []

    def test_whoever_cancels_and_asks_is_told_whether_anything_was_dropped(self) -> None:
        world = World(1)
        world.open(0, tasks=2, seal=True)
        assert world.cancel(0, asker="me") == [("DropTask", (0, 1)), ("AnswerCancel", "me", True)]
        assert world.cancel(0, asker="me") == [("AnswerCancel", "me", False)]
        world.finish(0)
        assert world.cancel(0, asker="me") == [("AnswerCancel", "me", False)]

    def test_what_has_started_is_what_workers_hold(self) -> None:
        world = World(1)
        world.open(0, tasks=1)
        world.open(1, tasks=1)
        assert [world.scheduler.has_started(JobId(job)) for job in (0, 1, 2)] == [True, False, False]

    def test_what_the_feeder_adds_to_a_cancelled_job_is_dropped(self) -> None:
        world = World(1)
        world.open(7, tasks=1)
        world.cancel(7)
        assert world.submit(7, 1) == [("DropTask", (7, 1))]
        assert world.finish(0) == [("ResolveTasks", [((7, 0), "result")]), ("FinishJob", 7)]
        assert world.submit(7, 1) == [("DropTask", (7, 2))]
        assert world.seal(7) == []

    def test_adding_to_a_sealed_job_is_a_bug(self) -> None:
        world = World(1)
        world.open(7, tasks=1, seal=True)
        with pytest.raises(AssertionError, match="job 7 was given more tasks, but it was sealed"):
            world.submit(7, 1)
        with pytest.raises(AssertionError, match="job 7 was sealed, but"):
            world.seal(7)

    def test_opening_twice_or_after_close_is_a_bug(self) -> None:
        world = World(1)
        world.open(7)
        with pytest.raises(AssertionError, match="job 7 was opened twice"):
            world.open(7)
        world.say(PoolClosed())
        with pytest.raises(AssertionError, match="job 8 was opened after"):
            world.open(8)


class TestSendingAhead:
    def test_tasks_of_unknown_length_go_one_by_one_to_idle_workers(self) -> None:
        world = World(2)
        assert sent(world.open(7, tasks=100)) == [(0, 1), (1, 1)]

    def test_the_callers_hint_packs_tasks_of_unknown_length_but_sends_none_ahead(self) -> None:
        world = World(2)
        assert sent(world.open(7, tasks=100, batch=8)) == [(0, 8), (1, 8)]

    def test_short_tasks_travel_many_to_a_message_and_two_messages_ahead(self) -> None:
        world = World(1)
        world.learn(7, FAST)
        assert sent(world.submit(7, 4000)) == [(0, HALF), (0, HALF)]
        assert sent(world.finish(0, HALF - 1, FAST)) == []
        assert sent(world.finish(0, 1, FAST)) == [(0, HALF)]

    def test_a_worker_holds_at_most_the_work_of_a_moment(self) -> None:
        world = World(1)
        world.learn(7, AHEAD_SECONDS / 10)
        assert sent(world.submit(7, 4000)) == [(0, 5), (0, 5)]

    def test_long_tasks_are_never_sent_ahead(self) -> None:
        world = World(1)
        world.learn(7, AHEAD_SECONDS)
        assert sent(world.submit(7, 4000)) == [(0, 1)]

    def test_the_tail_travels_in_ever_smaller_portions(self) -> None:
        world = World(2)
        world.learn(7, FAST)
        assert [count for _, count in sent(world.submit(7, 40))] == [10, 8, 6, 4, 3, 3, 2, 1, 1, 1, 1]

    def test_learns_quickly_that_tasks_have_become_long(self) -> None:
        world = World(1)
        world.learn(7, FAST)
        world.submit(7, 4000)
        world.finish(0, HALF, 1e-3)
        world.finish(0, HALF, 1e-3)
        assert sent(world.finish(0, HALF, 1e-3)) == [(0, 1), (0, 1)]

    def test_learns_quickly_that_tasks_have_become_short(self) -> None:
        world = World(1)
        world.learn(7, 1.0)
        world.submit(7, 4000)
        messages = 0
        while len(world.held[0]) < MAX_BATCH:
            world.finish(0, len(world.held[0]), FAST)
            messages += 1
        assert messages < 20

    def test_tasks_that_take_no_time_at_all_are_no_problem(self) -> None:
        world = World(1)
        world.learn(7, 0.0)
        assert sent(world.submit(7, 4000)) == [(0, HALF), (0, HALF)]

    def test_nothing_is_sent_to_a_busy_worker_that_was_not_heard_of_for_a_while(self) -> None:
        world = World(1)
        world.learn(7, FAST)
        world.submit(7, 1)
        world.now += RECALL_SECONDS
        assert world.submit(7, 4000) == []


class TestMaxTasks:
    def test_a_worker_that_has_done_its_share_retires_and_is_replaced(self) -> None:
        world = World(1, max_tasks=1)
        world.open(7, tasks=2)
        assert world.finish(0) == [("ResolveTasks", [((7, 0), "result")]), ("RetireWorker", 0)]
        assert world.exit(0) == [("StartWorker", 1, 0)]
        assert world.ready(1) == [("SendTasks", 1, [(7, 1)])]

    def test_it_is_replaced_though_nothing_is_queued(self) -> None:
        world = World(1, max_tasks=1)
        world.open(7, tasks=1, seal=True)
        world.finish(0)
        assert world.exit(0) == [("StartWorker", 1, 0)]

    def test_a_message_has_no_more_than_a_worker_may_run(self) -> None:
        world = World(1, max_tasks=10)
        world.learn(7, FAST)
        assert sent(world.submit(7, 1000, weight=2)) == [(0, 4)]

    def test_a_chunk_that_is_too_heavy_waits_for_a_fresh_worker(self) -> None:
        world = World(1, max_tasks=10)
        world.learn(7, SLOW)
        assert world.open(8, tasks=1, weight=10) == [("RetireWorker", 0)]
        assert world.exit(0) == [("StartWorker", 1, 0)]
        assert world.ready(1) == [("SendTasks", 1, [(8, 0)])]

    def test_no_task_of_unknown_length_slips_past_a_heavy_chunk_to_a_busy_worker(self) -> None:
        world = World(1, max_tasks=65)
        world.learn(1, FAST)
        world.submit(1, 1)
        assert world.open(2, tasks=1) == []
        world.finish(0, 1, FAST)
        world.finish(0, 1, FAST)
        world.submit(1, 1)  # Worker 0 has it, and may be sent more, but not so much as the next one weighs.
        assert world.submit(1, 1, weight=65) == []
        assert world.submit(2, 1) == []
        world.open(3, tasks=1)
        assert sent(world.finish(0, 1, FAST)) == [(0, 1)]

    def test_a_job_with_a_heavy_chunk_keeps_its_turn(self) -> None:
        world = World(1, max_tasks=4)
        world.open(1, tasks=10)
        world.open(2, tasks=1, weight=4)
        world.open(3, tasks=10)
        order = [world.finish(0)[1] for _ in range(4)]
        assert [action[2][0][0] for action in order[:3]] == [1, 3, 1]
        assert order[3] == ("RetireWorker", 0)
        world.exit(0)
        assert world.ready(1) == [("SendTasks", 1, [(2, 0)])]

    def test_what_was_recalled_does_not_count(self) -> None:
        world = World(2, max_tasks=4)
        world.learn(7, FAST)  # on 0, which may run three more
        world.exit(1)
        world.submit(7, 3)
        world.ready(2)
        assert world.say(TimePassed(), after=RECALL_SECONDS) == [("RecallTasks", 0)]
        assert sent(world.recalled(0, 2)) == [(2, 1), (2, 1)]
        world.settled(0)
        assert named(world.finish(0), "RetireWorker") == []


class TestRecall:
    def stuck(self) -> World:
        """Worker 0 holds tasks 1, 2 and 3; 1 turns out long, and worker 2 becomes idle."""
        world = World(2)
        world.learn(7, FAST)
        world.exit(1)
        assert sent(world.submit(7, 3)) == [(0, 1), (0, 1), (0, 1)]
        assert world.scheduler.wake_at is None
        world.ready(2)
        assert world.scheduler.wake_at == world.now + RECALL_SECONDS
        return world

    def test_unstarted_tasks_come_back_from_behind_a_long_one(self) -> None:
        world = self.stuck()
        assert world.say(TimePassed(), after=RECALL_SECONDS / 2) == []
        assert world.say(TimePassed(), after=RECALL_SECONDS) == [("RecallTasks", 0)]
        assert world.scheduler.wake_at is None
        assert world.recalled(0, 2) == [("SendTasks", 2, [(7, 2)]), ("SendTasks", 2, [(7, 3)])]

    def test_nothing_is_sent_until_the_recall_is_settled(self) -> None:
        world = self.stuck()
        world.say(TimePassed(), after=RECALL_SECONDS)
        world.recalled(0, 2)
        world.submit(7, MAX_BATCH)  # more than the other worker takes
        assert sent(world.finish(0)) == []
        assert sent(world.settled(0)) != []

    def test_nothing_more_is_sent_behind_the_long_task(self) -> None:
        world = self.stuck()
        world.say(TimePassed(), after=RECALL_SECONDS)
        world.recalled(0, 2)
        world.submit(7, MAX_BATCH)  # more than the other worker takes
        assert world.settled(0) == []

    def test_progress_puts_it_off(self) -> None:
        world = self.stuck()
        world.finish(0, 1, FAST, after=RECALL_SECONDS / 2)
        assert world.say(TimePassed(), after=RECALL_SECONDS / 2) == []
        assert world.say(TimePassed(), after=RECALL_SECONDS) == [("RecallTasks", 0)]

    def test_when_nothing_was_taken_back_there_is_nothing_to_wait_for(self) -> None:
        world = self.stuck()
        world.say(TimePassed(), after=RECALL_SECONDS)
        assert world.recalled(0, 0) == []
        assert world.scheduler.wake_at is None
        assert sent(world.finish(0, 3)) == []
        assert sent(world.submit(7, 1)) == [(0, 1)]

    def test_a_pool_without_an_idle_worker_or_without_work_needs_no_waking(self) -> None:
        world = World(1)
        assert world.scheduler.wake_at is None
        world.learn(7, FAST)
        world.submit(7, 10)
        assert world.scheduler.wake_at is None

    def test_returned_tasks_go_to_their_places(self) -> None:
        world = World(3, ready=False)
        world.ready(0)
        world.learn(7, FAST)
        world.submit(7, 2)  # 1 and 2, on 0
        world.ready(1)
        world.submit(7, 2)  # 3 and 4, on 1
        world.submit(7, 4)  # 5 and 6 on 1, 7 and 8 on 0
        assert [task.index for task in world.held[0]] == [1, 2]
        world.now += RECALL_SECONDS
        world.submit(7, 1)
        world.exit(1, unstarted=2)
        assert world.exit(0, unstarted=1)[0] == ("FailTask", (7, 1), "lost")
        assert sent(world.ready(2))[0] == (2, 1)
        order = [task.index for task in world.held[2]]
        assert order == sorted(order)
        assert order[0] == 2

    def test_tasks_that_a_worker_held_out_of_order_go_to_their_places_too(self) -> None:
        world = World(2)
        world.learn(7, FAST)
        world.submit(7, 39)
        assert world.held[0][0].index == 1
        assert world.held[1][0].index > 1
        world.exit(0, unstarted=len(world.held[0]) - 1)
        held = [task.index for task in world.held[1]]
        assert held != sorted(held)
        world.exit(1, unstarted=len(held) - 1)
        world.ready(2)
        order = []
        while world.held[2]:
            order += [task.index for task in world.held[2]]
            world.finish(2, len(world.held[2]), SLOW)
        assert order == sorted(order)

    def test_recalled_tasks_of_a_cancelled_job_are_dropped(self) -> None:
        world = self.stuck()
        world.cancel(7)
        world.say(TimePassed(), after=RECALL_SECONDS)
        assert world.recalled(0, 2) == [("DropTask", (7, 2)), ("DropTask", (7, 3))]
        assert world.finish(0) == [("ResolveTasks", [((7, 1), "result")]), ("FinishJob", 7)]

    def test_a_worker_may_die_before_it_has_settled(self) -> None:
        world = self.stuck()
        world.say(TimePassed(), after=RECALL_SECONDS)
        world.recalled(0, 2)
        assert world.exit(0) == [("FailTask", (7, 1), "lost"), ("StartWorker", 3, 0)]
        assert world.settled(0) == []

    def test_a_worker_may_die_before_it_has_answered(self) -> None:
        world = self.stuck()
        world.say(TimePassed(), after=RECALL_SECONDS)
        assert sent(world.exit(0, unstarted=2)) == [(2, 1), (2, 1)]
        assert world.say(TasksRecalled(WorkerId(0), 0)) == []


class TestLostWorkers:
    def test_only_the_running_task_fails_and_the_rest_goes_back(self) -> None:
        world = World(1)
        world.learn(7, FAST)
        world.submit(7, 3)
        running = world.held[0][0]
        assert world.exit(0, unstarted=2) == [("FailTask", (7, 1), "lost"), ("StartWorker", 1, 0)]
        assert running.attempts == 1
        assert world.ready(1)[0] == ("SendTasks", 1, [(7, 2)])
        assert world.held[1][0].attempts == 0

    def test_what_it_was_sent_and_never_got_goes_back_too(self) -> None:
        world = World(1)
        world.learn(7, FAST)
        world.submit(7, 3)
        got = world.sent[0] - 1
        actions = world.say(WorkerExited(WorkerId(0), 1, got, "lost"))
        assert actions == [("FailTask", (7, 1), "lost"), ("StartWorker", 1, 0)]
        assert [task.index for task in world.scheduler._book[JobId(7)].queued] == [2, 3]

    def test_tasks_whose_answers_were_refused_are_lost_and_do_not_run_again(self) -> None:
        world = World(1)
        world.learn(7, FAST)
        world.submit(7, 3)
        with pytest.raises(ProtocolError):
            world.say(TasksFinished(WorkerId(0), [(JobId(7), 2, None, 0.0)]))
        assert named(world.exit(0), "FailTask") == [("FailTask", (7, index), "lost") for index in (1, 2, 3)]

    def test_a_job_whose_tasks_came_back_waits_for_its_turn(self) -> None:
        world = World(1)
        world.learn(1, FAST)
        world.submit(1, 3)
        assert world.open(2, tasks=1) == []
        world.exit(0, unstarted=2)
        assert world.ready(1) == [("SendTasks", 1, [(2, 0)])]

    def test_a_lost_task_ends_its_job(self) -> None:
        world = World(1)
        world.open(7, tasks=1, seal=True)
        assert world.exit(0) == [("FailTask", (7, 0), "lost"), ("FinishJob", 7), ("StartWorker", 1, 0)]

    def test_an_idle_worker_is_replaced_in_its_slot(self) -> None:
        world = World(3)
        assert world.begun == [("StartWorker", 0, 0), ("StartWorker", 1, 1), ("StartWorker", 2, 2)]
        assert world.exit(1) == [("StartWorker", 3, 1)]
        assert sent(world.open(7, tasks=3)) == [(0, 1), (2, 1)]

    def test_workers_that_cannot_start_end_the_pool(self) -> None:
        world = World(2, ready=False)
        world.open(7, tasks=1, seal=True)
        for worker in range(MAX_START_FAILURES - 1):
            assert named(world.exit(worker), "StartWorker") != []
        assert world.exit(2, cause="no memory") == [
            ("KillWorker", 3),
            ("FailTask", (7, 0), "no memory"),
            ("FinishJob", 7),
        ]
        assert world.exit(3) == [("EndPool", "no memory")]

    def test_a_worker_that_becomes_ready_forgives_the_others(self) -> None:
        world = World(1, ready=False)
        for worker in range(MAX_START_FAILURES * 2):
            if worker % MAX_START_FAILURES == 1:
                world.ready(worker)
            assert named(world.exit(worker), "StartWorker") != []

    def test_a_failing_initializer_ends_the_pool(self) -> None:
        world = World(2, ready=False)
        world.ready(0)
        world.open(7, tasks=2)
        assert world.say(InitializerFailed(WorkerId(1), "error")) == [
            ("FailTask", (7, 0), "error"),
            ("KillWorker", 0),
            ("KillWorker", 1),
            ("FailTask", (7, 1), "error"),
        ]
        assert world.exit(1) == []
        assert world.say(PoolTerminated("too late")) == []
        assert world.exit(0, unstarted=1) == [("EndPool", "error")]


class TestTimeouts:
    LIMIT = Rules(timeout=5.0)

    def test_a_task_that_runs_for_too_long_fails_and_its_worker_is_killed_and_replaced(self) -> None:
        world = World(1)
        assert sent(world.open(0, tasks=2, seal=True, rules=self.LIMIT)) == [(0, 1)]
        assert world.scheduler.wake_at == world.now + 5
        assert world.time_passes(4.9) == []
        killed, failed = world.time_passes(0.1)
        assert killed == ("KillWorker", 0)
        assert failed[:2] == ("FailTask", (0, 0))
        assert (type(failed[2]), failed[2].worker, failed[2].timeout) == (TimedOut, 0, 5.0)
        assert world.scheduler.wake_at is None
        assert world.exit(0) == [("StartWorker", 1, 0)]
        assert sent(world.ready(1)) == [(1, 1)]

    def test_the_time_of_each_task_is_its_own(self) -> None:
        world = World(2)
        world.open(0, tasks=3, rules=self.LIMIT)
        world.finish(0, after=4.0)
        assert world.scheduler.wake_at == world.now + 1  # of worker 1
        assert named(world.time_passes(1.0), "KillWorker") == [("KillWorker", 1)]
        assert world.scheduler.wake_at == world.now + 4

    def test_a_result_in_time_is_a_result(self) -> None:
        world = World(1)
        world.open(0, tasks=1, rules=self.LIMIT)
        assert named(world.finish(0, after=4.9), "ResolveTasks", "KillWorker") == [
            ("ResolveTasks", [((0, 0), "result")])
        ]
        assert world.scheduler.wake_at is None
        assert world.time_passes(1.0) == []

    def test_a_result_that_was_read_before_the_clock_is_a_result(self) -> None:
        world = World(1)
        world.open(0, tasks=1, rules=self.LIMIT)
        assert named(world.finish(0, after=60.0), "ResolveTasks", "KillWorker") == [
            ("ResolveTasks", [((0, 0), "result")])
        ]

    def test_what_a_killed_worker_had_still_said_changes_nothing(self) -> None:
        world = World(1)
        world.open(0, tasks=1, rules=self.LIMIT)
        world.time_passes(5.0)
        assert world.finish(0) == []

    def test_nothing_is_sent_with_a_task_that_has_a_time_limit(self) -> None:
        world = World(1)
        world.open(0, tasks=100, batch=10, rules=self.LIMIT)
        for _ in range(10):
            assert sent(world.finish(0, seconds=FAST)) == [(0, 1)]
        world.open(1)
        assert sent(world.submit(1, tasks=100)) == []

    def test_other_workers_and_jobs_are_untouched(self) -> None:
        world = World(2)
        world.open(0, tasks=1, rules=self.LIMIT)
        world.open(1, tasks=1)
        assert named(world.time_passes(60.0), "FailTask", "KillWorker") != []
        assert named(world.finish(1), "ResolveTasks") == [("ResolveTasks", [((1, 0), "result")])]

    def test_it_is_tried_again_where_that_was_asked(self) -> None:
        world = World(1)
        world.open(0, tasks=1, rules=Rules(timeout=5.0, retries=1, retry_timed_out=True))
        assert [action[0] for action in world.time_passes(5.0)] == ["KillWorker", "RetryTask"]
        world.exit(0)
        assert sent(world.ready(1)) == [(1, 1)]
        assert world.scheduler.wake_at == world.now + 5
        assert [action[0] for action in world.time_passes(5.0)] == ["KillWorker", "FailTask"]

    def test_the_clock_of_a_lost_attempt_stands_still(self) -> None:
        world = World(2)
        world.open(0, tasks=1, rules=Rules(timeout=5.0, retries=1, retry_lost=True))
        world.time_passes(3.0)
        assert sent(world.exit(0)) == [(1, 1)]
        assert world.scheduler.wake_at == world.now + 5
        assert world.time_passes(2.5) == []

    def test_the_same_worker_may_get_the_same_task_again_with_new_time(self) -> None:
        world = World(1)
        world.open(0, tasks=1, rules=Rules(timeout=5.0, retries=1))
        world.time_passes(3.0)
        assert sent(world.falter(0)) == [(0, 1)]
        assert world.scheduler.wake_at == world.now + 5
        assert world.time_passes(2.5) == []


class TestRetries:
    def test_a_task_whose_worker_was_lost_goes_back_to_its_place(self) -> None:
        world = World(1)
        world.open(0, tasks=2, rules=Rules(retries=1, retry_lost=True))
        assert world.exit(0) == [("RetryTask", (0, 0), "lost"), ("StartWorker", 1, 0)]
        assert world.ready(1) == [("SendTasks", 1, [(0, 0)])]

    def test_a_task_that_kills_worker_after_worker_is_given_up_with_its_story(self) -> None:
        world = World(1)
        world.open(0, tasks=1, seal=True, rules=Rules(retries=2, retry_lost=True))
        task = world.held[0][0]
        for worker in (0, 1):
            assert named(world.exit(worker, cause=f"loss {worker}"), "FailTask") == []
            world.ready(worker + 1)
        assert named(world.exit(2, cause="loss 2"), "FailTask") == [("FailTask", (0, 0), "loss 2")]
        assert (task.attempts, task.losses) == (3, ("loss 0", "loss 1", "loss 2"))

    def test_without_the_rule_a_loss_is_a_failure(self) -> None:
        world = World(1)
        world.open(0, tasks=1, rules=Rules(retries=5))
        assert named(world.exit(0), "FailTask", "RetryTask") == [("FailTask", (0, 0), "lost")]

    def test_an_exception_that_is_tried_again_is_the_outcome_after_the_last_attempt(self) -> None:
        world = World(1)
        world.open(0, tasks=1, seal=True, rules=Rules(retries=1))
        assert world.falter(0) == [("RetryTask", (0, 0), None), ("SendTasks", 0, [(0, 0)])]
        assert world.falter(0) == [("ResolveTasks", [((0, 0), "its error")]), ("FinishJob", 0)]

    def test_what_was_cancelled_meanwhile_is_not_tried_again(self) -> None:
        world = World(1)
        world.open(0, tasks=1, seal=True, rules=Rules(retries=1, retry_lost=True))
        assert world.cancel(0) == []
        actions = world.falter(0)
        assert named(actions, "DropTask", "FinishJob", "SendTasks") == [("DropTask", (0, 0)), ("FinishJob", 0)]

    def test_a_wrong_answer_blames_the_worker(self) -> None:
        world = World(1)
        world.open(0, tasks=1)
        with pytest.raises(ProtocolError, match="worker 0 answered task 7"):
            world.say(TaskFaltered(WorkerId(0), JobId(0), 7, "its error", SLOW))
        assert named(world.finish(0), "ResolveTasks") != []


class TestCancelAndKill:
    def test_what_runs_is_dropped_and_its_worker_killed_and_replaced(self) -> None:
        world = World(2)
        world.open(0, tasks=3, seal=True)
        assert world.cancel(0, kill=True, asker="me") == [
            ("DropTask", (0, 2)),
            ("KillWorker", 0),
            ("DropTask", (0, 0)),
            ("KillWorker", 1),
            ("DropTask", (0, 1)),
            ("FinishJob", 0),
            ("AnswerCancel", "me", True),
        ]
        assert world.exit(0) == [("StartWorker", 2, 0)]

    def test_after_a_cancel_without_a_kill(self) -> None:
        world = World(1)
        world.open(0, tasks=1, seal=True)
        assert world.cancel(0, asker="me") == [("AnswerCancel", "me", False)]
        assert named(world.cancel(0, kill=True), "KillWorker", "DropTask") == [("KillWorker", 0), ("DropTask", (0, 0))]

    def test_what_another_job_has_behind_the_task_is_taken_back_first(self) -> None:
        world = self.mixed()
        assert world.cancel(0, kill=True, asker="me") == [("RecallTasks", 0), ("AnswerCancel", "me", False)]
        behind = len(world.held[0]) - 1
        assert named(world.recalled(0, behind), "KillWorker", "DropTask") == [("KillWorker", 0), ("DropTask", (0, 1))]
        world.exit(0)
        assert sent(world.ready(1)) != []

    def test_a_result_on_its_way_is_waited_for(self) -> None:
        world = self.mixed()
        world.cancel(1, kill=True)
        assert named(world.recalled(0, len(world.held[0]) - 2), "KillWorker") == []  # it runs the second
        assert named(world.finish(0), "ResolveTasks", "KillWorker", "DropTask") == [
            ("ResolveTasks", [((0, 1), "result")]),
            ("KillWorker", 0),
            ("DropTask", (1, 1)),
        ]

    def test_a_doomed_task_that_finished_in_time_takes_nobody_with_it(self) -> None:
        world = self.mixed()
        world.cancel(0, kill=True)
        world.recalled(0, len(world.held[0]) - 2)  # it runs the second, so the first is done
        assert named(world.finish(0), "KillWorker") == []
        assert named(world.settled(0), "KillWorker") == []
        assert named(world.finish(0), "ResolveTasks") == [("ResolveTasks", [((1, 1), "result")])]

    def test_a_condemned_worker_may_die_by_itself(self) -> None:
        world = self.mixed()
        world.cancel(0, kill=True)
        assert named(world.exit(0, len(world.held[0]) - 1), "FailTask") == [("FailTask", (0, 1), "lost")]

    @staticmethod
    def mixed() -> World:
        """One worker holds a task of job 0 and, behind it, some of job 1; all are believed to be short."""
        world = World(1)
        world.learn(0, FAST)
        world.learn(1, FAST)
        world.submit(0, tasks=1)
        world.submit(1, tasks=8)
        jobs = [task.job for task in world.held[0]]
        assert jobs[0] == 0
        assert set(jobs[1:]) == {1}
        return world


class TestResizing:
    def test_growing_starts_workers_at_once(self) -> None:
        world = World(1)
        assert world.resize(3) == [("StartWorker", 1, 1), ("StartWorker", 2, 2)]
        assert world.resize(3) == []

    def test_the_idle_go_first_and_leave_an_empty_place(self) -> None:
        world = World(3)
        world.open(1, tasks=1)
        assert world.held.keys() == {0}
        world.open(2, tasks=1)
        assert world.resize(1) == [("RetireWorker", 2)]  # and of the busy who has the highest place:
        assert world.finish(1) == [("ResolveTasks", [((2, 0), "result")]), ("RetireWorker", 1)]
        assert world.exit(2) == [("VacateSlot", 2)]
        assert world.exit(1) == [("VacateSlot", 1)]
        assert sent(world.submit(1, 2)) == []
        assert sent(world.finish(0)) == [(0, 1)]

    def test_what_a_busy_one_has_not_begun_goes_back_to_its_place(self) -> None:
        world = World(2)
        world.learn(1, FAST)
        world.submit(1, 4 * MAX_BATCH)
        held = [(task.job, task.index) for task in world.held[1]]
        assert world.resize(1) == [("RecallTasks", 1)]
        actions = world.recalled(1, len(held) - 1)
        assert not named(actions, "SendTasks", "RetireWorker")
        assert world.settled(1) == []
        assert named(world.finish(1, seconds=FAST), "RetireWorker", "SendTasks") == [("RetireWorker", 1)]
        messages = named(world.finish(0, len(world.held[0]), seconds=FAST), "SendTasks")
        assert messages[0][2][0] == held[1]

    def test_one_that_starts_goes_before_one_that_works(self) -> None:
        world = World(2, ready=False)
        world.ready(0)
        world.open(1, tasks=1)
        assert world.resize(1) == []
        assert world.ready(1) == [("RetireWorker", 1)]

    def test_a_lent_one_is_wanted_back(self) -> None:
        world = World(2)
        world.open(1, tasks=1)
        assert world.say(LoanWanted()) == [("LendWorker", 1)]
        assert not world.scheduler.wants_workers
        world.resize(1)
        assert world.scheduler.wants_workers
        assert world.say(WorkerReturned(WorkerId(1))) == [("RetireWorker", 1)]

    def test_who_was_to_leave_may_stay(self) -> None:
        world = World(2)
        world.open(1, tasks=2)
        world.resize(1)
        assert world.resize(2) == []
        assert sent(world.submit(1, 2)) == []
        assert sent(world.finish(1)) == [(1, 1)]

    def test_a_place_whose_worker_is_retiring_gets_the_next_one(self) -> None:
        world = World(2)
        assert world.resize(1) == [("RetireWorker", 1)]
        assert world.resize(2) == []
        assert world.exit(1) == [("StartWorker", 2, 1)]

    def test_a_lost_worker_that_was_to_leave_is_not_replaced(self) -> None:
        world = World(2)
        world.open(1, tasks=2)
        world.resize(1)
        assert world.exit(1) == [("FailTask", (1, 1), "lost"), ("VacateSlot", 1)]
        assert named(world.exit(0), "StartWorker") == [("StartWorker", 2, 0)]

    def test_after_the_end_nothing_changes(self) -> None:
        world = World(1)
        world.say(PoolTerminated("cause"))
        assert world.resize(3) == []


class TestTheEnd:
    def test_close_retires_the_idle_and_ends_when_all_are_gone(self) -> None:
        world = World(2)
        assert world.say(PoolClosed()) == [("RetireWorker", 1), ("RetireWorker", 0)]
        assert world.say(PoolClosed()) == []
        assert world.exit(0) == []
        assert world.exit(1) == [("EndPool", None)]
        assert world.say(PoolTerminated("late")) == []

    def test_close_waits_for_open_jobs(self) -> None:
        world = World(1)
        world.open(7, tasks=1)
        assert world.say(PoolClosed()) == []
        world.submit(7, 1)
        world.finish(0)
        assert world.seal(7) == []
        assert world.finish(0) == [
            ("ResolveTasks", [((7, 1), "result")]),
            ("FinishJob", 7),
            ("RetireWorker", 0),
        ]
        assert world.exit(0) == [("EndPool", None)]

    def test_close_lets_initializers_run(self) -> None:
        world = World(2, ready=False)
        world.ready(0)
        assert world.say(PoolClosed()) == [("RetireWorker", 0)]
        assert world.exit(0) == []
        assert world.ready(1) == [("RetireWorker", 1)]
        assert world.exit(1) == [("EndPool", None)]

    def test_close_does_not_wait_for_an_initializer_for_ever(self) -> None:
        world = World(1, ready=False)
        assert world.say(PoolClosed()) == []
        assert world.scheduler.wake_at == world.now + START_GRACE_SECONDS
        world.now += START_GRACE_SECONDS
        assert world.say(TimePassed()) == [("KillWorker", 0)]
        assert world.scheduler.wake_at is None
        assert world.ready(0) == []
        assert world.say(InitializerFailed(WorkerId(0), "late")) == []
        assert world.exit(0) == [("EndPool", None)]

    def test_close_without_initializers_waits_for_nobody_who_starts(self) -> None:
        world = World(2, ready=False, grace=0.0)
        world.ready(0)
        assert world.say(PoolClosed()) == [("RetireWorker", 0), ("KillWorker", 1)]
        assert world.scheduler.wake_at is None
        assert world.ready(1) == []
        assert world.exit(1) == []
        assert world.exit(0) == [("EndPool", None)]

    def test_close_lets_those_start_whom_work_waits_for(self) -> None:
        world = World(1, ready=False, grace=0.0)
        world.open(7, tasks=1, seal=True)
        assert world.say(PoolClosed()) == []
        assert world.ready(0) == [("SendTasks", 0, [(7, 0)])]
        assert named(world.finish(0), "RetireWorker") == [("RetireWorker", 0)]

    def test_after_close_workers_are_replaced_only_while_there_is_work(self) -> None:
        world = World(1)
        world.open(7, tasks=2, seal=True)
        world.say(PoolClosed())
        assert named(world.exit(0), "StartWorker") == [("StartWorker", 1, 0)]
        world.ready(1)
        assert world.exit(1) == [("FailTask", (7, 1), "lost"), ("FinishJob", 7), ("EndPool", None)]

    def test_a_worker_with_an_unsettled_recall_retires_when_it_has_settled(self) -> None:
        world = TestRecall().stuck()
        world.seal(7)
        world.say(PoolClosed())
        world.say(TimePassed(), after=RECALL_SECONDS)
        world.recalled(0, 2)
        world.finish(0)
        world.finish(2, 2)
        assert world.settled(0) == [("RetireWorker", 0)]

    def test_terminate_fails_everything_and_kills_everybody(self) -> None:
        world = World(1)
        world.open(7, tasks=2, seal=True)
        assert world.say(PoolTerminated("terminated")) == [
            ("FailTask", (7, 0), "terminated"),
            ("KillWorker", 0),
            ("FailTask", (7, 1), "terminated"),
            ("FinishJob", 7),
        ]
        assert world.finish(0) == []
        assert world.say(PoolTerminated("again")) == []
        assert world.exit(0) == [("EndPool", None)]

    def test_terminate_hastens_a_close(self) -> None:
        world = World(1)
        world.say(PoolClosed())
        assert world.say(PoolTerminated("terminated")) == [("KillWorker", 0)]
        assert world.exit(0) == [("EndPool", None)]

    def test_what_comes_after_the_end_has_an_outcome_too(self) -> None:
        world = World(1)
        world.open(7)
        world.say(PoolTerminated("terminated"))
        world.exit(0)
        assert world.submit(7, 1) == [("FailTask", (7, 0), "terminated")]
        assert world.seal(7) == [("FinishJob", 7)]
        assert world.open(8, tasks=1) == [("FailTask", (8, 0), "terminated")]
        assert world.cancel(8) == [("FinishJob", 8)]
        assert world.submit(8, 1) == [("DropTask", (8, 1))]


class TestProtocolFaults:
    """A worker that says what cannot be true is blamed, and the event changes nothing."""

    @pytest.mark.parametrize(
        "event",
        [
            TasksFinished(WorkerId(0), [(JobId(7), 1, None, 0.0)]),
            TasksFinished(WorkerId(0), [(JobId(8), 0, None, 0.0)]),
            TasksFinished(WorkerId(0), [(JobId(7), 0, None, 0.0), (JobId(7), 1, None, 0.0)]),
            TasksFinished(WorkerId(0), []),
            TasksFinished(WorkerId(1), [(JobId(7), 0, None, 0.0)]),
            TasksFinished(WorkerId(9), [(JobId(7), 0, None, 0.0)]),
            WorkerExited(WorkerId(0), 2, 1, "lost"),
            WorkerExited(WorkerId(0), -1, 1, "lost"),
            WorkerExited(WorkerId(0), 0, 2, "lost"),
            WorkerExited(WorkerId(0), 1, 0, "lost"),
            WorkerExited(WorkerId(9), 0, 0, "lost"),
            TasksRecalled(WorkerId(0), 0),
            RecallSettled(WorkerId(0)),
            WorkerBecameReady(WorkerId(0)),
            InitializerFailed(WorkerId(0), "error"),
        ],
    )
    def test_blames_the_worker(self, event: Any) -> None:
        world = World(2, ready=False)
        world.ready(0)
        world.open(7, tasks=1, seal=True)
        with pytest.raises(ProtocolError, match=f"worker {event.worker}"):
            world.say(event)
        world.scheduler.check()
        assert world.finish(0) == [("ResolveTasks", [((7, 0), "result")]), ("FinishJob", 7)]
