"""The body of a worker: receive, run, reply; garbage collection and exit hooks at the end.

    channel ─► frames ─► queue of tasks ─► claim ─► decode ─► call ─► encode ─► channel

One thread does it all, so a task starts only when the one before it has been answered.

The claim: the parent adds one to an ``eventfd`` semaphore for each task, and each item of a span, *before* it sends
it, and the worker takes one before each that it starts. What is left in the semaphore when the worker dies are exactly
those that were never started; and to take tasks back from behind a long one, the parent takes what is left itself. A
worker that finds no claim therefore throws away what it has not started and says how many (``SETTLED``); the parent
sends nothing until that number is what it took.

Leases: a frame's blocks are leased as it is read. What dies here is given back with the next reply, and before this
process blocks.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections import deque
from time import monotonic
from typing import Any, cast

import torch

from tpool.errors import DecodeError, ProtocolError
from tpool.local import identity, wire
from tpool.local.calls import JobCalls, Marks, apply_call
from tpool.local.channel import Channel, Frame
from tpool.local.faltering import Faltered
from tpool.local.lifetime import Lifetime
from tpool.local.outbox import Outboxes
from tpool.local.outcomes import encode_error, encode_value
from tpool.local.patience import Patience
from tpool.local.replies import Replies
from tpool.local.retirement import end_program
from tpool.local.spans import Span, SpanWork
from tpool.local.stacks import tell_on_signal
from tpool.local.trace import Trace
from tpool.local.weight import weigh
from tpool.local.wire import Kind, Mode, Status
from tpool.tensors import leases
from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.leases import Memory, Peer
from tpool.tensors.payload import GroupId, Payload, Received
from tpool.tensors.pickler import Codec

# Plain numbers: an enum's attribute costs more than the comparison, and these are looked at for each task.
_PLAIN_TASKS, _SPAN = int(Kind.PLAIN_TASKS), int(Kind.SPAN)
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
        self._replies = Replies(self._channel, self._table, self._parent)
        self._tasks: deque[tuple[int, int, Received | bytes] | Span] = deque()
        self._jobs: dict[int, JobCalls] = {}
        self._retiring = False
        self._marks = Marks()
        self._initializer: Received | None = None
        self._lifetime: Lifetime | None = None
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._hopeless = False
        self._group_error: DecodeError | None = None
        self._patience = Patience(self._channel.fileno())

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
            self._replies.send(Kind.READY)
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
        self._trace = Trace.attach(others.pop()) if hello.traced else None
        identity.assume(hello, others)
        identity.set_worker_info(hello.info)
        self._excess = weigh(hello.seat.max_memory_nbytes, hello.seat.max_cuda_nbytes)
        arena = self._attach(hello.slot_arena, slot_fd)
        allocator = Allocator(arena, Ledger.attach(ledger_fd), hello.ledger_index)
        self._replies.limit(allocator.ledger)
        self._table.add(arena, allocator)
        self._table.reinstate(arena, hello.live_blocks, self._parent)
        self._table.add(self._attach(hello.caller_arena, caller_fd))
        outboxes = Outboxes(outboxes_fd)
        self._replies.outbox = outboxes.outbox(hello.outbox_index)
        outboxes.close()
        singly = self._excess is not None  # which is asked after each task
        self._span_work = SpanWork(self._claims_fd, self._replies, self._settle, self._finish_span, singly)
        self._arena = arena
        self._replies.known_arenas = {hello.slot_arena, hello.caller_arena}
        self._memory = Memory(arena, self._wait_for_memory, threads=torch.get_num_threads)
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
                if self._excess is not None and (reason := self._excess()):
                    self._replies.send(Kind.OVERWEIGHT, reason.encode())
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
                    self._replies.send(Kind.EXIT_FAILED, story)
        self._jobs.clear()
        token = self._codec.token.block
        del self._codec
        end_program()
        if token is not None:
            with contextlib.suppress(EOFError, OSError):  # the pool has ended
                self._replies.send(Kind.LINGERING, wire.pack_place(token.arena.id, token.offset))
                while all(frame.kind != Kind.RETIRE for frame in self._channel.receive()):
                    pass  # see tpool.local.lingering

    # Reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Handle what has arrived; blocks until something has, or until it is time to look for what is old."""
        seconds = self._memory.limit_wait(None)  # first: it may find what is to be given back
        self._replies.flush_give_backs()
        if self._patience.wait(seconds):
            for frame in self._channel.receive():
                self._handle(frame)

    def _handle(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == _PLAIN_TASKS:
            self._tasks.extend(wire.unpack_plain_tasks(frame.body))
        elif kind == _SPAN:
            self._tasks.append(Span(frame.body))
        elif kind == Kind.TASKS:
            self._take_tasks(frame)
        elif kind == Kind.GIVE_BACKS:
            self._table.given_back(self._parent, wire.unpack_give_backs(frame.body))
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
            began = monotonic()
            try:
                self._codec.load_group(group, received)
            except DecodeError as error:
                self._group_error = error  # tasks that need what it held will fail, and should say why
            if self._trace is not None:
                self._trace.note_definitions(began, monotonic(), wire.carried_nbytes(received))
        elif kind == Kind.ARENA:
            arena_id = wire.unpack_id(frame.body)
            self._replies.known_arenas.add(arena_id)
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
            self._table.collect_garbage()  # which gives idle memory back where somebody waits for it
            self._replies.send(Kind.TRIMMED)
        elif kind == Kind.GRANT:
            if self._replies.end_wait(frame.body):
                self._memory.grant()
        elif kind == Kind.HOPELESS:
            self._hopeless = self._hopeless or self._replies.concerns(frame.body)
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
        task = self._tasks[0]
        if isinstance(task, Span):
            job = task.job  # which is forgotten by now, perhaps, if there is no claim
            if not self._span_work.go_through(task, lambda: self._jobs[job].ready_function(self._codec)):
                self._drop_recalled()
            return
        try:
            os.eventfd_read(self._claims_fd)
        except BlockingIOError:
            self._drop_recalled()
            return
        job, index, received = task
        del task
        self._tasks.popleft()
        marks, trace = self._marks, self._trace
        started = marks.decoded = marks.ran = monotonic()
        if trace is not None:
            trace.begin(job, index, started)
            came_nbytes = len(received) if type(received) is bytes else wire.carried_nbytes(received)
        tb = ""
        kind = Kind.RESULT
        try:
            payload = encode_value(self._codec, [self._call(job, received)], marks)
            status = _VALUE
        except BaseException as error:
            marks.fail(started)
            if type(error) is Faltered:
                error, kind = error.error, Kind.FALTERED
            payload, tb = self._encode_error(error)
            status = _ERROR
        del received  # the arguments' leases end before the reply, so that they are given back with it
        finished = self._finish(started)
        if trace is not None:
            sent_nbytes = len(payload) if type(payload) is bytes else wire.carried_nbytes(payload)
            trace.end(finished, marks.decoded, marks.ran, came_nbytes, sent_nbytes)
        seconds = finished - started
        if status == _VALUE and self._tasks and self._replies.leave(job, index, seconds, payload):
            return
        self._replies.answer(kind, job, index, seconds, status, tb, payload)

    def _finish_span(self) -> bool:
        """The last item of a span is begun: whether something is to be done after it."""
        self._tasks.popleft()
        return bool(self._tasks)

    def _settle(self, job: int, index: int, started: float, held: list[Any], error: BaseException | None) -> None:
        """An item of a span has an outcome that the outbox does not take as a plain value."""
        marks, status, tb = self._marks, _VALUE, ""
        marks.decoded, marks.ran = started, monotonic()
        payload: Payload | bytes = b""
        if error is None:
            try:
                payload = encode_value(self._codec, held, marks)
            except BaseException as failure:
                error = failure
        if error is not None:
            payload, tb = self._encode_error(error)
            status = _ERROR
        seconds = self._finish(started) - started
        if status == _VALUE and self._tasks and self._replies.leave(job, index, seconds, payload):
            return
        self._replies.answer(Kind.RESULT, job, index, seconds, status, tb, payload)

    def _encode_error(self, error: BaseException) -> tuple[Payload, str]:
        if isinstance(error, DecodeError) and error.__cause__ is None:
            error.__cause__ = self._group_error
        return encode_error(self._codec, error)

    def _finish(self, started: float) -> float:
        """A task is done, but for its answer; returns when."""
        if os.getpid() != self._pid:
            os._exit(1)  # the task forked and its child returned here; the reply is its parent's to give
        marks, finished = self._marks, monotonic()
        # Before the reply: who has the result can ask for these numbers. One writer, so this need not be atomic.
        self._replies.outbox.transferred[0] += marks.decoded - started + finished - marks.ran
        return finished

    def _call(self, job: int, received: Received | bytes) -> Any:
        known = self._jobs.get(job)
        call = apply_call if known is None else known.call
        return call(self._codec, received, self._marks)

    # Replying ------------------------------------------------------------------------------------------------------

    def _reply_failed_initializer(self, error: BaseException) -> None:
        payload, tb = encode_error(self._codec, error)
        text = tb.encode(errors="backslashreplace")
        self._replies.reply(Kind.INITIALIZER_FAILED, wire.pack_count(len(text)) + text, payload)

    def _drop_recalled(self) -> None:
        count = 0
        while self._tasks:
            task = self._tasks.popleft()
            if isinstance(task, Span):
                count += task.left
                continue
            count += 1
            if not isinstance(task[2], bytes):
                task[2].discard()
        self._replies.send(Kind.SETTLED, wire.pack_count(count))

    def _wait_for_memory(self, seconds: float) -> bool:
        """Tell the parent that memory is short and read what it gives back meanwhile.

        Returns:
            False when the parent says that none can come back.
        """
        if os.getpid() != self._pid or threading.get_ident() != self._thread:
            return False  # only the thread that reads the channel can wait for what comes through it
        if not self._replies.starving:
            self._hopeless = False
            self._replies.starve()
        else:
            self._replies.flush_give_backs()
        if self._patience.wait_for(seconds):
            for frame in self._channel.receive():
                self._handle(frame)
        return not self._hopeless
