"""Why a task has no result, told to its caller: the causes that the scheduler passes on, as exceptions."""

from __future__ import annotations

import signal
from typing import Any

from tpool.engine import WorkerLoss
from tpool.errors import PoolTerminatedError, TaskTimeoutError, WorkerLostError, WorkerStartError
from tpool.results import Failure, SharedFailure
from tpool.task import Task, TimedOut

_ADVICE = ". Its memory was probably exhausted, or its code crashed; the pool goes on with a new worker"


def lost(loss: WorkerLoss, task: Task, story: str) -> Failure:
    """The worker that ran the task is gone."""
    message = f"{tell(loss)} while it ran task {task.index} of {story}{_earlier(task)}"
    return Failure(WorkerLostError(message + _ADVICE, loss.pid, loss.exitcode))


def timed_out(cause: TimedOut, task: Task, story: str) -> Failure:
    """The task ran for too long."""
    message = f"task {task.index} of {story} ran for longer than its timeout of {cause.timeout:g} s{_earlier(task)}"
    return Failure(TaskTimeoutError(f"{message}. Worker {cause.worker}, which ran it, was killed"))


def _earlier(task: Task) -> str:
    """What became of the attempts before the last one."""
    if task.attempts < 2:
        return ""
    losses = "".join(f"; {why(loss)}" for loss in task.losses[:-1])
    return f", in attempt {task.attempts}, the last (before that{losses or ' it raised'})".replace("that; ", "that: ")


def why(cause: Any) -> str:
    """Why an attempt was in vain."""
    if isinstance(cause, WorkerLoss):
        return tell(cause)
    if isinstance(cause, TimedOut):
        return f"worker {cause.worker} was killed after {cause.timeout:g} s, its timeout"
    return "it raised an exception that is to be tried again"


def terminated(story: str) -> Failure:
    """The pool was terminated before."""
    cure = "ask for results inside its with block, or end it by close() and join()"
    return Failure(PoolTerminatedError(f"the pool was terminated before {story} had its result; {cure}"))


def start_failed(cause: Any) -> Failure | SharedFailure:
    """Workers cannot start, or an initializer raised ``cause``."""
    if not isinstance(cause, WorkerLoss):
        return SharedFailure(cause)
    message = f"the pool gave up: its workers cannot start; the last one, {tell(cause)} before it was ready"
    return Failure(WorkerStartError(message))


def tell(loss: WorkerLoss) -> str:
    """What happened to a worker, as the beginning of a sentence."""
    who = loss.worker if loss.pid is None else f"{loss.worker}, pid {loss.pid},"
    if loss.story:
        return f"{who} {loss.story}"
    if loss.exitcode is None:
        return f"{who} was lost (its exit status could not be had: the process that started it died too)"
    if loss.exitcode < 0:
        try:
            name = signal.Signals(-loss.exitcode).name
        except ValueError:
            name = f"signal {-loss.exitcode}"
        return f"{who} was killed by {name}"
    return f"{who} exited with code {loss.exitcode}"
