"""The body of a worker: receive, run, reply; garbage collection and exit hooks at the end.

    channel ─► frames ─► queue of tasks ─► claim ─► decode ─► call ─► encode ─► channel

One thread does it all, so a task starts only when the one before it has been answered.

The claim: the parent adds one to an ``eventfd`` semaphore for each task *before* it sends it, and the worker takes
one before each task it starts. What is left in the semaphore when the worker dies are exactly the tasks that were
never started; and to take tasks back from behind a long one, the parent takes what is left itself. A worker that
finds no claim therefore throws away what it has not started and says how many (``SETTLED``); the parent sends
nothing until that number is what it took.

Leases: a frame's blocks are leased as it is read. What dies here is given back with the next reply, and before this
process blocks.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import threading
from collections import deque
from time import perf_counter
from typing import Any, cast

from tpool.errors import DecodeError, ProtocolError
from tpool.local import identity, wire
from tpool.local.calls import JobCalls, apply_call
from tpool.local.channel import Channel, Frame
from tpool.local.faltering import Faltered
from tpool.local.lifetime import Lifetime
from tpool.local.outbox import Outboxes
from tpool.local.outcomes import encode_error, encode_value
from tpool.local.retirement import end_program
from tpool.local.stacks import tell_on_signal
from tpool.local.weight import Weight
from tpool.local.wire import Kind, Mode, Status
from tpool.tensors import leases
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.leases import Memory, Peer
from tpool.tensors.payload import GroupId, Payload, Received
from tpool.tensors.pickler import Codec

# Plain numbers: an enum's attribute costs more than the comparison, and these are looked at for each task.
_PLAIN_TASKS = int(Kind.PLAIN_TASKS)
_VALUE, _ERROR = int(Status.VALUE), int(Status.ERROR)

Initializer = tuple[Any, tuple[Any, ...]]


class Worker:
    """One worker process's state; used by its main thread only.

    Args:
        sock: the worker's end of the channel; owned.
        claims_fd: the semaphore of claims; owned.
        baseline: what ``__main__`` held when the pool was made, where a fork inherited it.
    """

    def __init__(self, sock: socket.socket, claims_fd: int, baseline: dict[str, Any] | None = None) -> None:
        self._baseline = baseline
        self._channel = Channel(sock)
        self._claims_fd = claims_fd
        self._parent = Peer("parent")
        self._table = leases.table()
        self._tasks: deque[tuple[int, int, Received | bytes]] = deque()
        self._jobs: dict[int, JobCalls] = {}
        self._retiring = False
        self._initializer: Received | None = None
        self._lifetime: Lifetime | None = None
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._starving = False  # the parent was told, since the last reply, that we wait for memory
        self._hopeless = False
        self._group_error: DecodeError | None = None
        self._poll = select.poll()
        self._poll.register(self._channel.fileno(), select.POLLIN)

    # The life of a worker ------------------------------------------------------------------------------------------

    def run(self, inherited: Initializer | None = None) -> int:
        """Live from the first message to retirement; returns the exit code.

        Args:
            inherited: the initializer where a fork brought it along unpickled.
        """
        try:
            self._greet()
            if not self._initialize(inherited):
                return 1
            del inherited
            self._send(Kind.READY)
            self._serve()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0  # the pool is gone; whoever kills us is on the way
        self._retire()
        return 0

    def _greet(self) -> None:
        while True:
            frames = self._channel.receive()
            if frames:
                break
        self._install(frames.pop(0))
        for frame in frames:
            self._handle(frame)

    def _install(self, frame: Frame) -> None:
        if frame.kind != Kind.HELLO:
            raise ProtocolError(f"the first frame is of kind {frame.kind}, not HELLO")
        hello: identity.Hello = pickle.loads(frame.body)
        slot_fd, caller_fd, ledger_fd, outboxes_fd, stacks_fd, *others = frame.fds
        tell_on_signal(stacks_fd)
        identity.assume(hello, others)
        identity.set_worker_info(hello.info)
        limit = hello.seat.max_memory_nbytes
        self._weight = None if limit is None else Weight(limit)
        arena = self._attach(hello.slot_arena, slot_fd)
        allocator = Allocator(arena, Ledger.attach(ledger_fd), hello.ledger_index)
        self._table.add(arena, allocator)
        self._table.reinstate(arena, hello.live_blocks, self._parent)
        self._table.add(self._attach(hello.caller_arena, caller_fd))
        outboxes = Outboxes(outboxes_fd)
        self._outbox = outboxes.outbox(hello.info.id)
        outboxes.close()
        self._arena = arena
        self._known_arenas = {hello.slot_arena, hello.caller_arena}
        self._memory = Memory(arena, self._wait_for_memory)
        self._codec = Codec(self._memory, baseline=self._baseline, sharing=hello.sharing, can_swap=hello.can_swap)

    def _attach(self, arena_id: int, fd: int) -> Arena:
        known = self._table.arena(arena_id)
        if known is None:
            return Arena.attach(fd, arena_id)
        os.close(fd)  # a fork inherited the mapping
        return known

    def _initialize(self, inherited: Initializer | None) -> bool:
        """Run the initializer; on failure tell the parent why and return False."""
        try:
            function, arguments = inherited or self._wait_for_initializer()
            if isinstance(function, Lifetime):
                self._lifetime, function = function, function.initializer
            if function is not None:
                function(*arguments)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except BaseException as error:
            self._reply_failed_initializer(error)
            return False
        return True

    def _wait_for_initializer(self) -> Initializer:
        while self._initializer is None:
            self._read()
        received, self._initializer = self._initializer, None
        function, arguments = cast("Initializer", self._codec.loads(received))
        return function, arguments

    def _serve(self) -> None:
        while True:
            if self._tasks:
                self._next_task()
                if self._weight is not None and (excess := self._weight.excess()) is not None:
                    self._send(Kind.OVERWEIGHT, wire.pack_id(excess))
                    return  # what it has not started goes to others
            elif self._retiring:
                return
            else:
                self._read()

    def _retire(self) -> None:
        """Let destructors run, as they would at the end of a program, then leave."""
        if self._lifetime is not None:
            story, self._lifetime = self._lifetime.end(), None
            if story is not None:
                with contextlib.suppress(EOFError, OSError):  # the pool has ended, and nobody is left to tell
                    self._send(Kind.EXIT_FAILED, story)
        self._jobs.clear()
        token = self._codec.token.block
        del self._codec
        end_program()
        if token is not None:
            with contextlib.suppress(EOFError, OSError):  # the pool has ended
                self._send(Kind.LINGERING, wire.pack_place(token.arena.id, token.offset))
                while all(frame.kind != Kind.RETIRE for frame in self._channel.receive()):
                    pass  # see tpool.local.lingering

    # Reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Handle what has arrived; blocks until something has."""
        self._flush_give_backs()
        # Not in recvmsg: who sleeps there is also woken when the parent *reads* our last reply (the socket has room to
        # write again), which costs a switch of processes per task. poll() is told what it waits for.
        self._poll.poll()
        for frame in self._channel.receive():
            self._handle(frame)

    def _handle(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == _PLAIN_TASKS:
            self._tasks.extend(wire.unpack_plain_tasks(frame.body))
        elif kind == Kind.TASKS:
            self._take_tasks(frame)
        elif kind == Kind.GIVE_BACKS:
            for arena_id, offset, count in wire.unpack_give_backs(frame.body):
                self._table.given_back(self._parent, arena_id, offset, count)
        elif kind == Kind.JOB:
            job, mode = wire.unpack_head(wire.JOB, frame.body)
            self._jobs[job] = JobCalls(Mode(mode), self._unpack(frame, wire.JOB.size))
        elif kind == Kind.FORGET:
            for job in wire.unpack_ids(frame.body):
                self._jobs.pop(job, None)
        else:
            self._handle_rare(frame)

    def _handle_rare(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == Kind.GROUP:
            group = GroupId(wire.unpack_id(frame.body))
            received = self._unpack(frame, wire.ID_NBYTES)
            try:
                self._codec.load_group(group, received)
            except DecodeError as error:
                self._group_error = error  # tasks that need what it held will fail, and should say why
        elif kind == Kind.ARENA:
            arena_id = wire.unpack_id(frame.body)
            self._known_arenas.add(arena_id)
            arena = self._attach(arena_id, frame.fds.pop())
            self._table.add(arena)
        elif kind == Kind.OBJECT:
            self._codec.keeper.add(wire.unpack_id(frame.body), self._unpack(frame, wire.ID_NBYTES))
        elif kind == Kind.DROP_OBJECTS:
            for id in wire.unpack_ids(frame.body):
                self._codec.keeper.drop(id)
        elif kind == Kind.INITIALIZER:
            self._initializer = self._unpack(frame, 0)
        elif kind == Kind.TRIM:
            self._table.collect()  # which gives idle memory back where somebody waits for it
        elif kind == Kind.GRANT:
            self._memory.grant()
            self._starving = False  # if it does not help, the parent is to hear of it again
        elif kind == Kind.HOPELESS:
            self._hopeless = True
        elif kind == Kind.RETIRE:
            self._retiring = True
        else:
            raise ProtocolError(f"a frame of unknown kind {kind}")

    def _unpack(self, frame: Frame, position: int) -> Received:
        return wire.unpack_payload(frame.body, position, frame.fds, self._receive_block)[0]

    def _receive_block(self, arena_id: int, offset: int, nbytes: int) -> leases.Block:
        return self._table.receive(arena_id, offset, nbytes, self._parent)

    def _take_tasks(self, frame: Frame) -> None:
        body, position = frame.body, 0
        while position < len(body):
            job, index = wire.unpack_head(wire.TASK, body, position)
            received, position = wire.unpack_payload(body, position + wire.TASK.size, frame.fds, self._receive_block)
            self._tasks.append((job, index, received))

    # Running -------------------------------------------------------------------------------------------------------

    def _next_task(self) -> None:
        try:
            os.eventfd_read(self._claims_fd)
        except BlockingIOError:
            self._drop_recalled()
            return
        job, index, received = self._tasks.popleft()
        started = perf_counter()
        tb = ""
        kind = Kind.RESULT
        try:
            payload = encode_value(self._codec, self._call(job, received))
            status = _VALUE
        except BaseException as error:
            if type(error) is Faltered:
                error, kind = error.error, Kind.FALTERED
            if isinstance(error, DecodeError) and error.__cause__ is None:
                error.__cause__ = self._group_error
            payload, tb = encode_error(self._codec, error)
            status = _ERROR
        del received  # the arguments' leases end before the reply, so that they are given back with it
        if os.getpid() != self._pid:
            os._exit(1)  # the task forked and its child returned here; the reply is its parent's to give
        seconds = perf_counter() - started
        if type(payload) is bytes and self._tasks and self._leave(job, index, seconds, payload):
            return
        text = tb.encode(errors="backslashreplace")
        head = wire.RESULT.pack(job, index, seconds, status, len(text), self._outbox.entries)
        self._outbox.replies = self._outbox.replies + 1 & 0xFFFFFFFF
        self._reply(kind, head + text, payload)

    def _leave(self, job: int, index: int, seconds: float, stream: bytes) -> bool:
        """Leave a result in the outbox, as more tasks wait; False where it has to go by socket."""
        if self._table.owes(self._parent) or not self._outbox.put(job, index, seconds, stream):
            return False
        if self._outbox.take_bell():
            self._send(Kind.BELL)
        return True

    def _call(self, job: int, received: Received | bytes) -> Any:
        known = self._jobs.get(job)
        if known is None:
            return apply_call(self._codec, received)
        return known.call(self._codec, received)

    # Replying ------------------------------------------------------------------------------------------------------

    def _reply_failed_initializer(self, error: BaseException) -> None:
        payload, tb = encode_error(self._codec, error)
        text = tb.encode(errors="backslashreplace")
        self._reply(Kind.INITIALIZER_FAILED, wire.pack_count(len(text)) + text, payload)

    def _reply(self, kind: Kind, head: bytes, payload: Payload | bytes) -> None:
        if isinstance(payload, bytes):
            self._send(kind, head + wire.pack_payload(payload))
            return
        blocks = wire.all_blocks(payload)
        if blocks:
            for arena in {block.arena for block in blocks}:
                if arena.id not in self._known_arenas:
                    # A nested pool's arena: the parent maps it for as long as it uses a block of it.
                    self._channel.put(Kind.ARENA, wire.pack_id(arena.id), (arena.fd,))
            self._table.lend(blocks, self._parent)
            blocks.clear()
        self._send(kind, head + wire.pack_payload(payload), tuple(payload.fds))

    def _queue_give_backs(self) -> None:
        give_backs = self._table.take_give_backs(self._parent)
        if give_backs:
            self._channel.put(Kind.GIVE_BACKS, wire.pack_give_backs(give_backs))

    def _flush_give_backs(self) -> None:
        self._queue_give_backs()
        if self._channel.backlogged:
            self._channel.flush()

    def _send(self, kind: Kind, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        self._starving = False
        self._channel.put(kind, body, fds)
        self._queue_give_backs()
        self._channel.flush()

    def _drop_recalled(self) -> None:
        count = len(self._tasks)
        for _, _, received in self._tasks:
            if not isinstance(received, bytes):
                received.discard()
        self._tasks.clear()
        self._send(Kind.SETTLED, wire.pack_count(count))

    def _wait_for_memory(self, seconds: float) -> bool:
        """Tell the parent that memory is short and read what it gives back meanwhile.

        Returns:
            False when the parent says that none can come back.
        """
        if os.getpid() != self._pid or threading.get_ident() != self._thread:
            return False  # only the thread that reads the channel can wait for what comes through it
        if not self._starving:
            self._hopeless = False
            self._send(Kind.STARVING)
            self._starving = True
        else:
            self._flush_give_backs()
        if self._poll.poll(seconds * 1000):
            for frame in self._channel.receive():
                self._handle(frame)
        return not self._hopeless
