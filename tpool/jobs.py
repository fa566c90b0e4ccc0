"""The jobs of a pool, from the first task to FinishJob: what is left of each, and who still adds to it.

A part of the scheduler, and as pure: ``scheduler.py`` says what has happened, actions go where the dispatcher's go.

Invariants (:meth:`JobBook.check`): a job is in the book until FinishJob, which is said as soon as it is sealed and has
nothing unresolved; ``job.unresolved`` counts its tasks that are queued or held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tpool.dispatch import Dispatcher
from tpool.messages import DropTask, FailTask, FinishJob, RetryTask
from tpool.roster import Job, SoloJob
from tpool.task import JobId, Rules, Task

__all__ = ["JobBook"]


class JobBook:
    """The open jobs.

    Args:
        dispatcher: keeps their queues.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._jobs: dict[JobId, Job] = {}
        # Cancelled before they were sealed: the feeder may not know yet. It still has to seal them, which ends their
        # stay here, finished or not; so does withdrawing them.
        self._unheeded: set[JobId] = set()

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def __getitem__(self, job_id: JobId) -> Job:
        return self._jobs[job_id]

    def get(self, job_id: JobId) -> Job | None:
        """The job, or None if it was finished or never opened. A single look, so any thread may ask."""
        return self._jobs.get(job_id)

    def open(self, job_id: JobId, batch: int, rules: Rules | None) -> None:
        """Begin a job."""
        if job_id in self._jobs:
            raise AssertionError(f"job {job_id} was opened twice")
        if rules is None:
            job = Job(job_id, portion=batch)
        elif rules.timeout is None:
            job = Job(job_id, portion=batch, rules=rules)
        else:
            job = SoloJob(job_id, portion=1, rules=rules, timeout=rules.timeout)
        self._jobs[job_id] = job

    def add(self, job_id: JobId, tasks: list[Task]) -> None:
        """Queue new tasks, or drop them if nobody waits for them any more."""
        if job_id in self._unheeded:
            self._dispatcher.out.extend(map(DropTask, tasks))
            return
        job = self._unsealed(job_id, "was given more tasks")
        job.unresolved += sum([task.count for task in tasks])
        self._dispatcher.enqueue(job, tasks)

    def refuse(self, job_id: JobId, tasks: list[Task], cause: Any) -> None:
        """Fail new tasks: the pool was stopped, and their caller did not know yet. Somebody waits for these."""
        if job_id in self._unheeded:
            self._dispatcher.out.extend(map(DropTask, tasks))
            return
        self._unsealed(job_id, "was given more tasks")
        self._dispatcher.out.extend(FailTask(item, cause) for task in tasks for item in task.items())

    def seal(self, job_id: JobId) -> None:
        """No more tasks will come."""
        if job_id in self._unheeded:
            self._unheeded.remove(job_id)
            return
        job = self._unsealed(job_id, "was sealed")
        job.sealed = True
        self.finish_if_over(job)

    def _unsealed(self, job_id: JobId, story: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None or job.sealed:
            raise AssertionError(f"job {job_id} {story}, but it was sealed before or never opened")
        return job

    def cancel(self, job: Job) -> bool:
        """Drop what is queued of a job; returns whether that was anything."""
        if not job.cancelled and not job.sealed:
            self._unheeded.add(job.id)
        job.sealed = job.cancelled = True
        queued = self._dispatcher.take_queue(job)
        self.drop(queued)
        self.finish_if_over(job)  # which drop says only if there was a task
        return bool(queued)

    def withdraw(self, job_id: JobId) -> None:
        """Drop a job of which no more will be said, however much of it was."""
        job = self._jobs.get(job_id)
        if job is None:
            self._dispatcher.out.append(FinishJob(job_id))
        else:
            self.cancel(job)
        self._unheeded.discard(job_id)

    def drop(self, tasks: Iterable[Task]) -> None:
        """Tasks of cancelled jobs that nobody holds any more."""
        tasks = list(tasks)
        self._dispatcher.out.extend(map(DropTask, tasks))
        self.leave_unresolved(tasks)

    def put_back(self, tasks: Iterable[Task]) -> None:
        """Return tasks to the queues, or drop them if nobody waits for them."""
        by_job: dict[JobId, list[Task]] = {}
        for task in tasks:
            by_job.setdefault(task.job, []).append(task)
        for job_id, returned in by_job.items():
            job = self._jobs[job_id]
            if job.cancelled:
                self.drop(returned)
            else:
                self._dispatcher.put_back(job, returned)

    def fail(self, task: Task, cause: Any, again: bool) -> None:
        """A task was begun in vain, and its worker is gone.

        Args:
            task: which.
            cause: why.
            again: whether its rules have it tried again after this.
        """
        task.losses = (*task.losses, cause)
        if not self.try_again(task, cause, again):
            self._dispatcher.out.append(FailTask(task, cause))
            self.leave_unresolved([task])

    def try_again(self, task: Task, cause: Any, again: bool = True) -> bool:
        """Note an attempt in vain, and put the task back if it has another; returns whether it has."""
        task.attempts += 1
        job = self._jobs[task.job]
        if not again or task.attempts > job.rules.retries:
            return False
        if not job.cancelled:
            self._dispatcher.out.append(RetryTask(task, cause))
        self.put_back([task])
        return True

    def note_answers(self, job_id: JobId, count: int, seconds: float) -> None:
        """So many tasks of a job were answered, which ran for so long in all."""
        job = self._jobs[job_id]
        job.unresolved -= count
        job.learn(seconds / count)
        if job.sealed and not job.unresolved:
            self.finish_if_over(job)

    def leave_unresolved(self, tasks: Iterable[Task]) -> None:
        """Tasks that have their outcomes, said by whoever calls."""
        for task in tasks:
            job = self._jobs[task.job]
            job.unresolved -= task.count
            self.finish_if_over(job)

    def finish_if_over(self, job: Job) -> None:
        """Say FinishJob when it is due."""
        if job.sealed and not job.unresolved and self._jobs.pop(job.id, None) is not None:
            self._dispatcher.out.append(FinishJob(job.id))

    def fail_all(self, cause: Any) -> None:
        """The pool was stopped and no worker holds anything: fail what is queued. Unsealed jobs stay until sealed."""
        for job in list(self._jobs.values()):
            queued = self._dispatcher.take_queue(job)
            self._dispatcher.out.extend(FailTask(item, cause) for task in queued for item in task.items())
            job.unresolved = 0
            self.finish_if_over(job)

    def jobs(self) -> list[Job]:
        """All open jobs. For tests."""
        return list(self._jobs.values())

    def check(self, held: Iterable[Task]) -> None:
        """Assert the invariants, given all tasks that workers hold. For tests."""
        jobs = self._jobs.values()
        tasks = [*held, *(task for job in jobs for task in job.queued)]
        places = [(task.job, index) for task in tasks for index in range(task.index, task.index + task.count)]
        assert len(set(places)) == len(places), "a task is in two places"
        counts = Counter(job for job, _ in places)
        for job in jobs:
            assert counts[job.id] == job.unresolved, f"job {job.id} has {counts[job.id]} tasks, not {job.unresolved}"
            assert job.unresolved or not job.sealed, f"job {job.id} is over, but not finished"
        assert counts.keys() <= self._jobs.keys(), "a task outlived its job"
