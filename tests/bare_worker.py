"""A bare worker: receives payloads, calls functions, sends results. No pool, no scheduler, no supervision.

Used by the tests of pickling and definitions in two ways:

- ``Caller`` in a script: ``caller = Caller(); caller.call(f, 1)``.
- ``ScriptServer``: runs many short scripts, each in a process of its own as its ``__main__`` and with a bare worker
  beside it, forked from one process that has imported torch already.

This file is also the program of both.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import traceback
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

from tpool.tensors.arena import Allocator, Arena, Ledger
from tpool.tensors.definitions import Definitions
from tpool.tensors.leases import Block, Memory, Peer, table
from tpool.tensors.payload import Received
from tpool.tensors.pickler import Codec, Payload

ARENA_NBYTES = 1 << 28
SCRIPT_SECONDS = 30


def make_memory(ledger: Ledger | None = None, index: int = 0) -> Memory:
    """Memory of this process's own; allocation fails at once when it is short."""
    arena = Arena.create(ARENA_NBYTES)
    table().add(arena, Allocator(arena, ledger or Ledger.create(1, ARENA_NBYTES), index))
    return Memory(arena, lambda seconds: False)


def received(payload: Payload) -> Received:
    """What another process would have received (blocks are this process's own)."""
    return Received(payload.data, list(payload.blocks), [os.dup(fd) for fd in payload.fds])


class Wire:
    """One end of a connection between two bare processes."""

    def __init__(self, frames: socket.socket, fds: socket.socket) -> None:
        self.connection = Connection(frames.detach())
        self.fds = fds
        self.peer = Peer("the other bare process")

    def send(self, what: Any, payload: Payload) -> None:
        blocks = [*payload.blocks, *([payload.data] if isinstance(payload.data, Block) else [])]
        table().lend(blocks, self.peer)
        data = payload.data if isinstance(payload.data, bytes) else None
        names = [(block.arena.id, block.offset, block.nbytes) for block in blocks]
        gone = table().take_give_backs(self.peer)
        self.connection.send_bytes(pickle.dumps((what, data, names, len(payload.fds), gone)))
        for fd in payload.fds:
            socket.send_fds(self.fds, [b"f"], [fd])

    def receive(self) -> tuple[Any, Received]:
        what, data, names, fds, gone = pickle.loads(self.connection.recv_bytes())
        table().given_back(self.peer, gone)
        blocks = [table().receive(*name, self.peer) for name in names]
        came = [socket.recv_fds(self.fds, 1, 1)[1][0] for _ in range(fds)]
        return what, Received(blocks.pop() if data is None else data, blocks, came)

    def close(self) -> None:
        self.connection.close()
        self.fds.close()


class Caller:
    """The caller's side, with one bare worker that was forked from this process.

    Args:
        main: the worker has a fresh ``__main__``, as under a zygote; False: it inherits ours, as under fork.
    """

    def __init__(self, *, fresh_main: bool = True, sharing: str = "share") -> None:
        ledger = Ledger.create(2, ARENA_NBYTES)
        self.memory = make_memory(ledger)
        theirs = Arena.create(ARENA_NBYTES)
        baseline = None if fresh_main else dict(vars(sys.modules["__main__"]))
        self.definitions = Definitions(baseline)
        frames, fds = socket.socketpair(), socket.socketpair()
        arenas = [(os.dup(arena.fd), arena.id) for arena in (self.memory.arena, theirs)]  # a child has not the fds
        self.pid = os.fork()
        if not self.pid:
            frames[0].close()
            fds[0].close()
            work(Wire(frames[1], fds[1]), arenas, fresh_main, baseline)
        for fd, _ in arenas:
            os.close(fd)
        frames[1].close()
        fds[1].close()
        table().add(theirs)
        self.wire = Wire(frames[0], fds[0])
        self.codec = Codec(self.memory, self.definitions, sharing=sharing)
        self.known: set[Any] = set()
        self.groups_sent: list[Any] = []

    def send(self, payload: Payload) -> None:
        for gid, group in self.definitions.missing(payload.groups, self.known):
            self.groups_sent.append(gid)
            self.wire.send(gid, group)
        self.wire.send("call", payload)

    def answer(self) -> Any:
        failed, result = self.wire.receive()
        value = self.codec.loads(result)
        if failed:
            raise value if isinstance(value, BaseException) else RuntimeError(value)
        return value

    def call(self, function: Any, *args: Any, spawning: bool = False) -> Any:
        """What the function gives in the worker."""
        self.send(self.codec.dumps((function, args), spawning=spawning))
        return self.answer()

    def close(self) -> None:
        self.wire.close()
        os.waitpid(self.pid, 0)


def work(wire: Wire, arenas: list[tuple[int, int]], fresh_main: bool, baseline: dict[str, Any] | None) -> None:
    """The body of a bare worker."""
    status = 1
    try:
        callers, own = (Arena.attach(fd, id) for fd, id in arenas)
        table().add(callers)
        table().add(own, Allocator(own, Ledger.create(1, ARENA_NBYTES), 0))
        if fresh_main:
            sys.modules["__main__"] = types.ModuleType("__main__")
        codec = Codec(Memory(own, lambda seconds: False), baseline=baseline)
        work_on(wire, codec)
        status = 0
    except EOFError:
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def work_on(wire: Wire, codec: Codec) -> None:
    while True:
        what, message = wire.receive()
        try:
            if what != "call":
                codec.load_group(what, message)
                continue
            function, args = codec.loads(message)  # type: ignore[misc]
            result = (False, function(*args))
        except Exception as error:
            if what != "call":  # told with the call that needs it
                print(f"a group failed: {error}", flush=True)
                continue
            result = (True, error)
        try:
            payload = codec.dumps(result[1])
        except Exception as error:
            result, payload = (True, None), codec.dumps(f"cannot pickle the result: {error!r}")
        wire.send(result[0], payload)
        del function, args, result, payload


# Many scripts from one process that has imported torch ---------------------------------------------------------------


class ScriptServer:
    """Runs scripts, each as the ``__main__`` of a process of its own, with ``Caller`` and ``call`` built in."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(self, *cells: str, fork: bool = False) -> str:
        """Run cells of one program, one after the other; gives what it and its worker printed.

        Raises:
            AssertionError: it failed, with its output.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([[textwrap.dedent(cell) for cell in cells], fork]) + "\n")
        self._process.stdin.flush()
        status, output = json.loads(self._process.stdout.readline())
        assert status == 0, f"the script failed (status {status}):\n{output}"
        return str(output)

    def close(self) -> None:
        """Stop it."""
        self._process.communicate()
        assert self._process.returncode == 0


def serve() -> None:
    """The process behind a ``ScriptServer``."""
    for line in sys.stdin:
        cells, fork = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.closerange(3, 256)
            run_cells(cells, fork)
        os.close(writer)
        with open(reader) as output:
            text = output.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([status, text]), flush=True)


def run_cells(cells: list[str], fork: bool) -> None:
    """Run one program and end the process."""
    signal.alarm(SCRIPT_SECONDS)
    status = 1
    try:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__dict__.update(Caller=Caller)
        if not fork:
            caller = Caller()
            main.__dict__.update(caller=caller, call=caller.call)
        for number, cell in enumerate(cells):
            exec(compile(cell, f"<cell {number}>", "exec"), main.__dict__)
        if not fork:
            caller.close()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
