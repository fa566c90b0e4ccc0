"""Two processes of a pool, played by two lease tables in one process."""

from __future__ import annotations

import os

from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.leases import Block, LeaseTable, Peer

__all__ = ["MIB", "Pair", "Process"]

MIB = 1 << 20


class Process:
    """A process of a pool: a table, and an arena of its own; ``other`` is the one process that it knows."""

    def __init__(self, ledger: Ledger, index: int) -> None:
        self.table = LeaseTable()
        self.arena = Arena.create(64 * MIB)
        self.allocator = Allocator(self.arena, ledger, index)
        self.table.add(self.arena, self.allocator)
        self.other = Peer("the other")
        self.mapped = [self.arena]

    def map(self, arena: Arena) -> None:
        self.mapped.append(Arena.attach(os.dup(arena.fd), arena.id))
        self.table.add(self.mapped[-1])

    def allocate(self, nbytes: int) -> Block:
        block = self.table.allocate(self.arena, nbytes)
        assert block is not None
        return block

    def close(self) -> None:
        for arena in self.mapped:
            arena.close()


class Pair:
    """Two processes that map each other's arenas; checked at the end of a ``with`` block."""

    def __init__(self) -> None:
        self.ledger = Ledger.create(3, 16 * MIB)
        self.a, self.b = Process(self.ledger, 0), Process(self.ledger, 1)
        self.a.map(self.b.arena)
        self.b.map(self.a.arena)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if exc_info[0] is None:
            self.check()
        self.close()

    def send(self, block: Block, sender: Process, receiver: Process) -> Block:
        sender.table.lend([block], sender.other)
        return receiver.table.receive(block.arena.id, block.offset, block.nbytes, receiver.other)

    def give_backs(self, sender: Process, receiver: Process) -> list[tuple[int, int, int]]:
        triples = sender.table.take_give_backs(sender.other)
        receiver.table.given_back(receiver.other, triples)
        return triples

    def check(self) -> None:
        self.a.table.check()
        self.b.table.check()

    def close(self) -> None:
        self.a.close()
        self.b.close()
        self.ledger.close()
