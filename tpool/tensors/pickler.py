"""Objects to payloads and back.

::

    obj ── dumps ──► _Pickler ─┬─ tensors ─────────────► reducers: blocks ───────────┐
                               ├─ functions, classes ──► Definitions, Registry: ids ─┤
                               ├─ buffers >= 4 KiB ────► blocks ─────────────────────┼──► Payload
                               └─ the rest ────────────► bytes, or a block ──────────┘

    Received ── loads ──► see unpickler ──► obj

Nothing is registered globally. Types that others registered with ``copyreg`` or ``multiprocessing`` are honoured; what
comes first: ours, cloudpickle's, multiprocessing's (torch's among them), copyreg's.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
import types
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

import torch

from tpool.tensors import descriptors, reducers, torch_private, unpickler
from tpool.tensors.bare import dumps_bare
from tpool.tensors.byvalue import DISPATCH, NAMED_TYPES
from tpool.tensors.cures import add_cure
from tpool.tensors.definitions import Definitions
from tpool.tensors.descriptors import carrying
from tpool.tensors.held import Reference, reduce_reference
from tpool.tensors.leases import Block, Memory
from tpool.tensors.names import MAIN
from tpool.tensors.payload import TRAILER, GroupId, HeldObject, Payload, Received
from tpool.tensors.plain import INLINE_NBYTES, dumps_plain, opcodes
from tpool.tensors.reducers_alike import as_alike
from tpool.tensors.registry import Registry, definition, inherited
from tpool.tensors.slabs import Place
from tpool.tensors.storages import Outgoing, Overlap, Sharing
from tpool.tensors.token import Token

__all__ = ["INLINE_NBYTES", "OUT_OF_BAND_NBYTES", "Codec", "Payload", "Received"]

OUT_OF_BAND_NBYTES = 4096
"""A shorter buffer (of a numpy array, say) stays in the stream: a block costs as much as copying this much twice."""

# Reducers by exact type that take the payload in the making.
_DISPATCH: dict[type, Callable[[Any, Any], Any]] = {**descriptors.DISPATCH, Reference: reduce_reference}

# What these define is not defined again while the program runs: that it can be imported is found out once.
_STABLE_PACKAGES = sys.stdlib_module_names | {"numpy", "torch", "tpool"}


class Codec:
    """Pickles and unpickles for one side of one pool; any thread may call.

    Args:
        memory: where blocks come from.
        definitions: in the pool's own process: what travels by value, and once. None in a worker, which keeps what
            it has received instead.
        baseline: in a worker forked from the caller: the ``baseline`` of the caller's Definitions, inherited.
        sharing: ``"share"``: a sent storage is moved into shared memory and both sides see it. ``"copy"``: it stays.
        can_swap: whether torch can move a storage in place; False forces what older torch needs.

    Attributes:
        keeper: in a worker: the objects that were put into the pool.
    """

    def __init__(
        self,
        memory: Memory,
        definitions: Definitions | None = None,
        *,
        baseline: dict[str, object] | None = None,
        sharing: Sharing = "share",
        can_swap: bool = torch_private.CAN_SWAP,
    ) -> None:
        self.memory = memory
        self.sharing = sharing
        self.can_swap = can_swap
        self.token = Token(memory)
        self._definitions = definitions
        self._registry = Registry(baseline)
        self.keeper = self._registry.keeper
        self._rules = definitions or self._registry
        # By id(): functions and classes of modules that nobody loads twice, found to be importable.
        self._by_name: dict[int, object] = {}
        self._dispatch: dict[type, Any] = {}
        self._dispatch_sizes = (-1, -1)

    def dumps(self, obj: object, *, spawning: bool = False, sharing: Sharing | None = None) -> Payload:
        """Pickle an object. For a plain one ``dumps_plain`` does the same faster, so it is worth a try before.

        Args:
            obj: which.
            spawning: whether it may hold what travels only "through inheritance": locks, queues, events.
            sharing: if not that of the pool.

        Raises:
            Exception: as the standard library's pickle would, with a note of the type that failed.
            TransportError: a tensor (or other object) that cannot travel.
            SharedMemoryExhausted: no memory for its bytes.
        """
        outgoing = self.new_outgoing(sharing or self.sharing)
        bare = dumps_bare(obj, outgoing) if self.can_swap else None
        if bare is not None:
            return bare
        if type(obj) is list:
            obj = as_alike(obj) or obj
        while True:
            try:
                return self._dump(obj, _Message(self, outgoing, self._rules, self._by_name), spawning)
            except Overlap:
                outgoing = outgoing.again()

    def dumps_call(self, function: object, args: tuple[Any, ...], kwds: dict[str, Any]) -> Payload | bytes:
        """Pickle a call as ``((args, kwds), function)``; a plain stream where pickle alone will do.

        Raises:
            Exception: see ``dumps``.
        """
        call = ((args, kwds), function)
        stream = dumps_plain(call)
        if stream is not None:
            return stream
        definitions = self._definitions
        if definitions is not None and type(function) is types.FunctionType:
            known = definitions.known(function)
            stream = None if known is None else dumps_plain(call[0])
            if known is not None and stream is not None:
                # As the pickler would, put together from what is known already: 5 us instead of 25.
                known.opcodes = known.opcodes or opcodes(known.reference)
                data = b"".join((stream[:-1], known.opcodes, pickle.TUPLE2, pickle.STOP, TRAILER.pack(0, 0)))
                return Payload(data, groups=definitions.closure({known.group}, self.open_group))
        return self.dumps(call)

    def _dump(self, obj: object, message: _Message, spawning: bool) -> Payload:
        pickler = self.new_pickler(message, _InheritingPickler if spawning else _Pickler)
        try:
            if spawning:
                with carrying(message):
                    pickler.dump(obj)
            else:
                pickler.dump(obj)
            if self._definitions is None or not message.needed:
                return message.payload()
            return message.payload(self._definitions.closure(message.needed, message.open_group))
        except BaseException as error:
            message.abandon()
            _note_type(error, pickler.last)
            add_cure(error)
            raise

    def loads(self, received: Received | bytes) -> object:
        """Unpickle what was received, once; or a plain stream.

        Raises:
            DecodeError: it cannot be unpickled; the cause is what was raised.
        """
        if type(received) is bytes:
            return unpickler.loads_plain(received)
        return unpickler.loads(received, self._rules)  # type: ignore[arg-type]

    def load_group(self, gid: GroupId, received: Received) -> None:
        """In a worker: define what a group holds, and bind its names in ``__main__``.

        Raises:
            DecodeError: something in it cannot be unpickled here; what came before it is defined.
        """
        unpickler.load_group(gid, received, self._registry)

    def new_pickler(self, message: _Message, kind: type[_Pickler]) -> _Pickler:
        """A pickler that writes into a message."""
        extra, general = ForkingPickler._extra_reducers, copyreg.dispatch_table  # type: ignore[attr-defined]
        sizes = (len(extra), len(general))
        if sizes != self._dispatch_sizes:  # something was registered (torch.multiprocessing imported, say)
            self._dispatch = {**general, **extra, **DISPATCH}
            self._dispatch_sizes = sizes
        pickler = kind(message.chunks, pickle.HIGHEST_PROTOCOL, buffer_callback=message.take_buffer)
        pickler.message = message
        pickler.dispatch_table = self._dispatch
        return pickler

    def open_group(self, rules: Any) -> _GroupPickler:
        """What ``Definitions`` write a new group with."""
        return _GroupPickler(self, _Message(self, self.new_outgoing(self.sharing, whole=True), rules, self._by_name))

    def new_outgoing(self, sharing: Sharing, *, whole: bool = False) -> Outgoing:
        """For the storages of one message; ``whole``: none is sent in part."""
        kind = WholeStorages if whole else Outgoing
        return kind(self.memory, sharing, can_swap=self.can_swap, token=self.token)


def _note_type(error: BaseException, obj: object) -> None:
    """Tell which object's own reducer raised, where neither Python nor the error does."""
    cls = type(obj)
    if obj is not None and cls.__name__ not in str(error) and hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"raised while pickling an object of type {cls.__module__}.{cls.__qualname__}")


