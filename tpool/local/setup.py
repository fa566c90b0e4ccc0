"""What a pool of local workers is made of before any worker runs: settings, shared memory, launcher.

The caller's arena and one per slot are made here, once; workers come and go.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.process
import multiprocessing.resource_tracker
import os
import pickle
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch

from tpool.errors import PlatformError, ProtocolError
from tpool.local.encodings import Encodings
from tpool.local.identity import Hello, WorkerInfo
from tpool.local.launch import ForkLauncher, Launcher, SpawnLauncher, ZygoteLauncher
from tpool.local.lifetime import Lifetime
from tpool.local.logs import LogReceiver
from tpool.local.outbox import Outbox, Outboxes
from tpool.local.process import Inheritance
from tpool.local.seat import Steering
from tpool.local.stacks import Stacks
from tpool.local.trace import Trace
from tpool.tensors import leases, torch_private
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.definitions import Definitions
from tpool.tensors.leases import Memory, Peer
from tpool.tensors.pickler import Codec
from tpool.tensors.storages import Sharing

logger = logging.getLogger("tpool")

RELEASE_SECONDS = 0.1
"""So often at most the memory of slots without workers is looked at, which takes as long as there are live blocks.
Longer: whoever waits for that memory might be told that there is no hope."""


@dataclass(slots=True)
class Settings:
    """What the user asked for, validated.

    Attributes:
        processes: how many workers.
        method: ``forkserver`` (the zygote), ``fork`` or ``spawn``.
        initializer, initargs: run in each worker before its first task.
        preload: modules that the zygote imports.
        memory_nbytes: the pool's budget of shared memory.
        sharing: ``share`` or ``copy``.
        steering: what each worker is given.
        log_level: of the least log records that workers send; None to send none.
        timeline: how many tasks of each worker are written down for a timeline; 0 for none.
        can_swap: see ``Codec``.
        environment, directory, path, argv: of the moment the pool is made.
    """

    processes: int
    method: str
    initializer: Callable[..., object] | Lifetime | None
    initargs: tuple[Any, ...]
    preload: tuple[str, ...]
    memory_nbytes: int
    sharing: Sharing
    steering: Steering = field(default_factory=Steering)
    log_level: int | None = None
    timeline: int = 0
    can_swap: bool = torch_private.CAN_SWAP
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    directory: str | None = field(default_factory=lambda: working_directory())
    path: list[str] = field(default_factory=lambda: list(sys.path))
    argv: list[str] = field(default_factory=lambda: list(sys.argv))
    seed: int = field(default_factory=lambda: secrets.randbits(62))


def working_directory() -> str | None:
    """The caller's, if there is one."""
    try:
        return os.getcwd()
    except OSError:  # deleted under us; workers then keep the one they have
        return None


def check_platform() -> None:
    """Raise PlatformError where tpool cannot work, naming what is missing."""
    if sys.platform != "linux":
        raise PlatformError(
            f"tpool needs Linux (memfd, eventfd, pidfd, epoll); this is {sys.platform}. "
            "Use torch.multiprocessing.Pool here"
        )
    for module, name in ((os, "memfd_create"), (os, "pidfd_open"), (os, "eventfd")):
        if not hasattr(module, name):
            raise PlatformError(f"this Python was built without os.{name}, which tpool needs (Linux 5.3, glibc 2.27)")
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        raise PlatformError(f"pidfd_open does not work here ({error}); tpool needs Linux 5.3 or newer") from error


