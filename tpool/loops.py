"""Waking a coroutine from another thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from typing import Any


class Bell:
    """Rung once, by any thread; waited for by one coroutine, the one that made it.

    Raises:
        RuntimeError: no ``asyncio`` loop is running in this thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung: asyncio.Future[None] = self._loop.create_future()

    def ring(self) -> None:
        """Wake the coroutine. Runs no user code, so the handler's thread may call it."""
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits in it any more
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if not self._rung.done():  # it may have been cancelled
            self._rung.set_result(None)

    def __await__(self) -> Generator[Any, None, None]:
        return self._rung.__await__()
