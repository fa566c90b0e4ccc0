"""Calls that do not pass through the handler's thread: made in a worker that the engine lends to callers."""

from __future__ import annotations

import logging
from time import monotonic

from tpool import failures
from tpool.engine import Encoded, Engine, Result, WorkerLoss
from tpool.handler import Handler
from tpool.task import Task

logger = logging.getLogger("tpool")


def call_directly(engine: Engine, handler: Handler, payload: Encoded, story: str) -> Result | None:
    """Make a call in the caller's thread and wait for its result.

    Args:
        engine: lends workers.
        handler: of the same pool.
        payload: of the call.
        story: names it in messages.

    Returns:
        The result, or the failure in its place; None where the call must be submitted, as no worker could be had.
    """
    job = handler.new_job(story)
    try:
        handler.direct[job] = (story, monotonic())
        answer = engine.call_now(job, payload)
    finally:
        handler.direct.pop(job, None)
    if not isinstance(answer, WorkerLoss):
        return answer
    if handler.terminating:
        return failures.terminated(story)
    handler.workers_lost += 1
    failure = failures.lost(answer, Task(job, 0, payload), story)
    logger.warning("%s", failure.take())
    return failure