class PoolMemory:
    """The shared memory of one pool, from the parent's side, and the codec over it.

    Owned by the engine. ``table``, ``codec`` and ``definitions`` may be used from any thread; the rest belongs to the
    handler's.

    Args:
        settings: what the user asked for.
        wait: see ``tensors.leases.Memory``.
    """

    def __init__(self, settings: Settings, wait: Callable[[float], bool]) -> None:
        self.settings = settings
        self.table = leases.table()
        self.began = monotonic()
        self.encodings = Encodings(settings.timeline) if settings.timeline else None
        self._slots: list[Arena] = []
        self._boxes: list[tuple[Outboxes, int]] = []  # of each slot: where its outbox is
        self._traces: list[Trace | None] = []
        self.owing: dict[Peer, None] = {}  # peers for whom give-backs are pending
        self.peers: list[Peer] = []
        self._vacant: dict[int, int] = {}  # slots without a worker whose memory is in use, and in how many blocks
        self._released_at = 0.0
        self._foreign: list[tuple[int, Arena]] = []  # by slot
        with contextlib.ExitStack() as undo:  # at the limit of descriptors or address space, leave nothing behind
            self._ledger = Ledger.create(1 + settings.processes, settings.memory_nbytes)
            undo.callback(self._ledger.close)
            self.stacks = Stacks()
            undo.callback(self.stacks.close)
            self.logs = None if settings.log_level is None else LogReceiver(settings.log_level)
            if self.logs is not None:
                undo.callback(self.logs.close)
            self._caller = Arena.create(settings.memory_nbytes)
            undo.callback(self.table.remove, self._caller)
            self.table.add(self._caller, Allocator(self._caller, self._ledger, 0))
            self.grow(settings.processes)
            undo.pop_all()
        self.baseline = dict(vars(sys.modules["__main__"])) if settings.method == "fork" else None
        self.definitions = Definitions(baseline=self.baseline)
        memory = Memory(self._caller, wait, threads=lambda: settings.steering.available)
        self.codec = Codec(memory, self.definitions, sharing=settings.sharing, can_swap=settings.can_swap)

    def grow(self, count: int) -> None:
        """Make what workers in slots below ``count`` need. By one thread at a time, before the first is asked for.

        Raises:
            OSError: there are not descriptors or there is not address space enough; nothing has changed.
            ValueError: there is no room for so many.
        """
        settings, slots = self.settings, range(len(self._slots), count)
        if not slots:
            return
        self._ledger.grow(1 + count)  # which harms nobody if the rest fails
        with contextlib.ExitStack() as undo:
            bank = Outboxes.create(len(slots))
            undo.callback(bank.close)
            arenas: list[Arena] = []
            traces: list[Trace | None] = []
            for _ in slots:
                arenas.append(Arena.create(settings.memory_nbytes))
                undo.callback(self.table.remove, arenas[-1])
                self.table.add(arenas[-1])
                trace = Trace.create(settings.timeline) if settings.timeline else None
                traces.append(trace)
                if trace is not None:
                    undo.callback(trace.close)
            undo.pop_all()
        self.peers += [Peer(f"slot {slot}", self.owing) for slot in slots]
        self._boxes += [(bank, index) for index in range(len(slots))]
        self._traces += traces
        self._slots += arenas

    def vacate(self, slot: int) -> None:
        """The slot's worker is gone and none follows: give back what it kept warm."""
        self._vacant[slot] = -1
        self._released_at = -RELEASE_SECONDS
        self.release_vacant()

    def release_vacant(self) -> None:
        """Where a slot has no worker, nobody else gives back the memory of results that have died since."""
        if not self._vacant or monotonic() < self._released_at + RELEASE_SECONDS:
            return
        for slot, known in list(self._vacant.items()):
            arena = self._slots[slot]
            blocks = self.table.live_blocks(self.peers[slot], arena)
            if len(blocks) != known:
                self._vacant[slot] = len(blocks)
                allocator = Allocator(arena, self._ledger, slot + 1)
                for offset, nbytes in blocks:
                    allocator.reserve(offset, nbytes)
                allocator.adopt()
                allocator.trim()
            if not blocks:
                del self._vacant[slot]
        self._released_at = monotonic()

    def outbox(self, slot: int) -> Outbox:
        """Our end of the outbox of the slot's next worker; its earlier one is gone, and its results were taken."""
        self._vacant.pop(slot, None)
        bank, index = self._boxes[slot]
        outbox = bank.outbox(index)
        outbox.clear()
        return outbox

    def trace(self, slot: int) -> Trace | None:
        """What the slot's workers did; None if nobody wants to know."""
        return self._traces[slot]

    def worker_arenas(self, slot: int) -> tuple[Arena, Arena]:
        """The arenas that a worker knows from its first message: its slot's and the caller's."""
        return self._slots[slot], self._caller

    def hello(self, slot: int, number: int) -> tuple[bytes, tuple[int, ...]]:
        """The first message to a worker: body and descriptors."""
        settings = self.settings
        inherited = settings.method == "fork"
        tracker_fd = None if inherited else _tracker_fd()
        current = multiprocessing.process.current_process()
        arena = self._slots[slot]
        bank, outbox_index = self._boxes[slot]
        trace = self._traces[slot]
        seat = settings.steering.seat(slot, settings.processes, settings.method)
        hello = Hello(
            method=settings.method,
            number=number,
            info=WorkerInfo(slot, settings.processes, (settings.seed + slot) % 2**63, seat.device),
            parent_pid=os.getpid(),
            parent_name=current.name,
            authkey=bytes(current.authkey),
            environment=None if inherited else settings.environment,
            directory=None if inherited else settings.directory,
            path=None if inherited else settings.path,
            argv=None if inherited else settings.argv,
            main_attributes=None if inherited else main_attributes(),
            seat=seat,
            slot_arena=arena.id,
            caller_arena=self._caller.id,
            ledger_index=slot + 1,
            live_blocks=self.table.live_blocks(self.peers[slot], arena),
            has_tracker=tracker_fd is not None,
            log_level=settings.log_level,
            outbox_index=outbox_index,
            traced=trace is not None,
            sharing=settings.sharing,
            can_swap=settings.can_swap,
        )
        log_fd = None if self.logs is None else self.logs.fd
        trace_fd = None if trace is None else trace.fd
        optional = [fd for fd in (tracker_fd, log_fd, trace_fd) if fd is not None]
        fds = (arena.fd, self._caller.fd, self._ledger.fd, bank.fd, self.stacks.fd, *optional)
        return pickle.dumps(hello), fds

    def committed_nbytes(self, slot: int | None) -> tuple[int, int]:
        """Shared memory that the slot has, and the most it ever had; of the caller for None."""
        index = 0 if slot is None else slot + 1
        return self._ledger.committed_nbytes(index), self._ledger.peak_nbytes(index)

    def attach(self, arena_id: int, fds: list[int], slot: int) -> None:
        """Map an arena that a slot's worker made, its nested pool's; a block of it comes with its next reply.

        Raises:
            ProtocolError: there is no arena behind the descriptor, or no descriptor.
        """
        if not fds:
            raise ProtocolError("it named an arena without sending its descriptor")
        fd = fds.pop()
        if self.table.arena(arena_id) is not None:
            os.close(fd)
            return
        try:
            arena = Arena.attach(fd, arena_id)
        except PlatformError as error:
            raise ProtocolError(f"its arena cannot be used: {error}") from error
        self._foreign.append((slot, arena))
        self.table.add(arena)

    def release_foreign(self, slot: int) -> None:
        """A slot's worker has replied: what needs its foreign arenas is leased now, and keeps them while it lives."""
        for kept in [kept for kept in self._foreign if kept[0] == slot]:
            self._foreign.remove(kept)
            self.table.remove(kept[1])

    def close(self) -> None:
        """The pool has ended. Blocks that the caller still uses stay mapped as long as it does."""
        for peer in self.peers:
            self.table.forget(peer)
        for arena in (self._caller, *self._slots, *(arena for _, arena in self._foreign)):
            self.table.remove(arena)
        self._ledger.close()
        for bank, _ in self._boxes:
            bank.close()
        for trace in self._traces:
            if trace is not None:
                trace.close()
        self.stacks.close()
        if self.logs is not None:
            self.logs.close()
        self.baseline = None
        self.table.collect()  # our forked workers are gone, and with them what they held


