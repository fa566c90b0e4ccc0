"""The body of a worker on Ray: take a call's tasks, run them one by one, answer.

    call ─► news (definitions, functions, objects) ─► queue of tasks ─► decode ─► call ─► encode ─► answers

Tasks run in one thread, that of Ray's default concurrency group; ``recall`` and ``stack`` come in another, ``live`` in
a third. What a call brings is begun or recalled under one lock: each task is either started here or taken back.

A call answers when all its tasks have run. If one of them takes long, the answers of those before it would wait with
it; so ``live``, a call that is always pending, returns them early.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import random
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch

from tpool.errors import DecodeError
from tpool.local.calls import JobCalls, Marks, apply_call
from tpool.local.faltering import Faltered
from tpool.local.identity import WorkerInfo, set_worker_info
from tpool.local.lifetime import Lifetime
from tpool.local.outcomes import encode_error, encode_value
from tpool.local.retirement import end_program
from tpool.local.seat import Seat
from tpool.local.weight import weigh
from tpool.local.wire import Mode
from tpool.ray import parcels
from tpool.ray.codec import RayCodec
from tpool.ray.journal import Address, Journal
from tpool.ray.private import PrivateMemory
from tpool.tensors.payload import GroupId, Received

__all__ = ["Answer", "Call", "Hello", "Reply", "TaskRunner"]


@dataclass(slots=True)
class Hello:
    """What a worker is told before anything else.

    Attributes:
        info: see ``WorkerInfo``.
        seat: threads and memory.
        preload: modules to import.
        directory, path, argv: of the caller, where they mean something on this node; None where not to be touched.
        main_attributes: ``__file__`` and the like of the caller's ``__main__``.
        store_nbytes: how much of the object store may be held mapped.
        journal: where to write down what is done; None on another node than the caller's.
    """

    info: WorkerInfo
    seat: Seat
    preload: tuple[str, ...]
    directory: str | None
    path: list[str]
    argv: list[str]
    main_attributes: dict[str, Any]
    store_nbytes: int
    journal: Address | None


@dataclass(slots=True)
class Call:
    """What one call of ``run`` brings.

    Attributes:
        number: counts the calls to this worker from 1.
        news: (kind, id, more) in the order in which they must be heard.
        tasks: (job, index, payload).
    """

    number: int
    news: list[tuple[str, int, Any]] = field(default_factory=list)
    tasks: list[tuple[int, int, parcels.Wired | bytes]] = field(default_factory=list)


# (job, index, how it ended, seconds, traceback, payload): place is where its buffers begin among the reply's.
Answer = tuple[int, int, str, float, str, "parcels.Wired | bytes", int]


@dataclass(slots=True)
class Reply:
    """The answer to one call.

    Attributes:
        answers: of the tasks that ran, in order; without those that were given early.
        number: of the call.
        early: how often answers were given early.
        excess: what memory of the worker's is too much, in words: it runs nothing more; empty if none is.
        transfer_seconds: how long the tasks of the call were decoded and encoded.
        journal: of the first call: whether the worker keeps one.
    """

    answers: list[Answer] = field(default_factory=list)
    number: int = 0
    early: int = 0
    excess: str = ""
    transfer_seconds: float = 0.0
    journal: bool = False


EARLY_SECONDS = 0.01
"""How often it is looked whether a task keeps the answers of others waiting, while calls of several tasks come. More
often: the look takes the interpreter from the tasks. Less often: those answers come later."""


class TaskRunner:
    """One worker's state."""

    def __init__(self) -> None:
        self._codec = RayCodec()
        self._pid = os.getpid()
        self._jobs: dict[int, JobCalls] = {}
        self._lifetime: Lifetime | None = None
        self._excess: Callable[[], str] | None = None
        self._marks = Marks()
        self._leaving = False
        self._group_error: DecodeError | None = None
        self._memory = PrivateMemory(0)
        self._journal: Journal | None = None
        self._lock = threading.Lock()  # guards the next six
        self._reply = Reply()  # of the call that was begun last, and its buffers
        self._buffers: list[Any] = []
        self._begun = 0  # the number of the call that was begun last
        self._left = 0  # its tasks that were not started
        self._recalled = 0  # calls up to this number are not to be begun any more
        self._thread = 0  # in which tasks run
        self._packed = threading.Event()  # a call of several tasks was begun since ``live`` looked

    # The life of a worker -------------------------------------------------------------------------------------------

    def begin(self, hello: Hello, call: Call, refs: Sequence[Any]) -> tuple[Reply, list[Any] | None]:
        """Become a worker, and run the initializer; the reply has an answer if that fails."""
        self._thread = threading.get_ident()
        self._assume(hello)
        self._take_news(call, refs)
        reply = Reply()
        buffers: list[Any] = []
        try:
            ((_, _, payload),) = call.tasks
            loaded: Any = self._codec.loads(self._received(payload, refs))
            function, arguments = loaded
            if isinstance(function, Lifetime):
                self._lifetime, function = function, function.initializer
            if function is not None:
                function(*arguments)
        except BaseException as error:
            outcome, text = encode_error(self._codec, error)
            reply.answers.append(_answer(0, 0, "error", 0.0, outcome, text, buffers))
        reply.journal = self._journal is not None
        return reply, buffers or None

    def _assume(self, hello: Hello) -> None:
        if hello.directory is not None:
            with contextlib.suppress(OSError):  # another machine, perhaps, which has no such directory
                os.chdir(hello.directory)
        sys.path += [entry for entry in hello.path if entry not in sys.path and os.path.exists(entry or ".")]
        sys.argv[:] = hello.argv
        module = types.ModuleType("__main__")
        module.__dict__.update(hello.main_attributes)
        sys.modules["__main__"] = module
        set_worker_info(hello.info)
        hello.seat.take()
        self._excess = weigh(hello.seat.max_memory_nbytes, hello.seat.max_cuda_nbytes)
        self._memory = PrivateMemory(hello.store_nbytes)
        self._journal = None if hello.journal is None else Journal.attach(hello.journal)
        _seed(hello.info.seed)
        for name in hello.preload:
            importlib.import_module(name)

    def retire(self) -> str | None:
        """Run what ends a program; returns what ``worker_exit`` raised."""
        story = None
        if self._lifetime is not None:
            told, self._lifetime = self._lifetime.end(), None
            story = None if told is None else told.decode(errors="replace")
        self._jobs.clear()
        del self._codec
        end_program()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # a task may have closed or replaced it
                stream.flush()
        return story

    # Running --------------------------------------------------------------------------------------------------------

    def run(self, call: Call, refs: Sequence[Any]) -> tuple[Reply, list[Any] | None]:
        """Run the tasks of a call; returns the reply, and the buffers of large results."""
        self._take_news(call, refs)
        with self._lock:
            self._reply, self._buffers = Reply(number=call.number), []
            self._begun = call.number
            self._left = 0 if self._leaving or call.number <= self._recalled else len(call.tasks)
            if self._journal is not None and call.tasks:
                self._journal.begin(call.number)
        if len(call.tasks) > 1:
            self._packed.set()
        tasks = deque(call.tasks)
        call.tasks.clear()
        while tasks:
            with self._lock:
                if not self._left:
                    break
                self._left -= 1
                if self._journal is not None:
                    self._journal.start()
            job, index, payload = tasks.popleft()
            self._run_task(job, index, payload, refs)
            if self._excess is not None and (excess := self._excess()):
                self._leaving, self._reply.excess = True, excess
                break
        with self._lock:
            buffers, self._buffers = self._buffers, []
            reply, self._reply = self._reply, Reply()
            return reply, buffers or None

    def _run_task(self, job: int, index: int, payload: Any, refs: Sequence[Any]) -> None:
        marks = self._marks
        started = marks.decoded = marks.ran = monotonic()
        text, status = "", "value"
        try:
            outcome = encode_value(self._codec, [self._call(job, payload, refs)], marks)
        except BaseException as error:
            marks.fail(started)
            status = "error"
            if type(error) is Faltered:
                error, status = error.error, "faltered"
            if isinstance(error, DecodeError) and error.__cause__ is None:
                error.__cause__ = self._group_error
            outcome, text = encode_error(self._codec, error)
        if os.getpid() != self._pid:
            os._exit(1)  # the task forked and its child returned here; the answer is its parent's to give
        seconds = monotonic() - started
        if self._journal is not None:
            plain = status == "value" and isinstance(outcome, bytes)
            self._journal.finish(job, index, seconds, outcome if plain else None)  # type: ignore[arg-type]
        with self._lock:
            self._reply.answers.append(_answer(job, index, status, seconds, outcome, text, self._buffers))
            self._reply.transfer_seconds += seconds - (marks.ran - marks.decoded)

    def _call(self, job: int, payload: Any, refs: Sequence[Any]) -> Any:
        received = payload if isinstance(payload, bytes) else self._received(payload, refs)
        known = self._jobs.get(job)
        if known is None:
            return apply_call(self._codec, received, self._marks)
        return known.call(self._codec, received, self._marks)

    def _received(self, payload: Any, refs: Sequence[Any]) -> Received:
        if isinstance(payload, bytes):
            return Received(payload)
        stream, inline, place = payload
        return parcels.unpack(stream, inline if place < 0 else refs[place], self._memory.view)

    # News -----------------------------------------------------------------------------------------------------------

    def _take_news(self, call: Call, refs: Sequence[Any]) -> None:
        for kind, id, more in call.news:
            self._NEWS[kind](self, id, more, refs)

    def _take_group(self, id: int, payload: Any, refs: Sequence[Any]) -> None:
        try:
            self._codec.load_group(GroupId(id), self._received(payload, refs))
        except DecodeError as error:
            self._group_error = error  # tasks that need what it held will fail, and should say why

    def _take_job(self, id: int, more: Any, refs: Sequence[Any]) -> None:
        mode, payload = more
        self._jobs[id] = JobCalls(Mode(mode), self._received(payload, refs))

    def _take_object(self, id: int, payload: Any, refs: Sequence[Any]) -> None:
        self._codec.keeper.add(id, self._received(payload, refs))

    def _forget_job(self, id: int, more: Any, refs: Sequence[Any]) -> None:
        self._jobs.pop(id, None)

    def _drop_object(self, id: int, more: Any, refs: Sequence[Any]) -> None:
        self._codec.keeper.drop(id)

    _NEWS: dict[str, Callable[..., None]] = {  # noqa: RUF012 - never changed
        "group": _take_group,
        "job": _take_job,
        "object": _take_object,
        "forget": _forget_job,
        "drop": _drop_object,
    }

    # In another thread ----------------------------------------------------------------------------------------------

    def recall(self, number: int) -> tuple[int, int]:
        """Start nothing more of the calls up to this one.

        Returns:
            The number of the call that was begun last, and how many of its tasks are thereby given back.
        """
        with self._lock:
            self._recalled = max(self._recalled, number)
            left, self._left = self._left, 0
            return self._begun, left

    def live(self) -> tuple[Reply, list[Any] | None]:
        """Wait until a task keeps finished ones of its call waiting; returns what those came to."""
        while True:
            self._packed.wait()
            self._packed.clear()
            seen = None
            while seen != (seen := self._progress()):
                time.sleep(EARLY_SECONDS)
            with self._lock:
                reply = self._reply
                if not reply.answers or self._progress() != seen:
                    if self._left:
                        self._packed.set()  # the call goes on: look again
                    continue
                early = Reply(reply.answers, reply.number)
                reply.answers, reply.early = [], reply.early + 1
                buffers, self._buffers = self._buffers, []
                self._packed.set()  # there may be more to come
                return early, buffers or None

    def _progress(self) -> tuple[int, int]:
        return self._reply.number, self._left

    def stack(self) -> str:
        """Where the thread that runs tasks is."""
        frame = sys._current_frames().get(self._thread)
        return "" if frame is None else "".join(traceback.format_stack(frame))


def _answer(job: int, index: int, status: str, seconds: float, outcome: Any, text: str, buffers: list[Any]) -> Answer:
    if isinstance(outcome, bytes):
        return job, index, status, seconds, text, outcome, 0
    stream, views = parcels.buffers_of(outcome)
    if sum([view.nbytes for view in views]) <= parcels.INLINE_NBYTES:
        return job, index, status, seconds, text, (stream, tuple(map(bytes, views)), -1), 0
    place = len(buffers)
    buffers.extend(map(pickle.PickleBuffer, views))
    return job, index, status, seconds, text, (stream, (), place), len(views)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