class _Chunks(list[Any]):
    """A file for a pickler: what it writes is kept, not copied."""

    __slots__ = ()

    write = list.append


class _Message:
    """A payload in the making. It knows nothing of its pickler, so that no cycle outlives either.

    Attributes:
        outgoing: storages and descriptors.
        rules: what tells how functions and classes travel: Definitions, Registry or a GroupWriter.
        by_name: see ``Codec``.
        buffers: blocks of out-of-band buffers, in order.
        copies: see ``byvalue.reduce_here``.
        needed: groups that definitions in this payload come from.
        held: objects that were put into the pool, and are named in this payload.
        marked: whether the stream names something that only its receiver can resolve.
    """

    __slots__ = (
        "buffers",
        "by_name",
        "chunks",
        "copies",
        "held",
        "marked",
        "needed",
        "open_group",
        "outgoing",
        "rules",
    )

    def __init__(self, codec: Codec, outgoing: Outgoing, rules: Any, by_name: dict[int, object]) -> None:
        self.open_group = codec.open_group
        self.outgoing = outgoing
        self.rules = rules
        self.by_name = by_name
        self.chunks = _Chunks()
        self.buffers: list[Block] = []
        self.copies: dict[int, dict[str, Any]] = {}
        self.needed: set[GroupId] = set()
        self.held: list[HeldObject] = []
        self.marked = False

    def add_fd(self, fd: int, keep: object) -> int:
        """Index of a descriptor that travels; ``keep`` owns it."""
        return self.outgoing.add_fd(fd, keep)

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        """Copy a buffer into a block; True (it stays in the stream) if it is small."""
        with buffer.raw() as raw:
            if raw.nbytes < OUT_OF_BAND_NBYTES:
                return True
            self.buffers.append(self.outgoing.place_buffer(raw))
        return False

    def payload(self, groups: tuple[GroupId, ...] = ()) -> Payload:
        """The finished payload."""
        outgoing = self.outgoing
        blocks = outgoing.blocks + self.buffers
        if blocks or outgoing.fds or self.marked:
            self.chunks.append(TRAILER.pack(len(outgoing.blocks), 0))
        return Payload(self._stream(), blocks, outgoing.fds, groups, outgoing.keep, self.held)

    def _stream(self) -> bytes | Block:
        chunks = self.chunks
        if len(chunks) == 1 and len(chunks[0]) <= INLINE_NBYTES:
            return cast("bytes", chunks[0])
        nbytes = sum(map(len, chunks))
        if nbytes <= INLINE_NBYTES:
            return b"".join(chunks)
        block = self.outgoing.memory.allocate(nbytes)
        start = 0
        for chunk in chunks:
            end = start + len(chunk)
            block.view[start:end] = chunk
            start = end
        return block

    def abandon(self) -> None:
        """Let go of the blocks now; the traceback of an error would keep them."""
        self.outgoing.blocks.clear()
        self.outgoing.keep.clear()
        self.buffers.clear()
        self.chunks.clear()


