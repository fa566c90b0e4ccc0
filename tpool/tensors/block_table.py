"""The blocks of shared memory that live in this process: the arenas it has mapped, and one entry per live block.

Views die in any thread, inside any collection, even inside our own critical sections. So a dying view only appends to
a deque, by a C method; whoever calls next drains it. There is one re-entrant lock, held for short steps in which
nothing is allocated that could start a collection. User code may nevertheless come back here in the same thread (a
collection, a signal handler); each change of a shared variable is therefore one step without a call inside.
"""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable

from tpool.errors import PoolEndedError, ProtocolError
from tpool.tensors.arena import Allocator, Arena
from tpool.tensors.entries import Block, Entry, Mapped, Peer, Watch, drop
from tpool.tensors.forks import ForkPipes
from tpool.tensors.memfd import Guard, view_of

__all__ = ["BlockTable"]


# So many large storages may be moved at once, by as many threads. That two which want to meet at one lock, and one of
# them waits for the other's copy, has a chance of one in this many.
_MOVING_LOCKS = 64


class _Making:
    """Counts the blocks that were handed out and are not entries yet; a forked child has one of its own."""

    __slots__ = ("blocks",)

    def __init__(self) -> None:
        self.blocks = 0


class BlockTable:
    """Arenas, the blocks in them that live here, and the forked children that may read them.

    Any thread may call any method. An entry goes when its views are dead, nothing is lent (that is counted by
    ``LeaseTable``) and no child may read it.

    Attributes:
        moving: one of these is taken by whoever moves or copies a large storage; see ``moving.py``.
        moving_small: taken by whoever moves a small storage; reentrant, as a signal handler may send one too.
        span: all blocks lie between these two addresses, as does memory that is not ours.
    """

    def __init__(self) -> None:
        self._pipes = ForkPipes()
        self._reset()

    def _reset(self) -> None:
        # First, in a forked child: what a collection runs in between must get no block of the parent's.
        self._mapped: dict[int, Mapped] = {}  # by arena id
        self._lock = threading.RLock()
        self._dead: deque[Watch] = deque()
        self._entries: dict[int, Entry] = {}  # by address
        self._slabs: list[int] = []  # addresses, sorted
        self.span = (0, 0)
        self._peers: set[Peer] = set()  # who ever held a lease and was not forgotten; for check
        self._held_by_fork: dict[int, list[Entry]] = {}
        self._making = _Making()
        self._unsettled: dict[Entry, None] = {}  # of peers: no entries any more, and not to be told of yet
        self.moving_small = threading.RLock()
        self.moving = tuple(threading.RLock() for _ in range(_MOVING_LOCKS))

    # Arenas --------------------------------------------------------------------------------------------------------

    def add(self, arena: Arena, allocator: Allocator | None = None) -> None:
        """Know this arena from now on; adding it again changes nothing.

        Args:
            arena: taken over; closed after ``remove``.
            allocator: given if this process hands out the arena's memory.

        Raises:
            ProtocolError: another arena has the same id.
        """
        mapped = Mapped(arena, allocator)
        with self._lock:
            if self._mapped.setdefault(arena.id, mapped).arena is not arena:
                raise ProtocolError(f"there are two arenas with the id {arena.id:016x}")
            self._measure()

    def _measure(self) -> None:
        arenas: list[Arena] | None = None
        # Again, if user code was called in between, by a signal or a collection, and made a pool or ended one.
        while arenas != (arenas := [mapped.arena for mapped in list(self._mapped.values())]):
            addresses = [arena.address for arena in arenas] + [arena.address + arena.nbytes for arena in arenas]
            self.span = (min(addresses), max(addresses)) if addresses else (0, 0)

    def remove(self, arena: Arena) -> None:
        """The arena's pool has ended: it is closed once no block of it lives here, and nobody is told any more."""
        with self._lock:
            self._drain()
            mapped = self._mapped.get(arena.id)
            if mapped is not None and mapped.arena is arena:
                mapped.removed = True
                for entry in list(self._entries.values()):
                    if entry.mapped is mapped:
                        self._watch_closely(entry)
                self._close_if_empty(mapped)

    def _watch_closely(self, entry: Entry) -> None:
        """Notice the death of this block's views at once: with its pool ended, nobody may ever call us again."""
        guard = None if entry.watch is None else entry.watch()
        if guard is not None:
            entry.watch = self._watch_guard(guard, entry.address, at_once=True)

    def arena(self, id: int) -> Arena | None:
        """The arena of that id, if this process has mapped it."""
        mapped = self._mapped.get(id)
        return None if mapped is None else mapped.arena

    def _close_if_empty(self, mapped: Mapped) -> None:
        if not mapped.entries:
            mapped.arena.close()  # first: an interrupt would leave nobody who knows it
            self._mapped.pop(mapped.arena.id, None)
            self._measure()

    # Blocks --------------------------------------------------------------------------------------------------------

    def allocate(self, arena: Arena, nbytes: int, *, beyond_budget: bool = False) -> Block | None:
        """A new block, warm if possible; its bytes are whatever was there before.

        Args:
            arena: one of ours.
            nbytes: at least 1.
            beyond_budget: have it even if the budget is spent.

        Returns:
            None while the budget is spent or the arena full; see ``leases.Memory`` for waiting.

        Raises:
            PoolEndedError: the arena was removed, or belongs to the process that forked us.
        """
        making: _Making | None = None
        try:
            with self._lock:
                if self._dead:
                    self._drain()
                mapped, allocator = self._owned(arena)
                making = self._making
                making.blocks += 1
                offset = allocator.allocate(nbytes)
                if offset is None and self._end_holds():
                    offset = allocator.allocate(nbytes)
                if offset is None and beyond_budget:
                    offset = allocator.allocate(nbytes, beyond_budget=True)
            return None if offset is None else self._enter(mapped, offset, nbytes)
        finally:
            if making is not None:
                making.blocks -= 1

    def allocate_young(self, arena: Arena, nbytes: int, count: int) -> list[Block]:
        """As many new blocks of one size as were freed lately, ``count`` at most; see ``allocate``.

        Together they cost less: 20 KB arguments took 0.95 of the time, 60 KB 0.92, 150 KB 0.98.
        """
        making: _Making | None = None
        blocks: list[Block] = []
        offsets: list[int] = []
        try:
            with self._lock:
                if self._dead:
                    self._drain()
                mapped, allocator = self._owned(arena)
                making = self._making
                making.blocks += 1
                offsets = allocator.allocate_young(nbytes, count)
            while offsets:
                blocks.append(self._enter(mapped, offsets.pop(), nbytes))
        finally:
            try:
                if offsets:  # interrupted
                    with self._lock:
                        while offsets:
                            allocator.free(offsets.pop())
                        if mapped.removed:
                            self._close_if_empty(mapped)
            finally:
                if making is not None:
                    making.blocks -= 1
        return blocks

    def _owned(self, arena: Arena) -> tuple[Mapped, Allocator]:
        mapped = self._mapped.get(arena.id)
        allocator = None if mapped is None or mapped.removed else mapped.allocator
        if mapped is None or allocator is None:
            raise PoolEndedError("the pool was closed, or belongs to the process that forked this one")
        return mapped, allocator

    def _enter(self, mapped: Mapped, offset: int, nbytes: int) -> Block:
        guard, watch = self._watch(mapped, offset)
        self._entries[watch.address] = Entry(mapped, offset, nbytes, watch, None)
        return Block(mapped.arena, offset, nbytes, view_of(guard, nbytes))

    def _watch(self, mapped: Mapped, offset: int) -> tuple[Guard, Watch]:
        arena = mapped.arena
        try:
            guard = arena.guard(offset)
        except ValueError as error:
            raise PoolEndedError("the pool was closed meanwhile") from error
        return guard, self._watch_guard(guard, arena.address + offset, at_once=mapped.removed)

    def _watch_guard(self, guard: Guard, address: int, *, at_once: bool) -> Watch:
        watch = Watch(guard, self._notice if at_once else self._dead.append)
        watch.address = address
        return watch

    def _notice(self, watch: Watch) -> None:
        """A view died whose pool has ended.

        In any thread, inside any collection: it must not wait for the lock. Whoever has that drains on leaving, if
        they came here; another pool's thread drains before it goes idle.
        """
        self._dead.append(watch)
        lock = self._lock
        while self._dead and lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                lock.release()

    def watch(self, arena_id: int, offset: int, call: Callable[[], object]) -> weakref.ref[object] | None:
        """A reference that is dead as soon as no view of this block lives here; None if none does.

        Args:
            arena_id: of the arena.
            offset: where the block begins.
            call: called at that moment, in any thread, inside any collection.
        """
        mapped = self._mapped.get(arena_id)
        entry = None if mapped is None else self._entries.get(mapped.arena.address + offset)
        watch = None if entry is None else entry.watch
        guard = None if watch is None else watch()
        return None if guard is None else weakref.ref(guard, lambda _: call())

    def locate(self, address: int, nbytes: int) -> tuple[Block, int] | None:
        """The live block of exactly these bytes, in any arena, or the slab in which they lie; and where they begin.

        None if there is none or its views are dead.
        """
        entry = self._entries.get(address)
        if entry is None and self._slabs:
            entry = self._slab_around(address)
        if entry is None:
            return None
        start = address - entry.address
        if not (start + nbytes <= entry.nbytes if entry.slab else entry.nbytes == nbytes):
            return None
        block = _block_of(entry)
        return None if block is None else (block, start)

    def _slab_around(self, address: int) -> Entry | None:
        slabs = self._slabs
        index = bisect_right(slabs, address)
        below = slabs[index - 1 : index]  # none if there is none, or it has just gone
        return self._entries.get(below[0]) if below else None

    def note_slab(self, block: Block) -> None:
        """Several storages share this block: from now on ``locate`` looks inside it."""
        address = block.arena.address + block.offset
        entry = self._entries.get(address)
        if entry is not None and not entry.slab:
            with self._lock:
                if self._entries.get(address) is entry and not entry.slab:
                    entry.slab = True
                    insort(self._slabs, address)

    def _settle(self, entry: Entry) -> None:
        """Let the entry go if nothing needs it any more."""
        if entry.watch is not None or entry.lent or entry.holds:
            return
        mapped, address, entries = entry.mapped, entry.address, self._entries
        if mapped.allocator is None:
            self._unsettled[entry] = None  # until its peer is to be told; see housekeeping.py
        # Looked at again: the property may have run a collection. From here to the deletion there is no call, nor a
        # jump, where CPython 3.10 looks for signals.
        if entry.watch is None and not entry.lent and address in entries and entries[address] is entry:
            del entries[address]
        else:
            self._unsettled.pop(entry, None)
            return
        if entry.slab:
            drop(self._slabs, address)
        # Only now, when nobody can find the entry any more, may its memory be used again.
        if mapped.allocator is not None:
            mapped.allocator.free(entry.offset)
        else:
            drop(mapped.offsets, entry.offset)
            if entry.anchor is not None and not mapped.removed:
                entry.anchor.owe(entry, last=True)
            self._unsettled.pop(entry, None)
        if mapped.removed:
            self._close_if_empty(mapped)

    def _drain(self) -> None:
        """Notice the views that died."""
        dead, entries = self._dead, self._entries
        while dead:
            try:
                watch = dead.popleft()
            except IndexError:  # a signal handler was faster
                return
            entry = entries.get(watch.address)
            if entry is not None and entry.watch is watch:  # otherwise the block got a new view since
                entry.watch = None
                self._settle(entry)

    # What others ask -----------------------------------------------------------------------------------------------

    @property
    def may_collect(self) -> bool:
        """Whether ``collect`` may find something: views have died, or a forked child may have ended. Takes no lock."""
        return bool(self._dead or self._held_by_fork)

    @property
    def busy_here(self) -> bool:
        """Whether this very thread holds the table's lock: this is a signal handler or finalizer, in its midst."""
        return self._lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    @property
    def has_blocks(self) -> bool:
        """Whether a block lives here, or did when somebody last looked. Takes no lock."""
        return bool(self._entries)

    def allocator(self, arena: Arena) -> Allocator | None:
        """Who hands out this arena's memory, if we own it; for figures, not for use."""
        mapped = self._mapped.get(arena.id)
        return None if mapped is None else mapped.allocator

    # Forks ---------------------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Fork hook: bring the table into a state that both sides can go on from."""
        self._lock.acquire()
        self._drain()
        if self._entries:
            self._pipes.before()

    def after_fork_in_parent(self) -> None:
        """Fork hook: whatever the child can read is held for it."""
        try:
            child = self._pipes.in_parent()
            if child is not None:
                entries = [entry for entry in self._entries.values() if entry.watch is not None]
                for entry in entries:
                    entry.holds += 1
                self._held_by_fork.setdefault(child, []).extend(entries)
        finally:
            self._lock.release()

    def after_fork_in_child(self) -> None:
        """Fork hook: start anew, with no arena; what we inherited stays readable, and is the parent's to free."""
        self._pipes.in_child()
        inherited = list(self._mapped.values())
        self._reset()
        for mapped in inherited:
            mapped.arena.close()

    def _end_holds(self) -> bool:
        """End the holds of children that are gone; True if there were any."""
        if not self._held_by_fork:
            return False
        self._pipes.take_ended()
        ended = [child for child in list(self._held_by_fork) if child not in self._pipes.living]
        for child in ended:
            entries = self._held_by_fork.get(child, [])
            while entries:
                entries[-1].holds -= 1  # and no call before it is taken out: an interrupt leaves the rest to the next
                self._settle(entries.pop())
            self._held_by_fork.pop(child, None)
        return bool(ended)


def _block_of(entry: Entry) -> Block | None:
    watch = entry.watch
    guard = None if watch is None else watch()
    if guard is None:
        return None
    nbytes = entry.nbytes
    return Block(entry.mapped.arena, entry.offset, nbytes, view_of(guard, nbytes))
