"""Objects of ``multiprocessing`` that hold descriptors or semaphores, on their way to a worker.

The standard library lets locks, queues and their kin travel only while a process is being spawned, and asks the object
that spawns it to carry the descriptors. Here a payload carries them: for initializer arguments and for globals, which
stand for what a spawned process would inherit. Sockets and pipe ends travel so in any payload; the standard library
would serve them from a thread of the sender's.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import context, synchronize
from multiprocessing.connection import Connection
from typing import Any, Protocol

__all__ = ["DISPATCH", "Descriptor", "carrying", "received_descriptor", "refuse_forked_lock"]

FORKED_LOCK = (
    "this {kind} was made in a fork context, and a worker is no fork of this process; make it with"
    " multiprocessing.get_context('forkserver') or get_context('spawn'), or make the pool with context='fork'"
)


class Carrier(Protocol):
    """What takes descriptors along: a payload in the making."""

    def add_fd(self, fd: int, keep: object) -> int:
        """Index of a descriptor that travels; ``keep`` owns it."""
        ...


class Descriptor:
    """Owns a descriptor until it is handed on by ``detach``.

    Args:
        fd: taken over.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)

    def detach(self) -> int:
        """The descriptor, owned by the caller from now on; once."""
        if self._close.detach() is None:
            raise ValueError(f"descriptor {self.fd} was handed on already")
        return self.fd


def received_descriptor(index: int) -> Descriptor:
    """In a stream, stands for a descriptor that the payload carries."""
    raise ValueError(f"descriptor {index} is known only to the message that it came with")


class _Carried:
    """What the standard library pickles in place of a descriptor."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Callable[[int], Descriptor], tuple[int]]:
        return received_descriptor, (self.index,)


class _Spawning:
    """Stands for the process that is being spawned, as far as ``multiprocessing`` asks it anything."""

    DupFd = _Carried

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier

    def duplicate_for_child(self, fd: int) -> int:
        """Take a descriptor along; the caller may close its own at any time."""
        return carry(fd, self._carrier)


def carry(fd: int, carrier: Carrier) -> int:
    """Take a duplicate along."""
    owner = Descriptor(os.dup(fd))
    return carrier.add_fd(owner.fd, owner)


@contextmanager
def carrying(carrier: Carrier) -> Iterator[None]:
    """While it lasts, what travels only "through inheritance" may travel from this thread, with the carrier's help."""
    outer = context.get_spawning_popen()
    context.set_spawning_popen(_Spawning(carrier))  # type: ignore[arg-type]
    try:
        yield
    finally:
        context.set_spawning_popen(outer)


def refuse_forked_lock(obj: Any) -> None:
    """Raise for a semaphore without a name, which the receiver could not find.

    Raises:
        RuntimeError: as the standard library does (from Python 3.11.5 on), with the cure.
    """
    if issubclass(type(obj), synchronize.SemLock) and obj._semlock.name is None:
        raise RuntimeError(FORKED_LOCK.format(kind=type(obj).__name__))


def _reduce_socket(obj: socket.socket, carrier: Carrier) -> tuple[Any, ...]:
    index = carry(obj.fileno(), carrier)
    return _rebuild_socket, (_Carried(index), obj.family, obj.type, obj.proto, obj.gettimeout())


def _rebuild_socket(
    descriptor: Descriptor, family: int, type: int, proto: int, timeout: float | None
) -> socket.socket:
    rebuilt = socket.socket(family, type, proto, fileno=descriptor.detach())
    rebuilt.settimeout(timeout)
    return rebuilt


def _reduce_connection(obj: Connection, carrier: Carrier) -> tuple[Any, ...]:
    return _rebuild_connection, (_Carried(carry(obj.fileno(), carrier)), obj.readable, obj.writable)


def _rebuild_connection(descriptor: Descriptor, readable: bool, writable: bool) -> Connection:
    return Connection(descriptor.detach(), readable, writable)


DISPATCH: dict[type, Callable[[Any, Carrier], tuple[Any, ...]]] = {
    socket.socket: _reduce_socket,
    Connection: _reduce_connection,
}
"""Reducers by exact type, for any payload."""
