"""A pool's processes, played by lease tables in one process, do anything in any order; no byte is ever lost or shared.

A star: the parent and three slots whose workers are killed and replaced. Each process has a table of its own and maps
the same memfds by descriptors of its own; channels are deques, so frames arrive in order but late, or never.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.leases import Block, LeaseTable, Peer

ARENA_NBYTES = 1 << 19
BUDGET_NBYTES = 1 << 18
SLOTS = 3

# Around the edges of classes and pages, and large enough that the budget is spent now and then.
SIZES = st.sampled_from([1, 64, 65, 200, 576, 577, 2048, 4000, 4096, 4097, 8192, 12_000, 40_000, 100_000])


def pattern(stamp: int, nbytes: int) -> bytes:
    return (stamp.to_bytes(8, "little") * (nbytes // 8 + 1))[:nbytes]


class Process:
    """One process of the pool: a table, mappings of its own, and what its program keeps."""

    def __init__(self, fds: dict[int, int], owned: int, ledger: Ledger, index: int) -> None:
        self.table = LeaseTable()
        self.arenas = {id: Arena.attach(os.dup(fd), id) for id, fd in fds.items()}
        self.arena = self.arenas[owned]
        self.allocator = Allocator(self.arena, ledger, index)
        for id, arena in self.arenas.items():
            self.table.add(arena, self.allocator if id == owned else None)
        self.peers: dict[int, Peer] = {}
        self.kept: list[tuple[Block, int]] = []
        self.children: list[tuple[int, list[tuple[memoryview, int]]]] = []

    def verify(self) -> None:
        for block, stamp in self.kept:
            assert bytes(block.view) == pattern(stamp, block.nbytes), f"{block} was changed under a live view"
            start = block.nbytes // 2
            located = self.table.locate(block.arena.address + block.offset + start, block.nbytes - start)
            if located is not None:
                assert (located[0].offset, located[1]) == (block.offset, start)
        for _, inherited in self.children:
            for view, stamp in inherited:
                assert bytes(view) == pattern(stamp, view.nbytes), "memory was changed under a forked child"

    def fork(self) -> None:
        self.table.before_fork()
        pipe = self.table._pipes._next
        # The child's copy of the write end: what keeps it alive here.
        child = None if pipe is None else os.dup(pipe[1])
        self.table.after_fork_in_parent()
        if child is not None:
            inherited = [(block.arena.view(block.offset, block.nbytes), stamp) for block, stamp in self.kept]
            self.children.append((child, inherited))

    def end_child(self, index: int) -> None:
        os.close(self.children.pop(index)[0])

    def die(self) -> None:
        self.kept.clear()
        while self.children:
            self.end_child(0)
        for fd in self.table._pipes.living:
            os.close(fd)
        for arena in self.arenas.values():
            arena.close()


class Pool(RuleBasedStateMachine):
    """Party -1 is the parent, 0 to 2 are the slots' workers; (a, b) is the channel from a to b."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger.create(SLOTS + 1, BUDGET_NBYTES)
        arenas = [Arena.create(ARENA_NBYTES) for _ in range(SLOTS + 1)]
        self.ids = [arena.id for arena in arenas]  # of the slots, then the parent's: index -1
        self.fds = {arena.id: os.dup(arena.fd) for arena in arenas}
        for arena in arenas:
            arena.close()
        self.stamps = 0
        self.parties: dict[int, Process] = {-1: Process(self.fds, self.ids[-1], self.ledger, SLOTS)}
        self.parties[-1].peers = {slot: Peer(f"slot {slot}") for slot in range(SLOTS)}
        self.channels: dict[tuple[int, int], deque[tuple[str, Any]]] = {}
        self.checking = True
        for slot in range(SLOTS):
            self.respawn(slot)
            self.deliver((-1, slot))

    @initialize(checking=st.booleans())
    def choose(self, checking: bool) -> None:
        # check() drains: without it more dead views wait for the next call.
        self.checking = checking

    # What programs do ----------------------------------------------------------------------------------------------

    def party(self, data: st.DataObject) -> tuple[int, Process]:
        name = data.draw(st.sampled_from(sorted(self.parties)))
        return name, self.parties[name]

    @rule(data=st.data(), nbytes=SIZES)
    def allocate(self, data: st.DataObject, nbytes: int) -> None:
        _, process = self.party(data)
        self.new_block(process, nbytes)

    @rule(data=st.data(), nbytes=SIZES, freed=st.integers(0, 4), count=st.integers(1, 5))
    def allocate_young(self, data: st.DataObject, nbytes: int, freed: int, count: int) -> None:
        _, process = self.party(data)
        made = sum([self.new_block(process, nbytes) for _ in range(freed)])
        del process.kept[len(process.kept) - made :]
        blocks = process.table.allocate_young(process.arena, nbytes, count)
        assert len(blocks) <= count
        for block in blocks:
            self.keep(process, block)

    def new_block(self, process: Process, nbytes: int) -> bool:
        block = process.table.allocate(process.arena, nbytes)
        if block is None:
            return False
        self.keep(process, block)
        return True

    def keep(self, process: Process, block: Block) -> None:
        nbytes = block.nbytes
        self.stamps += 1
        block.view[:] = pattern(self.stamps, nbytes)
        if self.stamps % 2:
            process.table.note_slab(block)
        process.kept.append((block, self.stamps))

    @rule(data=st.data(), nbytes=SIZES, hops=st.integers(1, 5), keep=st.integers(0, 31))
    def pass_on(self, data: st.DataObject, nbytes: int, hops: int, keep: int) -> None:
        """A new block travels through several processes; bit by bit ``keep`` tells which of them keep it."""
        name, process = self.party(data)
        if not self.new_block(process, nbytes):
            return
        for hop in range(hops):
            to = data.draw(st.sampled_from(sorted(process.peers)))
            if (name, to) not in self.channels:
                return
            self.put(name, to, process.kept[-1], 1)
            if not keep >> hop & 1:
                process.kept.pop()
            while self.channels[name, to]:
                self.deliver((name, to))
            name, process = to, self.parties[to]

    @rule(data=st.data(), times=st.integers(1, 2))
    def send(self, data: st.DataObject, times: int) -> None:
        name, process = self.party(data)
        to = data.draw(st.sampled_from(sorted(process.peers)))
        if not process.kept or (name, to) not in self.channels:
            return
        # By index: what is drawn itself is kept alive for the report.
        kept = process.kept[data.draw(st.integers(0, len(process.kept) - 1))]
        self.put(name, to, kept, times)

    def put(self, name: int, to: int, kept: tuple[Block, int], times: int) -> None:
        process, (block, stamp) = self.parties[name], kept
        located = process.table.locate(block.arena.address + block.offset, block.nbytes)
        assert located is not None
        found, _ = located
        assert (found.arena, found.offset, found.nbytes) == (block.arena, block.offset, block.nbytes)
        process.table.lend([found] * times, process.peers[to])
        handle = (block.arena.id, block.offset, block.nbytes)
        self.channels[name, to].append(("payload", [(handle, stamp)] * times))

    @rule(data=st.data(), derived=st.booleans())
    def drop(self, data: st.DataObject, derived: bool) -> None:
        _, process = self.party(data)
        if process.kept:
            block, stamp = process.kept.pop(data.draw(st.integers(0, len(process.kept) - 1)))
            if derived:  # only something made from the view lives on
                process.kept.append((Block(block.arena, block.offset, block.nbytes, block.view.toreadonly()), stamp))

    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        name, process = self.party(data)
        self.flush(name, data.draw(st.sampled_from(sorted(process.peers))))

    def flush(self, name: int, to: int) -> None:
        process = self.parties[name]
        if (name, to) in self.channels:
            nbytes = process.table.pending_nbytes(process.peers[to])
            triples = process.table.take_give_backs(process.peers[to])
            assert bool(nbytes) == bool(triples)
            if triples:
                self.channels[name, to].append(("gave back", triples))

    @precondition(lambda self: any(self.channels.values()))
    @rule(data=st.data(), count=st.integers(1, 5))
    def deliver_some(self, data: st.DataObject, count: int) -> None:
        channel = data.draw(st.sampled_from([name for name, frames in sorted(self.channels.items()) if frames]))
        for _ in range(min(count, len(self.channels[channel]))):
            self.deliver(channel)

    def deliver(self, channel: tuple[int, int]) -> None:
        kind, content = self.channels[channel].popleft()
        sender, receiver = channel
        if kind == "hello":
            process = Process(self.fds, self.ids[receiver], self.ledger, receiver)
            process.peers = {-1: Peer("parent")}
            process.table.reinstate(process.arena, content, process.peers[-1])
            self.parties[receiver] = process
            return
        process = self.parties[receiver]
        peer = process.peers[sender]
        if kind == "payload":
            for handle, stamp in content:
                process.kept.append((process.table.receive(*handle, peer), stamp))
        else:
            process.table.given_back(peer, content)

    # What else happens ---------------------------------------------------------------------------------------------

    @rule(data=st.data(), read=st.integers(0, 10))
    def kill(self, data: st.DataObject, read: int) -> None:
        """The worker dies; the parent reads some of what it had written, then believes it."""
        slot = data.draw(st.integers(0, SLOTS - 1))
        if slot in self.parties:
            self.parties.pop(slot).die()
            while self.channels[slot, -1] and read:
                self.deliver((slot, -1))
                read -= 1
            del self.channels[slot, -1], self.channels[-1, slot]
            parent = self.parties[-1]
            parent.table.forget(parent.peers[slot])

    @rule(slot=st.integers(0, SLOTS - 1))
    def respawn(self, slot: int) -> None:
        if (slot, -1) not in self.channels:
            parent = self.parties[-1]
            blocks = parent.table.live_blocks(parent.peers[slot], parent.arenas[self.ids[slot]])
            self.channels[slot, -1] = deque()
            self.channels[-1, slot] = deque([("hello", blocks)])

    @rule(data=st.data(), aged_only=st.booleans())
    def trim(self, data: st.DataObject, aged_only: bool) -> None:
        self.party(data)[1].table.trim(aged_only=aged_only)

    @rule(data=st.data())
    def collect(self, data: st.DataObject) -> None:
        self.party(data)[1].table.collect()

    @rule(data=st.data(), waiting=st.booleans())
    def wait_for_memory(self, data: st.DataObject, waiting: bool) -> None:
        allocator = self.party(data)[1].allocator
        self.ledger.set_waiting(allocator.index, waiting)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        process = self.party(data)[1]
        if len(process.children) < 3:
            process.fork()

    @rule(data=st.data())
    def end_child(self, data: st.DataObject) -> None:
        process = self.party(data)[1]
        if process.children:
            process.end_child(data.draw(st.integers(0, len(process.children) - 1)))

    # What must be true ---------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_changed_under_a_view(self) -> None:
        for process in self.parties.values():
            process.verify()
            if self.checking:
                process.table.check()
        assert self.ledger.committed_nbytes() <= BUDGET_NBYTES

    def teardown(self) -> None:
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self.close)
            self.come_to_rest()
            for name, process in self.parties.items():
                process.table.check()
                assert not process.table._entries, f"{name} keeps blocks that nobody uses"
                assert process.allocator.used_nbytes == 0
                process.table.trim()
                assert process.allocator.committed_nbytes == 0
                assert process.allocator.blocks_in_use == 0
            for process in self.parties.values():
                assert process.table.allocate(process.arena, BUDGET_NBYTES) is not None, "memory is in pieces"
                process.table.trim()

    def come_to_rest(self) -> None:
        for slot in range(SLOTS):
            self.respawn(slot)
        for _ in range(20):
            while any(self.channels.values()):
                self.deliver(next(name for name, frames in self.channels.items() if frames))
            for name, process in self.parties.items():
                process.kept.clear()
                while process.children:
                    process.end_child(0)
                process.table.collect()
                for to in process.peers:
                    self.flush(name, to)
            if not any(self.channels.values()):
                return
        raise AssertionError("give-backs go round for ever")

    def close(self) -> None:
        for process in self.parties.values():
            process.die()
        for fd in self.fds.values():
            os.close(fd)
        self.ledger.close()


Pool.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
TestPool = Pool.TestCase
