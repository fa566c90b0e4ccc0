"""What was received becomes objects again.

A plain stream is read by pickle itself. In any other, names of *markers* (functions that cannot be called by
themselves) stand for methods of the one ``_Context`` of the message: its blocks, its descriptors, its definitions.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

from tpool.errors import DecodeError
from tpool.tensors import arrivals
from tpool.tensors.bare import BARE, LISTED, loads_bare
from tpool.tensors.definitions import Definitions
from tpool.tensors.descriptors import Descriptor, received_descriptor
from tpool.tensors.held import held_object
from tpool.tensors.leases import Block
from tpool.tensors.payload import STOP, TRAILER, GroupId, Received
from tpool.tensors.registry import Registry, definition, inherited

__all__ = ["load_group", "loads", "loads_plain"]

_BARE = frozenset({BARE, LISTED})


def loads(received: Received, rules: Definitions | Registry) -> object:
    """Unpickle a message, once; its descriptors are closed unless the object took them.

    Raises:
        DecodeError: the cause is what was raised.
    """
    data = received.data
    stream = data if type(data) is bytes else data.view  # type: ignore[union-attr]
    if not stream:
        raise DecodeError("this message was decoded or discarded before")
    found: list[str] = []
    try:
        if stream[-1] == STOP:
            return pickle.loads(stream)
        if type(data) is bytes and data[-1] in _BARE:
            return loads_bare(data, arrivals.Incoming(received.blocks, received.fds))
        context = _Context(received, rules)
        found = context.found
        return _reader(data, received, context).load()
    # A SystemExit of the user's, too: who decodes may be a thread that serves everybody.
    except (Exception, SystemExit) as error:
        raise _decode_error("an object", error, found) from error
    finally:
        del stream  # a view of the block that discard() drops
        received.discard()


def loads_plain(stream: bytes) -> object:
    """Unpickle a plain stream.

    Raises:
        DecodeError: the cause is what was raised.
    """
    try:
        return pickle.loads(stream)
    except (Exception, SystemExit) as error:
        raise _decode_error("an object", error, []) from error


def load_group(gid: GroupId, received: Received, registry: Registry) -> None:
    """Take in a group of definitions.

    Raises:
        DecodeError: names what it was that could not be rebuilt.
    """
    context = _Context(received, registry)
    kind, key = "group", gid
    try:
        reader = _reader(received.data, received, context)
        while reader.more():
            kind, key = reader.load()
            registry.apply(kind, key, reader.load())
    except (Exception, SystemExit) as error:
        raise _decode_error(f"{kind} {key!r} of the caller's __main__", error, context.found) from error
    finally:
        received.discard()


def _decode_error(what: str, error: BaseException, found: list[str]) -> DecodeError:
    where = f" (after it had found {', '.join(found[-3:])})" if found else ""
    return DecodeError(f"{what} arrived but could not be unpickled: {type(error).__name__}: {error}{where}")


class _Unpickler(pickle.Unpickler):
    """One stream that is not plain. What it finds for a marker must not refer to it: its memo would make a cycle."""

    context: _Context
    file: Any
    end: int

    def find_class(self, module: str, name: str) -> Any:
        if name in _MARKERS and _MARKERS[name] == module:
            return self.context.marker(name)
        self.context.found.append(f"{module}.{name}")
        return super().find_class(module, name)

    def more(self) -> bool:
        """Whether another pickle follows."""
        return bool(self.file.tell() < self.end)


def _reader(data: bytes | Block, received: Received, context: _Context) -> _Unpickler:
    if isinstance(data, bytes):
        nbytes = len(data)
        storages, _ = TRAILER.unpack_from(data, nbytes - TRAILER.size)
        file: Any = io.BytesIO(data)
    else:
        nbytes = len(data.view)
        storages, _ = TRAILER.unpack_from(data.view, nbytes - TRAILER.size)
        file = _BlockFile(data.view)
    reader = _Unpickler(file, buffers=[block.view for block in received.blocks[storages:]])
    reader.context = context
    reader.file = file
    reader.end = nbytes - TRAILER.size
    return reader


class _BlockFile:
    """A file over a block; unlike ``io.BytesIO`` it makes no copy of all of it."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def tell(self) -> int:
        """How far it was read."""
        return self._at

    def read(self, nbytes: int) -> bytes:
        """As of any file."""
        start = self._at
        self._at = min(start + nbytes, len(self._view))
        return bytes(self._view[start : self._at])

    def readinto(self, buffer: Any) -> int:
        """As of any file; a large bytes object is filled by it, without a copy in between."""
        start = self._at
        nbytes = min(len(buffer), len(self._view) - start)
        buffer[:nbytes] = self._view[start : start + nbytes]
        self._at += nbytes
        return nbytes

    def readline(self) -> bytes:
        """As of any file; pickle reads lines in old protocols only."""
        rest = bytes(self._view[self._at :])
        return self.read(rest.find(b"\n") + 1 or len(rest))


class _Context(arrivals.Incoming):
    """What the markers in one stream stand for."""

    __slots__ = ("_rules", "found")

    def __init__(self, received: Received, rules: Definitions | Registry) -> None:
        super().__init__(received.blocks, received.fds)
        self._rules = rules
        self.found: list[str] = []  # what was imported, for the message of an error

    def marker(self, name: str) -> Any:
        """What a marker stands for."""
        if name == "definition":
            return self._rules.resolve
        return self._rules.inherited if name == "inherited" else getattr(self, name)

    def held_object(self, id: int) -> object:
        """An object that was put into the pool."""
        rules = self._rules
        assert isinstance(rules, Registry), "only a worker is sent such"
        return rules.keeper.get(id, lambda received: loads(received, rules))

    def received_descriptor(self, index: int) -> Descriptor:
        """A descriptor of this message, for whoever rebuilds an object on it."""
        return Descriptor(os.dup(self._fds[index]))


_MARKERS: dict[str, str] = {
    marker.__name__: marker.__module__
    for marker in (*arrivals.MARKERS.values(), definition, inherited, held_object, received_descriptor)
}
