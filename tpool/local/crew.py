"""What the supervisor and the members of one pool write down together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tpool.messages import JobId
from tpool.tensors.payload import Payload

__all__ = ["Crew", "Traffic"]

Jobs = dict[JobId, tuple[int, Payload | bytes]]


@dataclass(slots=True)
class Traffic:
    """Bytes to and from all workers, by handle and through pipes; written by the handler's thread."""

    moved_nbytes: int = 0
    piped_nbytes: int = 0


@dataclass(slots=True)
class Crew:
    """What the members of one pool share; the handler's thread's, but for ``jobs``, to which callers add.

    Attributes:
        jobs: what the tasks of each open job have in common.
        starving: members that wait for memory, in the order in which they began to.
        forgetful: members that have not been told of jobs and objects to be forgotten.
    """

    traffic: Traffic = field(default_factory=Traffic)
    jobs: Jobs = field(default_factory=dict)
    starving: dict[Any, None] = field(default_factory=dict)
    forgetful: dict[Any, None] = field(default_factory=dict)
