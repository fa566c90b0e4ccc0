"""What a timeline consists of. All times are seconds since the pool was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["EncodeSpan", "LifeSpan", "ReadSpan", "Spans", "TaskSpan"]


class TaskSpan(NamedTuple):
    """One task in its worker: received from ``began`` on, run from ``received`` on, sent from ``ran`` on.

    Attributes:
        worker: its place in the pool, as ``get_worker_info().id``.
        call: what it belongs to, such as ``map(score)``.
        task: its number in that call; a chunk of a ``map`` counts once.
        began: the worker took it up.
        received: its function and arguments were decoded.
        ran: the function had returned or raised.
        ended: the result was encoded; for a task without one, the end of the worker or of the timeline.
        received_nbytes: of the arguments, by handle and by copy.
        sent_nbytes: of the result.
        fate: empty; or ``running``, or ``lost`` with its worker, or ``stopped`` with the pool.
    """

    worker: int
    call: str
    task: int
    began: float
    received: float
    ran: float
    ended: float
    received_nbytes: int = 0
    sent_nbytes: int = 0
    fate: str = ""


class EncodeSpan(NamedTuple):
    """Something that a thread of the caller encoded for the workers.

    Attributes:
        thread: its name; ``feeder`` and a number for the threads that draw the inputs of ``imap``.
        began: when it began.
        ended: when that was done, waiting for shared memory included.
        nbytes: of what it became.
    """

    thread: str
    began: float
    ended: float
    nbytes: int


class ReadSpan(NamedTuple):
    """Between two tasks a worker read the definitions that functions of the caller's script need.

    Attributes:
        worker: its place in the pool.
        began: when it began.
        ended: when that was done.
        nbytes: of the definitions.
    """

    worker: int
    began: float
    ended: float
    nbytes: int


class LifeSpan(NamedTuple):
    """One worker process.

    Attributes:
        worker: its place in the pool.
        pid: None if it never had a process.
        began: it was asked for.
        ready: it could take tasks; None if it never could.
        ended: it was gone; None if it is there.
        why: it is gone, in words.
        lost: it was killed or died; not where the whole pool was terminated.
    """

    worker: int
    pid: int | None
    began: float
    ready: float | None
    ended: float | None
    why: str
    lost: bool


@dataclass(slots=True)
class Spans:
    """All of a timeline; see ``Timeline``."""

    tasks: list[TaskSpan] = field(default_factory=list)
    readings: list[ReadSpan] = field(default_factory=list)
    encodings: list[EncodeSpan] = field(default_factory=list)
    lives: list[LifeSpan] = field(default_factory=list)
    dropped: int = 0

    def threads(self) -> list[str]:
        """The names of the caller's threads, each once."""
        return list(dict.fromkeys(span.thread for span in self.encodings))

    def workers(self) -> list[int]:
        """The places in the pool, in order."""
        return sorted({span.worker for span in self.tasks} | {life.worker for life in self.lives})
