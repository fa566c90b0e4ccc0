"""Killing workers for the sake of a task: it has run out of time, or was cancelled and may not run on.

A part of the scheduler, and as pure. Nobody else's task may suffer: what stands behind the task in its worker is taken
back before the kill, and starts elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from tpool.dispatch import Dispatcher
from tpool.jobs import JobBook
from tpool.messages import KillWorker
from tpool.roster import Job, Worker, WorkerState
from tpool.task import TimedOut

__all__ = ["Killer"]


class Killer:
    """Kills workers.

    Args:
        dispatcher: knows what is due.
        book: the jobs.

    Attributes:
        condemned: an ordered set of the workers that are to be killed once they run only doomed tasks.
    """

    def __init__(self, dispatcher: Dispatcher, book: JobBook) -> None:
        self.condemned: dict[Worker, None] = {}
        self._dispatcher = dispatcher
        self._book = book

    def kill(self, worker: Worker) -> None:
        """Kill a worker, unless that was done."""
        if worker.state is not WorkerState.KILLED:
            self._dispatcher.withdraw(worker)
            worker.state = WorkerState.KILLED
            self._dispatcher.out.append(KillWorker(worker.id))

    def expire(self) -> None:
        """Kill the workers whose tasks have run out of time. They hold nothing else; see ``deadlines.py``."""
        dispatcher = self._dispatcher
        while (worker := dispatcher.deadlines.pop_due(dispatcher.now)) is not None:
            assert isinstance(worker, Worker)
            (task,) = worker.pop_all()
            rules = self._book[task.job].rules
            assert rules.timeout is not None
            self.kill(worker)
            self._book.fail(task, TimedOut(worker.id, rules.timeout), rules.retry_timed_out)

    def doom(self, job: Job, workers: Iterable[Worker]) -> bool:
        """Let no task of a cancelled job run on; returns whether a worker was killed at once."""
        job.doomed = True
        holders = [worker for worker in workers if any(task.job == job.id for task in worker.held)]
        self.condemned.update(dict.fromkeys(holders))
        killed = [self.judge(worker) for worker in holders]
        return any(killed)

    def judge(self, worker: Worker) -> bool:
        """Kill a condemned worker if it runs a doomed task and no other, and say whether it was.

        What it holds behind that task, and has not started, is taken back first. What it has started then is one task,
        and those before it whose results are on their way: we wait for these, so that nobody else's task is killed.
        """
        doomed = [self._book[task.job].doomed for task in worker.held]
        if any(doomed) and not all(doomed):
            if worker.state is WorkerState.READY and not worker.recalled:
                self._dispatcher.ask_back(worker)
            return False
        del self.condemned[worker]
        if not any(doomed):
            return False
        tasks = worker.pop_all()
        self.kill(worker)
        self._book.drop(tasks)
        return True
