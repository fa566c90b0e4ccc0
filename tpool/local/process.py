"""A process from the moment it is to be a worker until it is gone."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from tpool.local import identity
from tpool.local.worker import Initializer, Worker

__all__ = ["Inheritance", "worker_main"]


@dataclass(slots=True)
class Inheritance:
    """What a forked worker has without being sent it.

    Attributes:
        initializer: (function, arguments), as the caller gave them.
        baseline: what ``__main__`` held when the pool was made.
    """

    initializer: Initializer
    baseline: dict[str, Any]


def worker_main(sock_fd: int, claims_fd: int, inherited: Inheritance | None = None) -> NoReturn:
    """Be a worker until the pool lets go, then end this process without returning.

    Args:
        sock_fd: the worker's end of the channel.
        claims_fd: the semaphore of claims.
        inherited: what a fork brought along.
    """
    code = 1
    try:
        atexit._clear()  # what a fork inherited is the caller's to run, not ours
        identity.settle_in()
        sock = socket.socket(fileno=sock_fd)
        sock.setblocking(True)
        if inherited is None:
            code = Worker(sock, claims_fd).run()
        else:
            code = Worker(sock, claims_fd, inherited.baseline).run(inherited.initializer)
        atexit._run_exitfuncs()
    except BaseException:
        with contextlib.suppress(Exception):  # a task may have closed or replaced stderr
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # likewise
                stream.flush()
        os._exit(code)
