"""What a pool tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool has done so far.

    Attributes:
        tasks_done: units of work answered by workers (a chunk of a ``map`` counts once).
        workers_lost: workers that died while they ran a task.
        moved_nbytes: bytes that travelled by handle, in both directions.
        piped_nbytes: bytes that travelled through pipes, in both directions.
        tasks_retried: attempts that were in vain and were followed by another.
        tasks_timed_out: attempts that ran for too long, so that their workers were killed.
    """

    tasks_done: int
    workers_lost: int
    moved_nbytes: int
    piped_nbytes: int
    tasks_retried: int = 0
    tasks_timed_out: int = 0
