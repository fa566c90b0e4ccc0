"""A codec in this process and one in a child, and what travels between them, without a pool.

The child knows nothing but its own arena and the caller's: for each message it decodes what arrived, checks it against
its own idea of the kind, and sends back its answer, pickled by its own codec::

    Peering.ask(kind, codec) ── (kind, payload, fds) ──►  serve(): loads, check, dumps
                             ◄─ (payload | error, fds) ──
"""

from __future__ import annotations

import multiprocessing
import pickle
import random
import socket
import struct
import traceback
from typing import Any

import torch

from tpool.tensors import leases
from tpool.tensors.arena import Allocator, Arena
from tpool.tensors.ledger import Ledger
from tpool.tensors.payload import Payload, Received
from tpool.tensors.pickler import Codec
from tpool.tensors.storages import Sharing

ARENA_NBYTES = 256 << 20
BUDGET_NBYTES = 512 << 20
MAX_FDS = 200

__all__ = ["Far", "Peering", "codec_for", "new_arena"]


class Far(AssertionError):
    """What the child found wrong, with its traceback."""


def new_arena(budget: int = BUDGET_NBYTES, nbytes: int = ARENA_NBYTES) -> tuple[Arena, Ledger]:
    """An arena of this process's own, and its ledger."""
    arena, ledger = Arena.create(nbytes), Ledger.create(1, budget)
    leases.table().add(arena, Allocator(arena, ledger, 0))
    return arena, ledger


def codec_for(arena: Arena, sharing: Sharing, can_swap: bool = True) -> Codec:
    """A codec that allocates there."""
    return Codec(leases.Memory(arena, lambda seconds: False), None, sharing=sharing, can_swap=can_swap)


class Link:
    """One end of the connection: payloads as frames, with their descriptors, leases and give-backs."""

    def __init__(self, end: socket.socket, table: Any, peer: leases.Peer) -> None:
        self.end = end
        self.table = table
        self.peer = peer

    def send(self, payload: Payload, **more: Any) -> None:
        """Send a payload, and everything else by pickle."""
        data = payload.data
        blocks = [*payload.blocks, *(() if isinstance(data, bytes) else (data,))]
        self.table.lend(blocks, self.peer)
        more["data"] = data if isinstance(data, bytes) else None
        more["blocks"] = [(block.arena.id, block.offset, block.nbytes) for block in blocks]
        more["backs"] = self.table.take_give_backs(self.peer)
        more["fds"] = len(payload.fds)
        frame = pickle.dumps(more)
        self.end.sendall(struct.pack("<Q", len(frame)))
        for start in range(0, len(payload.fds), MAX_FDS):
            socket.send_fds(self.end, [b"f"], payload.fds[start : start + MAX_FDS])
        self.end.sendall(frame)

    def receive(self) -> tuple[Received, dict[str, Any]]:
        """The next payload, leased, and what came with it."""
        (nbytes,) = struct.unpack("<Q", self._exactly(8))
        fds: list[int] = []
        while (peeked := socket.recv_fds(self.end, 1, MAX_FDS))[1]:
            fds += peeked[1]
        more = pickle.loads(peeked[0] + self._exactly(nbytes - 1))
        self.table.given_back(self.peer, more["backs"])
        blocks = [self.table.receive(*named, self.peer) for named in more["blocks"]]
        data = more["data"] if more["data"] is not None else blocks.pop()
        assert len(fds) == more["fds"]
        return Received(data, blocks, fds), more

    def _exactly(self, nbytes: int) -> bytes:
        chunks = []
        while nbytes:
            chunk = self.end.recv(min(nbytes, 1 << 20))
            if not chunk:
                raise EOFError
            chunks.append(chunk)
            nbytes -= len(chunk)
        return b"".join(chunks)