class _Pickler(pickle.Pickler):
    """One stream. ``reducer_override`` is called for every object but the simplest built-in ones, so it is short."""

    message: _Message  # set by new_pickler(); an __init__ in Python would cost half a microsecond
    last: object = None  # what was being reduced, for the note on an error

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        if cls is types.FunctionType or issubclass(cls, type):
            return NotImplemented if id(obj) in self.message.by_name else self._refer(obj, None)
        reduced = reducers.reduce(obj, self.message.outgoing)
        if reduced is not NotImplemented:
            return reduced
        self.last = obj
        if cls in NAMED_TYPES:
            return self._refer(obj, None)
        if cls in _DISPATCH:
            return _DISPATCH[cls](obj, self.message)
        if cls.__module__ in MAIN and cls not in self.dispatch_table and _reduces_itself(cls):
            reduced = obj.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
            return self._refer(obj, reduced) if isinstance(reduced, str) else reduced
        return NotImplemented

    def _refer(self, obj: Any, name: str | None) -> Any:
        message = self.message
        reduced = message.rules.reduce(obj, name, message)
        if reduced is NotImplemented:
            if str(obj.__module__).partition(".")[0] in _STABLE_PACKAGES:
                message.by_name[id(obj)] = obj
        elif reduced[0] is definition or reduced[0] is inherited:
            message.marked = True
        return reduced


def _reduces_itself(cls: Any) -> bool:
    return bool(cls.__reduce__ is not object.__reduce__ or cls.__reduce_ex__ is not object.__reduce_ex__)


class _InheritingPickler(_Pickler):
    """For what travels as if it were inherited: initializer arguments and globals."""

    def reducer_override(self, obj: Any) -> Any:
        descriptors.refuse_forked_lock(obj)
        return super().reducer_override(obj)


class _GroupPickler:
    """Writes a group for ``Definitions``: many units, one memo."""

    def __init__(self, codec: Codec, message: _Message) -> None:
        self._message = message
        self._message.marked = True  # not for pickle.loads: there are many units in the stream
        self._pickler = codec.new_pickler(message, _InheritingPickler)
        self._undone: list[object] = []
        self._finished = False
        self.copies = message.copies

    def write(self, kind: str, key: object, body: list[Any]) -> Any:
        """Pickle one unit; gives the mark that ``undo`` needs. If it raises, nothing was written."""
        message, header = self._message, [kind, key]
        mark = (header, len(message.chunks), len(message.buffers))
        try:
            with carrying(message):
                self._pickler.dump(header)
                self._pickler.dump(body)
        except BaseException:
            self.undo(mark)
            raise
        return mark

    def undo(self, mark: Any) -> None:
        """Forget the unit written last, and all that the memo has of it.

        Its storages keep their places among the blocks: they have been moved, and will be needed again. Its objects
        live on, for storages are told apart by their addresses.
        """
        header, chunks, buffers = mark
        del self._message.chunks[chunks:]
        del self._message.buffers[buffers:]
        memo = self._pickler.memo.copy()
        if id(header) not in memo:
            return  # it was interrupted before anything was written
        first = memo[id(header)][0]  # a list is memoized before what is in it, so this was the unit's first
        self._undone.extend(entry for entry in memo.values() if entry[0] >= first)
        self._pickler.memo = {key: entry for key, entry in memo.items() if entry[0] < first}

    def finish(self) -> Payload | None:
        """All units; None if there are none."""
        payload = self._message.payload() if self._message.chunks else None
        self._finished = True
        return payload

    def close(self) -> None:
        """Let go of everything but the finished payload; also of the cycle of this, its pickler and their user."""
        if not self._finished:
            self._message.abandon()
        self._pickler.clear_memo()
        del self._pickler


class WholeStorages(Outgoing):
    """Never sends a part of a storage, so that what was written need never be written again."""

    def place_region(self, storage: torch.UntypedStorage, start: int, stop: int) -> tuple[Place, int] | None:
        """The whole storage."""
        place = self.place(storage)
        return None if place is None else (place, 0)
