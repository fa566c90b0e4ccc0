"""What a worker says to its parent: outcomes, by socket or by outbox, and the memory that it gives back with them."""

from __future__ import annotations

from tpool.local import wire
from tpool.local.channel import Channel
from tpool.local.outbox import Outbox
from tpool.local.wire import Kind
from tpool.tensors.lease_table import MUCH_NBYTES, SMALL_PART, LeaseTable
from tpool.tensors.leases import Peer
from tpool.tensors.ledger import Ledger
from tpool.tensors.payload import Payload

__all__ = ["Replies"]


class Replies:
    """The way to the parent; used by the worker's main thread only.

    Args:
        channel: to the parent.
        table: of the leases.
        parent: whom they are held from.

    Attributes:
        outbox: known once the parent has said which it is.
        known_arenas: those that the parent has mapped.
        starving: the parent was told, since the last reply, that we wait for memory.
    """

    outbox: Outbox

    def __init__(self, channel: Channel, table: LeaseTable, parent: Peer) -> None:
        self.known_arenas: set[int] = set()
        self.starving = False
        self._spare_nbytes = 0
        self._waits = 0
        self._channel = channel
        self._table = table
        self._parent = parent

    def limit(self, ledger: Ledger) -> None:
        """Let so much memory of this pool wait to be given back while there are tasks."""
        self._spare_nbytes = min(MUCH_NBYTES, ledger.budget_nbytes // (SMALL_PART * ledger.counters))

    def answer(
        self, kind: Kind, job: int, index: int, seconds: float, status: int, tb: str, payload: Payload | bytes
    ) -> None:
        """The outcome of a task, by socket."""
        text = tb.encode(errors="backslashreplace")
        outbox = self.outbox
        head = wire.RESULT.pack(job, index, seconds, status, len(text), outbox.entries)
        outbox.replies = outbox.replies + 1 & 0xFFFFFFFF
        self.reply(kind, head + text, payload)

    def leave(self, job: int, index: int, seconds: float, payload: Payload | bytes) -> bool:
        """Leave a result in the outbox, as more tasks wait; False where it has to go by socket."""
        if self._table.owes_much(self._parent, self._spare_nbytes):
            return False
        if isinstance(payload, bytes):
            left = self.outbox.put(job, index, seconds, payload)
        else:
            left = self._leave_handles(job, index, seconds, payload)
        if left and self.outbox.take_bell():
            self.send(Kind.BELL)
        return left

    def _leave_handles(self, job: int, index: int, seconds: float, payload: Payload) -> bool:
        blocks = wire.all_blocks(payload)
        # That we starved no longer is told by what goes by socket.
        if payload.fds or self.starving or not self.known_arenas.issuperset([block.arena.id for block in blocks]):
            return False
        body = wire.pack_payload(payload)
        if not self.outbox.has_room(body):
            return False
        self._table.lend(blocks, self._parent)
        return self.outbox.put(job, index, seconds, body, handles=True)

    def leave_value(self, job: int, index: int, seconds: float, value: object) -> bool:
        """As ``leave``, for a result that need not be pickled, where it is one."""
        outbox = self.outbox
        if self._table.owes_much(self._parent, self._spare_nbytes) or not outbox.put_value(job, index, seconds, value):
            return False
        if outbox.take_bell():
            self.send(Kind.BELL)
        return True

    def reply(self, kind: Kind, head: bytes, payload: Payload | bytes) -> None:
        """A frame with a payload, whose blocks are the parent's from now on; whoever sends one waits no longer."""
        self.starving = False
        if isinstance(payload, bytes):
            self.send(kind, head + wire.pack_payload(payload))
            return
        blocks = wire.all_blocks(payload)
        if blocks:
            for arena in {block.arena for block in blocks}:
                if arena.id not in self.known_arenas:
                    # A nested pool's arena: the parent maps it for as long as it uses a block of it.
                    self._channel.put(Kind.ARENA, wire.pack_id(arena.id), (arena.fd,))
            self._table.lend(blocks, self._parent)
            blocks.clear()
        self.send(kind, head + wire.pack_payload(payload), tuple(payload.fds))

    def send(self, kind: Kind, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Any other frame; what died here is given back with it."""
        self._channel.put(kind, body, fds)
        self._queue_give_backs()
        self._channel.flush()

    def starve(self) -> None:
        """Tell the parent that we wait for memory."""
        self._waits += 1
        self.starving = True
        self.send(Kind.STARVING, wire.pack_count(self._waits))

    def concerns(self, body: bytes) -> bool:
        """Whether we still wait for what this frame answers: the memory may have come, and another wait have begun."""
        return self.starving and wire.unpack_count(body) == self._waits

    def end_wait(self, body: bytes) -> bool:
        """As ``concerns``; then the wait is over, and if what came does not help the parent is to hear of another."""
        ours = self.concerns(body)
        self.starving = self.starving and not ours
        return ours

    def flush_give_backs(self) -> None:
        """Give back what died here, before this process blocks."""
        self._queue_give_backs()
        if self._channel.backlogged:
            self._channel.flush()

    def _queue_give_backs(self) -> None:
        give_backs = self._table.take_give_backs(self._parent)
        if give_backs:
            self._channel.put(Kind.GIVE_BACKS, wire.pack_give_backs(give_backs))
