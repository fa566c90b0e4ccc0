"""All drivers of a run: started when needed, one per pool, and which of them have a pool open."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.case import WORKERS
from benchmarks.remote import DriverFailed, Remote

# Starting Ray, or two interpreters that import torch on a busy machine, takes tens of seconds.
_HELLO_SECONDS = 60.0
_OPEN_SECONDS = 60.0
_CLOSE_SECONDS = 20.0


class Fleet:
    """The drivers.

    Args:
        names: pools.
        out: folder for the drivers' logs.

    Attributes:
        pools: what each driver said about its pool, or ``{"skipped": reason}``.
    """

    def __init__(self, names: Sequence[str], out: Path) -> None:
        self._names = names
        self._out = out
        self._drivers: dict[str, Remote] = {}
        self._open: set[str] = set()
        self.pools: dict[str, dict[str, Any]] = {}

    def greet(self) -> None:
        """Start each driver, to learn which pools are there and what they can do."""
        with ThreadPoolExecutor(2) as two_at_a_time:  # each imports torch, which keeps a core busy for seconds
            self.pools = dict(zip(self._names, two_at_a_time.map(self._greet_one, self._names), strict=True))

    def _greet_one(self, name: str) -> dict[str, Any]:
        try:
            return self._start(name)
        except DriverFailed as failure:
            return {"title": name, "skipped": str(failure)}

    def _start(self, name: str) -> dict[str, Any]:
        driver = Remote(name, self._out / f"{name}.log")
        answer = driver.ask("hello", _HELLO_SECONDS)
        self._drivers[name] = driver
        return answer

    def driver(self, name: str) -> Remote:
        """The driver of this pool, started if it has none (any more)."""
        if name not in self._drivers:
            self._start(name)
        return self._drivers[name]

    def open(self, name: str, workers: int = WORKERS) -> None:
        """See that the pool is open."""
        if name not in self._open:
            self.driver(name).ask("open", _OPEN_SECONDS, workers=workers)
            self._open.add(name)

    def close(self, name: str) -> None:
        """See that the pool is closed; the driver stays."""
        if name in self._open:
            self._open.discard(name)
            self.driver(name).ask("close", _CLOSE_SECONDS)

    def restart(self, name: str) -> None:
        """A new process for this pool."""
        self._open.discard(name)
        if name in self._drivers:
            self._drivers.pop(name).stop(_CLOSE_SECONDS)
        self._start(name)

    def forget(self, name: str) -> None:
        """The driver has failed and been killed; the next use starts another."""
        self._open.discard(name)
        self._drivers.pop(name, None)

    def stop(self) -> None:
        """End all drivers, all at once: most of the time of closing a pool is waiting."""
        drivers = list(self._drivers.values())
        self._drivers.clear()
        self._open.clear()
        with ThreadPoolExecutor(max(1, len(drivers))) as together:
            list(together.map(lambda driver: driver.stop(_CLOSE_SECONDS), drivers))