def _tracker_fd() -> int | None:
    """The resource tracker's descriptor if one runs; it is not started for our sake."""
    fd: int | None = multiprocessing.resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
    return fd


def main_attributes() -> dict[str, Any]:
    """What a worker's ``__main__`` has of the caller's from the start."""
    main = vars(sys.modules["__main__"])
    names = ("__doc__", "__file__", "__package__")
    return {name: main[name] for name in names if isinstance(main.get(name), str)}


def make_launcher(
    settings: Settings, baseline: dict[str, Any] | None, close_inherited: Callable[[int, int], None]
) -> Launcher:
    """The launcher for the start method.

    Args:
        settings: what the user asked for.
        baseline: see ``Inheritance``; not None under fork.
        close_inherited: see ``ForkLauncher``.
    """
    if settings.method == "fork":
        assert baseline is not None
        inheritance = Inheritance((settings.initializer, settings.initargs), baseline)
        return ForkLauncher(inheritance, close_inherited)
    if settings.method == "spawn":
        return SpawnLauncher()
    return ZygoteLauncher(settings.preload)


def refuse_fork_after_cuda(method: str) -> None:
    """CUDA does not survive a fork; say so before anything hangs."""
    if method == "fork" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise PlatformError(
            "context='fork' cannot be used after CUDA was initialised in this process: a forked worker could not use "
            "CUDA. Use the default start method, or make the pool before the first CUDA call"
        )
