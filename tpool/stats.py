"""What a pool tells of itself in numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PoolStats", "WorkerStats"]


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What one place in the pool has done so far, all workers together that held it.

    Attributes:
        id: its number, from 0, as ``get_worker_info().id``.
        pid: of the worker that holds it now; None if there is none.
        tasks_done: units of work that were answered (a chunk of a ``map`` counts once).
        busy_seconds: how long the tasks that were answered ran, decoding and encoding included.
        transfer_seconds: the part of ``busy_seconds`` in which functions, arguments and results were decoded and
            encoded, waiting for shared memory included. The rest of it, the functions themselves ran. What is not in
            it: writing to and reading from the pipe, and reading the definitions that functions of a script bring
            along, both of which count as idle; and whatever this process does, as encoding arguments.
        idle_seconds: the rest of the time in which there was a worker that could take tasks.
        moved_nbytes: bytes that travelled by handle, in both directions.
        piped_nbytes: bytes that travelled by copy through the pipe, in both directions.
        memory_nbytes: shared memory that results from here hold, or that is kept warm for the next.
        memory_peak_nbytes: the most that it ever was.
        restarts: how many workers there were before the present one.
        losses: why the latest of them went, the last one last.
    """

    id: int
    pid: int | None
    tasks_done: int
    busy_seconds: float
    idle_seconds: float
    moved_nbytes: int
    piped_nbytes: int
    memory_nbytes: int
    memory_peak_nbytes: int
    restarts: int
    losses: tuple[str, ...]
    transfer_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool has done so far.

    Attributes:
        tasks_done: units of work answered by workers (a chunk of a ``map`` counts once).
        workers_lost: workers that died while they ran a task.
        moved_nbytes: bytes that travelled by handle, in both directions.
        piped_nbytes: bytes that travelled by copy through pipes, in both directions.
        tasks_retried: attempts that were in vain and were followed by another.
        tasks_timed_out: attempts that ran for too long, so that their workers were killed.
        memory_nbytes: shared memory that the caller's tensors hold, or that is kept warm for the next; without that
            of the workers.
        memory_peak_nbytes: the most that it ever was.
        workers: each place in the pool.
    """

    tasks_done: int
    workers_lost: int
    moved_nbytes: int
    piped_nbytes: int
    tasks_retried: int = 0
    tasks_timed_out: int = 0
    memory_nbytes: int = 0
    memory_peak_nbytes: int = 0
    workers: tuple[WorkerStats, ...] = ()

    @property
    def busy_seconds(self) -> float:
        """How long all tasks that were answered ran."""
        return sum(worker.busy_seconds for worker in self.workers)

    @property
    def transfer_seconds(self) -> float:
        """How much of that was decoding and encoding; see ``WorkerStats``."""
        return sum(worker.transfer_seconds for worker in self.workers)

    @property
    def idle_seconds(self) -> float:
        """How long workers that could take tasks had none."""
        return sum(worker.idle_seconds for worker in self.workers)

    @property
    def restarts(self) -> int:
        """How many workers were replaced, for whatever reason."""
        return sum(worker.restarts for worker in self.workers)