class Peering:
    """This process, its arena, and a child that answers; close it when done."""

    def __init__(self, method: str = "spawn") -> None:
        self.table = leases.table()
        self.arena, self.ledger = new_arena()
        ours, theirs = socket.socketpair()
        self.theirs = Arena.create(ARENA_NBYTES)
        context = multiprocessing.get_context(method)
        self.process = context.Process(target=_serve, args=(_Inherited(theirs, self.arena, self.theirs),))
        self.process.start()
        theirs.close()
        self.table.add(self.theirs)
        self.link = Link(ours, self.table, leases.Peer("the child"))

    def ask(
        self, kind: str, payload: Payload, *, sharing: str = "share", can_swap: bool = True, act: str = "echo"
    ) -> Received:
        """Send a payload to the child.

        Args:
            kind: name of a kind, against whose ``make`` the child checks what arrives; "" for none.
            payload: of it.
            sharing, can_swap: of the child's own codec.
            act: a name in ``ACTS``: what the child answers.

        Raises:
            Far: the child raised.
        """
        self.link.send(payload, kind=kind, sharing=sharing, can_swap=can_swap, act=act)
        received, more = self.link.receive()
        if more["error"] is not None:
            received.discard()
            raise Far(more["error"])
        return received

    def child_lives(self) -> int:
        """How many blocks live in the child, by its own table, after it has dropped all it can."""
        received = self.ask("", Payload(pickle.dumps(None)), act="count")
        return pickle.loads(received.data)  # type: ignore[arg-type]

    def close(self) -> None:
        """End the child; all that it held is free again."""
        self.link.end.close()
        self.process.join(20)
        assert self.process.exitcode == 0
        self.process.close()
        self.table.forget(self.link.peer)
        self.table.remove(self.theirs)
        self.table.remove(self.arena)
        self.ledger.close()


class _Inherited:
    """What the child gets: its end of the connection and two arenas, as descriptors."""

    def __init__(self, end: socket.socket, mine: Arena, yours: Arena) -> None:
        self.end, self.mine, self.yours = end, mine, yours

    def __reduce__(self) -> Any:
        send = multiprocessing.reduction.DupFd
        return _attach, (send(self.end.fileno()), send(self.mine.fd), self.mine.id, send(self.yours.fd), self.yours.id)


def _attach(end: Any, mine: Any, mine_id: int, yours: Any, yours_id: int) -> Any:
    return (
        socket.socket(fileno=end.detach()),
        Arena.attach(mine.detach(), mine_id),
        Arena.attach(yours.detach(), yours_id),
    )


def _serve(inherited: Any) -> None:
    import kinds

    torch.set_num_threads(1)
    end, callers, own = inherited
    ledger = Ledger.create(1, BUDGET_NBYTES)
    table = leases.table()
    table.add(callers)
    table.add(own, Allocator(own, ledger, 0))
    link = Link(end, table, leases.Peer("the caller"))
    keep: list[Any] = []
    while True:
        try:
            received, more = link.receive()
        except EOFError:
            break
        try:
            codec = codec_for(own, more["sharing"], more["can_swap"])
            with kinds.quiet():
                obj = codec.loads(received)
                if more["kind"]:
                    entry = kinds.KINDS_BY_NAME[more["kind"]]
                    entry.check(entry.make(), obj)
                payload = codec.dumps(ACTS[more["act"]](obj, keep))
            error = None
        except Exception:
            payload, error = Payload(b""), traceback.format_exc()
        obj = received = None
        link.send(payload, error=error)
        payload = None
    kinds.forget_scratch()


# What the child can be asked to answer; module-level, so that a spawned child has them.


def _echo(obj: Any, keep: list[Any]) -> Any:
    return obj


def _nothing(obj: Any, keep: list[Any]) -> Any:
    return None


def _write(obj: Any, keep: list[Any]) -> Any:
    """Write 99 into each tensor that arrived."""
    for tensor in obj if isinstance(obj, (list, tuple)) else [obj]:
        tensor.data.fill_(99)
    return None


def _keep(obj: Any, keep: list[Any]) -> Any:
    keep.append(obj)
    return None


def _kept(obj: Any, keep: list[Any]) -> Any:
    return keep[-1]


def _forget(obj: Any, keep: list[Any]) -> Any:
    keep.clear()
    return None


def _count(obj: Any, keep: list[Any]) -> Any:
    leases.table().collect()
    return len(list(leases.table()._entries))


def _fresh(obj: Any, keep: list[Any]) -> Any:
    """A tensor of the child's own, of a size."""
    return torch.full((obj,), float(random.Random(obj).randrange(100)))


def _fresh_many(obj: Any, keep: list[Any]) -> Any:
    """So many small tensors of the child's own."""
    return [torch.full((64,), float(number)) for number in range(obj)]


def _stack(obj: Any, keep: list[Any]) -> Any:
    return torch.stack(obj)


ACTS = {
    act.__name__.removeprefix("_"): act
    for act in (_echo, _nothing, _write, _keep, _kept, _forget, _count, _fresh, _fresh_many, _stack)
}
