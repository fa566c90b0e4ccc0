"""Objects that were put into a pool: pickled once, sent once to each worker, referred to by number.

::

    caller's process                                             worker
      Reference ─► HeldObject (payload) ── before the first ──►    Keeper ── decoded once ──► the object
          │                                payload that names it      ▲
          └──── a payload: "object 7" ────────────────────────────────┘

A new version of an object is another ``HeldObject`` with another number; the payloads that name the old one keep it
until they were answered, and then the workers are told to drop it. So nobody sees two versions in one call, and
nothing is dropped that may yet be asked for.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

from tpool.errors import DecodeError, TransportError
from tpool.tensors.payload import HeldObject, Payload, Received

__all__ = ["Holder", "Keeper", "Reference", "held_object", "reduce_reference"]


class Reference:
    """What ``pool.put`` gives: stands for an object that the workers of one pool keep.

    Passed to a call, anywhere in its arguments, it arrives as the object. When the reference and the calls that use it
    are gone, the workers drop the object.
    """

    __slots__ = ("_held", "_put", "_what")

    def __init__(self, put: Callable[[object], HeldObject], obj: object) -> None:
        self._put = put
        self.update(obj)

    def update(self, obj: object) -> None:
        """Have another object stand in its place; calls that were made before still get the earlier one.

        >>> with tpool.Pool(2) as pool:
        ...     table = pool.put({"one": 1})
        ...     before = pool.apply(len, (table,))
        ...     table.update({"one": 1, "two": 2})
        ...     before, pool.apply(len, (table,))
        (1, 2)

        In-place changes of an object's tensors need no update: the memory is shared.

        Args:
            obj: the new version; pickled at once.

        Raises:
            Exception: it cannot be pickled; the earlier object stays.
        """
        self._held = self._put(obj)
        self._what = f"{type(obj).__module__}.{type(obj).__qualname__}"

    def __repr__(self) -> str:
        return f"<tpool.Reference to an object of type {self._what}>"

    def __reduce__(self) -> NoReturn:
        raise TransportError(
            "a reference means something to the workers of its own pool alone: pass it in the arguments of a call to"
            " that pool, or put the object into each pool"
        )


def reduce_reference(reference: Reference, message: Any) -> Any:
    """How a payload of the pool names the object; of another pool it is refused."""
    held = reference._held
    if held.memory is not message.outgoing.memory:
        return reference.__reduce__()
    message.held.append(held)
    message.marked = True
    return held_object, (held.id,)


def held_object(id: int) -> NoReturn:
    """In a stream, stands for an object that the receiver keeps."""
    raise TransportError(f"object {id} is known only to the pool that it was put into")


class _Watch(weakref.ref[HeldObject]):
    """Appends itself to a deque when the object is gone: by a method of C, which no signal handler can interrupt."""

    __slots__ = ("id",)

    id: int


class Holder:
    """The objects put into one pool. Any thread may call.

    Args:
        memory: the pool's, by which references of other pools are told.
        wake: has the handler look at ``dropped``; takes no lock.

    Attributes:
        dropped: of objects that nobody can ask for any more; appended to as these die, in any thread.
    """

    def __init__(self, memory: object, wake: Callable[[], None]) -> None:
        self.dropped: deque[_Watch] = deque()
        self._memory = memory
        self._wake = wake
        self._watches: dict[int, _Watch] = {}  # by number; a weak reference that is gone tells nothing

    def hold(self, payload: Payload) -> HeldObject:
        """Take an object in."""
        held = HeldObject(payload, self._memory)
        # Called after the watch, as it was made before. Where a signal handler raises in it, the handler's thread
        # hears of the drop when it next looks by itself.
        weakref.finalize(held, self._wake).atexit = False
        watch = _Watch(held, self.dropped.append)
        watch.id = held.id
        self._watches[held.id] = watch
        return held

    def take_dropped(self) -> list[int]:
        """What is to be told to the workers, once."""
        taken: list[int] = []
        while self.dropped:
            taken.append(self.dropped.popleft().id)
            self._watches.pop(taken[-1], None)
        return taken


class Keeper:
    """The objects that a worker keeps, decoded when they are first asked for. Used by its main thread."""

    def __init__(self) -> None:
        self._entries: dict[int, Any] = {}

    def add(self, id: int, received: Received) -> None:
        """An object has come."""
        self._entries[id] = received

    def drop(self, id: int) -> None:
        """Nobody will ask for this object."""
        entry = self._entries.pop(id, None)
        if isinstance(entry, Received):
            entry.discard()

    def get(self, id: int, loads: Callable[[Received], object]) -> object:
        """The object, the same one each time.

        Raises:
            DecodeError: it could not be unpickled; each time again.
        """
        entry = self._entries[id]
        if isinstance(entry, Received):
            try:
                entry = _Decoded(loads(entry))
            except DecodeError as error:
                entry = error
            self._entries[id] = entry
        if isinstance(entry, DecodeError):
            raise entry.with_traceback(None)
        return entry.value


class _Decoded:
    """Tells an object from what is not decoded yet, whatever its type."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value
