"""What a worker process is told when it starts, and how it becomes the process that its tasks expect to run in.

A worker may come from the zygote, from a fork of the caller, or from a fresh interpreter. After ``assume`` the three
are the same: the caller's environment, working directory and ``sys.path`` (of the moment the pool was made), the
name and parent that ``multiprocessing`` shows, signals, standard input, threads and seeds.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.process
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import sys
import types
from dataclasses import dataclass, field
from typing import Any

from tpool.local.logs import install_sender
from tpool.local.seat import Seat
from tpool.local.seeding import seed_worker
from tpool.tensors.storages import Sharing


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What ``tpool.get_worker_info()`` gives inside a worker.

    Attributes:
        id: the worker's slot in the pool, from 0; a replacement keeps the number.
        num_workers: how many workers the pool was to have when this one was started.
        seed: what ``torch``, ``random`` and ``numpy`` were seeded with in this process.
        device: the one of the pool's ``devices`` that is its own, as text; None where there are none.
        state: a place for whatever the initializer and the tasks of this worker want to keep, as attributes.
    """

    id: int
    num_workers: int
    seed: int
    device: str | None = None
    state: types.SimpleNamespace = field(default_factory=types.SimpleNamespace, compare=False, repr=False)


@dataclass(slots=True)
class Hello:
    """The first message to a worker.

    Attributes:
        method: ``fork``, ``spawn`` or ``forkserver``; which ``multiprocessing`` class the process shows itself as.
        number: counts the workers of a pool from 1; part of the process name.
        info: see ``WorkerInfo``.
        parent_pid: the process that owns the pool.
        parent_name: its ``multiprocessing`` name.
        authkey: its ``multiprocessing`` authentication key, which managers' proxies need.
        environment: its environment variables; None where the worker inherited them.
        directory: its working directory; None where inherited, or where it no longer existed.
        path: its ``sys.path``; None where inherited.
        argv: its ``sys.argv``; None where inherited.
        main_attributes: ``__file__`` and the like of its ``__main__``; None where ``__main__`` was inherited.
        seat: what the user gives it.
        slot_arena, caller_arena: ids of the arenas whose descriptors come with this message.
        ledger_index: the slot's counter in the pool's ledger.
        live_blocks: (offset, nbytes) in the slot's arena that an earlier worker left in use.
        has_tracker: whether the caller's resource tracker's descriptor comes with this message.
        log_level: of the least log records to send; None for none, else their socket comes last with this message.
        outbox_index: which of the outboxes whose descriptor comes with this message is the slot's.
        traced: whether the descriptor of its trace comes with this message, last of all.
        sharing: ``share`` or ``copy``.
        can_swap: see ``Codec``; the caller's, so that both sides do the same.
    """

    method: str
    number: int
    info: WorkerInfo
    parent_pid: int
    parent_name: str
    authkey: bytes
    environment: dict[str, str] | None
    directory: str | None
    path: list[str] | None
    argv: list[str] | None
    main_attributes: dict[str, Any] | None
    seat: Seat
    slot_arena: int
    caller_arena: int
    ledger_index: int
    live_blocks: list[tuple[int, int]]
    has_tracker: bool
    log_level: int | None
    outbox_index: int
    traced: bool
    sharing: Sharing
    can_swap: bool


def assume(hello: Hello, fds: list[int]) -> None:
    """Become the process that ``hello`` describes; called once, before any of the user's code.

    Args:
        hello: see there.
        fds: the descriptors that not every worker gets: the tracker's, and that of the log records.
    """
    if hello.environment is not None:
        os.environ.clear()
        os.environ.update(hello.environment)
    if hello.directory is not None:
        # The directory may be gone by now; the worker then stays where it is, as a shell would.
        with contextlib.suppress(OSError):
            os.chdir(hello.directory)
    if hello.path is not None:
        sys.path[:] = hello.path
    if hello.argv is not None:
        sys.argv[:] = hello.argv
    if hello.main_attributes is not None:
        _install_main(hello.main_attributes)
    if hello.has_tracker:
        # One tracker for the family: a tracker of the worker's own would unlink the caller's shared memory at its
        # exit (cpython#82300).
        multiprocessing.resource_tracker._resource_tracker._fd = fds[0]  # type: ignore[attr-defined]
    _become_process(hello)
    if hello.log_level is not None:
        install_sender(fds[-1], hello.log_level, hello.info.id)
    hello.seat.take()
    seed_worker(hello.info.seed)


def _install_main(attributes: dict[str, Any]) -> None:
    """A fresh ``__main__`` for the functions that travel by value: one namespace for all of them."""
    module = types.ModuleType("__main__")
    module.__dict__.update(attributes)
    sys.modules["__main__"] = module


def _become_process(hello: Hello) -> None:
    """Set ``multiprocessing``'s idea of the current and the parent process, as its own bootstrap does.

    A fork inherits the caller's children and finalizers; they are not ours to join or to run.
    """
    process = multiprocessing.process
    process._children = set()  # type: ignore[attr-defined]
    process._process_counter = itertools.count(1)  # type: ignore[attr-defined]
    multiprocessing.util._finalizer_registry.clear()  # type: ignore[attr-defined]
    multiprocessing.util._run_after_forkers()  # type: ignore[attr-defined]
    context: Any = multiprocessing.get_context(hello.method)
    current = context.Process()
    current._identity = (hello.number,)
    current.name = f"{context.Process.__name__.replace('Process', 'PoolWorker')}-{hello.number}"
    current._parent_pid = hello.parent_pid
    current._config = {"authkey": process.AuthenticationString(hello.authkey), "semprefix": "/mp"}  # type: ignore[attr-defined]
    process._current_process = current  # type: ignore[attr-defined]
    try:
        sentinel: int | None = os.pidfd_open(hello.parent_pid)
    except OSError:  # the parent is gone; we are about to be killed
        sentinel = None
    process._parent_process = process._ParentProcess(  # type: ignore[attr-defined]
        hello.parent_name, hello.parent_pid, sentinel
    )


def settle_in() -> None:
    """Make the process a worker in the system's eyes: signals, process group, standard input.

    SIGINT is the caller's: Ctrl-C must give one traceback. A process group of its own lets a worker be killed
    together with the children that its tasks started.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    with contextlib.suppress(PermissionError):  # a session leader already has a group of its own
        os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    with contextlib.suppress(OSError, ValueError):  # no usable standard input to replace
        if sys.stdin is not None:
            sys.stdin.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it lives as long as the process


_info: WorkerInfo | None = None


def set_worker_info(info: WorkerInfo | None) -> None:
    """Say which worker this process is; written once, by the worker's body, before any task runs."""
    global _info
    _info = info


def get_worker_info() -> WorkerInfo | None:
    """The worker that this process is, or None outside of tpool's workers, in the caller for one.

    >>> with tpool.Pool(2) as pool:
    ...     pool.apply(tpool.get_worker_info).num_workers, tpool.get_worker_info()
    (2, None)

    May be called from any thread; the answer never changes while the worker lives.
    """
    return _info
