"""Each hot step by itself, with its budget: ``python -m benchmarks.micro_steps``.

Processor time of the calling thread, the best of several runs, in microseconds per tensor, block or task. A budget is
about one and a half times what a quiet machine of two AMD EPYC cores needs; the exit status says whether all held.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.micro_scheduler import Simulation
from tpool.local import wire
from tpool.tensors import leases, moving, reducers
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.payload import Payload, Received
from tpool.tensors.pickler import Codec
from tpool.tensors.plain import dumps_plain
from tpool.tensors.slabs import Slabs
from tpool.tensors.storages import Outgoing

COUNT = 500
ROUNDS = 30


@dataclass(frozen=True)
class Step:
    """A step: what is prepared, what is timed, and how long it may take.

    Attributes:
        budget: microseconds for each of ``COUNT``.
    """

    name: str
    budget: float
    prepare: Callable[[], Any]
    play: Callable[[Any], Any]

    def measure(self) -> float:
        """Microseconds for each of ``COUNT``."""
        best = float("inf")
        for _ in range(ROUNDS):
            prepared = self.prepare()
            gc.disable()  # a collection costs what the program's objects cost, not the step
            start = time.thread_time()
            made = self.play(prepared)
            best = min(best, time.thread_time() - start)
            gc.enable()
            del prepared, made
            leases.table().collect()
        return best / COUNT * 1e6


class Bench:
    """A sender and, as another lease table in this process, its receiver."""

    def __init__(self) -> None:
        self.ledger = Ledger.create(2, 8 << 30)
        self.arena = Arena.create(8 << 30)
        self.table = leases.table()
        self.table.add(self.arena, Allocator(self.arena, self.ledger, 0))
        self.memory = leases.Memory(self.arena, lambda seconds: False)
        self.codec = Codec(self.memory, None)
        self.far = leases.LeaseTable()
        self.mapped = Arena.attach(os.dup(self.arena.fd), self.arena.id)
        self.far.add(self.mapped)
        self.here, self.there = leases.Peer("here"), leases.Peer("there")

    def close(self) -> None:
        """Let go of the memory."""
        for table, arena in ((self.far, self.mapped), (self.table, self.arena)):
            table.collect()
            table.remove(arena)
        self.ledger.close()

    def steps(self) -> Iterator[Step]:
        """All steps, from a tensor to its receiver, then of tasks without tensors."""
        yield Step("allocate a block of 4 KB and let it go", 5.0, tuple, self.allocate)
        yield Step("the same, never touched before, and touch it", 14.0, self.untouched, self.touch)
        yield Step("find the block of an address", 1.5, self.blocks, self.find)
        yield Step("the hooks of a fork, for each live block", 0.3, self.blocks, self.fork)
        yield Step("claim 4 KB of a slab", 1.2, tuple, self.claim)
        yield Step("move a 4 KB storage into a slab", 9.0, self.fresh, self.move)
        yield Step("reduce a fresh 4 KB tensor", 15.0, self.fresh, self.reduce)
        yield Step("reduce it again", 7.5, self.sent, self.reduce)
        yield Step("pickle it among many, fresh", 17.0, self.fresh, self.codec.dumps)
        yield Step("rebuild it among many", 3.0, self.received, self.codec.loads)
        yield Step("lend a block, receive it, give it back", 9.0, self.blocks, self.round_trip)
        yield Step("write and read a frame of plain tasks", 0.3, self.plain_tasks, self.frames)
        yield Step("pickle and unpickle a plain argument", 2.0, lambda: range(COUNT), self.plain)
        yield Step("schedule a task of microseconds", 1.5, lambda: Simulation(2, 1e-6, None), self.schedule)

    def fresh(self) -> list[torch.Tensor]:
        return [torch.ones(1024) for _ in range(COUNT)]

    def sent(self) -> list[torch.Tensor]:
        tensors = self.fresh()
        self.codec.dumps(tensors)
        return tensors

    def received(self) -> Received:
        payload: Payload = self.codec.dumps(self.fresh())
        return Received(payload.data, list(payload.blocks), [])

    def blocks(self) -> list[leases.Block]:
        return [self.memory.allocate(4096) for _ in range(COUNT)]

    def plain_tasks(self) -> list[tuple[int, int, bytes]]:
        return [(1, index, bytes(16)) for index in range(COUNT)]

    def allocate(self, _: object) -> None:
        for _each in range(COUNT):
            self.memory.allocate(4096)

    def untouched(self) -> None:
        self.table.trim(self.arena)

    def touch(self, _: object) -> list[leases.Block]:
        blocks = self.blocks()
        for block in blocks:
            block.view[0] = 1
        return blocks

    def find(self, blocks: list[leases.Block]) -> None:
        for block in blocks:
            self.table.locate(self.arena.address + block.offset, block.nbytes)

    def fork(self, _: object) -> None:
        self.table.before_fork()
        self.table.after_fork_in_parent()

    def claim(self, _: object) -> list[leases.Block]:
        blocks: list[leases.Block] = []
        slabs = Slabs(self.memory.allocate, blocks)
        return [slabs.claim(4096)[0] for _each in range(COUNT)]

    def move(self, tensors: list[torch.Tensor]) -> None:
        slabs = Slabs(self.memory.allocate, [])
        for tensor in tensors:
            storage = tensor.untyped_storage()
            target = slabs.storage(*slabs.claim(4096), 4096)
            moving.move_storage(storage, storage.data_ptr(), 4096, target, tensor)

    def reduce(self, tensors: list[torch.Tensor]) -> Outgoing:
        outgoing = Outgoing(self.memory)
        for tensor in tensors:
            reducers.reduce(tensor, outgoing)
        return outgoing

    def round_trip(self, blocks: list[leases.Block]) -> None:
        self.table.lend(blocks, self.there)
        for block in blocks:
            self.far.receive(self.arena.id, block.offset, block.nbytes, self.here)
        self.table.given_back(self.there, self.far.take_give_backs(self.here))

    def frames(self, tasks: list[tuple[int, int, bytes]]) -> None:
        wire.unpack_plain_tasks(wire.pack_plain_tasks(tasks))

    def plain(self, numbers: range) -> None:
        for number in numbers:
            data = dumps_plain((number, 1.0))
            assert data is not None
            self.codec.loads(data)

    def schedule(self, simulation: Simulation) -> None:
        simulation.run(1, COUNT)


def main() -> int:
    """Prints the table; 1 if a budget was not kept."""
    over, bench = 0, Bench()
    for step in bench.steps():
        found = step.measure()
        over += found > step.budget
        print(f"{step.name:44}{found:8.2f} µs   budget {step.budget:5.1f}{'   OVER' if found > step.budget else ''}")
    bench.close()
    return int(over > 0)


if __name__ == "__main__":
    sys.exit(main())
