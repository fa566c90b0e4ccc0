"""What a case asks of a pool, and the features by which a case is matched to pools that can run it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

#: Takes any objects as input (all but DataLoader, which takes indices).
ARGUMENTS = "arguments"
#: Accepts a single task and answers it (``apply``).
APPLY = "apply"
#: Draws its input from an iterator while results are consumed, or at least accepts one.
STREAM = "stream"
#: Recycles workers after so many tasks.
RECYCLE = "recycle"
#: Can be stopped while its workers are busy.
TERMINATE = "terminate"

#: A stock ``multiprocessing.Pool`` has them all.
POOL = frozenset({ARGUMENTS, APPLY, STREAM, RECYCLE, TERMINATE})

Function = Callable[[Any], Any]


class Handle(Protocol):
    """An open pool. ``chunksize=None`` means the pool's own choice."""

    def map(self, function: Function, items: Sequence[Any], chunksize: int | None = None) -> Sequence[Any]: ...

    def imap(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]: ...

    def imap_unordered(self, function: Function, items: Iterable[Any], chunksize: int = 1) -> Iterator[Any]: ...

    def apply(self, function: Function, item: object) -> object: ...

    def submit(self, function: Function, items: Sequence[Any]) -> None:
        """Start tasks and do not wait for them."""

    def close(self) -> None:
        """Take no more work, and return when all workers have ended."""

    def terminate(self) -> None:
        """Stop now, busy or not, and return when all workers have ended."""


class Peer:
    """A library that offers a process pool.

    Attributes:
        title: the name in tables.
        note: what a reader must know about how it is used here.
        features: which cases it can run.
        cases: patterns of the names of cases that it takes part in.
    """

    title = ""
    note = ""
    features: frozenset[str] = POOL
    cases: tuple[str, ...] = ("*",)

    def version(self) -> str:
        """The version of the library."""
        raise NotImplementedError

    def open(self, workers: int, maxtasksperchild: int | None = None) -> Handle:
        """A new pool; a first task may still have to wait for its workers."""
        raise NotImplementedError


def library_version(name: str) -> str:
    """The installed version of a distribution."""
    return importlib.metadata.version(name)


def default_chunk(items: Sequence[Any]) -> int:
    """Eight chunks in all, for libraries that leave the choice to the caller."""
    return max(1, -(-len(items) // 8))
