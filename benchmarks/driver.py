"""The process that uses one pool: answers requests of the runner, one line of JSON for one line of JSON.

Requests::

    {"op": "hello"}                                      the pool's title, version, features; or an error
    {"op": "open", "workers": 2}                         opens the pool that lives from round to round
    {"op": "round", "case": …, "params": {…}, "warm_up": false}
    {"op": "close"}                                      closes that pool

Every answer is a dict; one with the key ``error`` ends this driver's use: the runner kills it with all below it, since
nobody can tell what state a failed pool is in.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks.case import WORKERS, Bench
from benchmarks.meter import Meter
from benchmarks.peers.base import Handle, Peer

_PR_SET_CHILD_SUBREAPER = 36


class Driver:
    """One peer, and the pool of it that is open."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._peer: Peer | None = None
        self._pool: Handle | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, object]:
        """Do what was asked; errors become part of the answer."""
        operations: dict[str, Callable[..., dict[str, object]]] = {
            "hello": self._hello,
            "open": self._open,
            "round": self._round,
            "close": self._close,
        }
        try:
            return operations[request.pop("op")](**request)
        except Exception as error:
            traceback.print_exc()  # into the driver's log
            return {"error": f"{type(error).__name__}: {error}"}

    def _hello(self) -> dict[str, object]:
        import torch

        from benchmarks.peers import PEERS

        # One thread each in caller and workers, for every pool alike: two workers are two busy processes.
        torch.set_num_threads(1)
        self._peer = peer = PEERS[self._name]()
        return {
            "title": peer.title,
            "version": peer.version(),
            "note": peer.note,
            "features": sorted(peer.features),
            "cases": peer.cases,
        }

    def _open(self, workers: int = WORKERS) -> dict[str, object]:
        assert self._peer is not None
        self._pool = self._peer.open(workers)
        return {}

    def _close(self) -> dict[str, object]:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        gc.collect()
        return {}

    def _round(self, case: str, params: dict[str, Any], warm_up: bool) -> dict[str, object]:
        from benchmarks.cases import CASES

        assert self._peer is not None
        meter = Meter(warm_up)
        # What a round made is dropped as it returns; its garbage is collected before the next time is taken (Meter).
        CASES[case].run(Bench(self._peer, self._pool, params, meter))
        return meter.report()


def _prepare_process() -> None:
    # Daemons that a pool starts stay below us, so that their CPU time counts and they can be ended.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # torch's pool spends descriptors by the tensor; the usual soft limit of 1024 would end it early.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """``python -m benchmarks.driver <pool> <descriptor of a stream socket>``."""
    name, fd = sys.argv[1:]
    os.set_inheritable(int(fd), False)
    _prepare_process()
    driver = Driver(name)
    with socket.socket(fileno=int(fd)) as control, control.makefile("rw") as lines:
        for line in lines:
            lines.write(json.dumps(driver.answer(json.loads(line))) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
