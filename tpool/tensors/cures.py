"""What to do about an object that cannot be pickled: pickle says what failed, and not what to do about it."""

from __future__ import annotations

import re

__all__ = ["add_cure"]

_INHERITED_ONLY = "should only be shared between processes through inheritance"
_UNPICKLABLE = re.compile(r"cannot pickle '([^']+)' (?:object|instances)")
_ELSEWHERE = "it lives in one process: make it in the task, or once for each worker in an initializer"
_CURES = {
    "generator": "send a list of what it gives, or go through it by pool.imap(func, generator)",
    "async_generator": "send a list of what it gives",
    "coroutine": "call asyncio.run(...) in the task and send what it gives",
    "_thread.lock": f"{_ELSEWHERE}; or give a lock of multiprocessing to initargs",
    "_thread.RLock": f"{_ELSEWHERE}; or give a lock of multiprocessing to initargs",
    "_queue.SimpleQueue": f"{_ELSEWHERE}; or give a queue of multiprocessing to initargs",
}


def add_cure(error: BaseException) -> None:
    """Have the text of a pickling error end with the cure, where one is known; the type stays what it is."""
    if len(error.args) != 1 or not isinstance(text := error.args[0], str):
        return
    found = _UNPICKLABLE.fullmatch(text)
    if found:
        error.args = (f"{text}: {_CURES.get(found[1], _ELSEWHERE)}",)
    elif text.endswith(_INHERITED_ONLY):
        error.args = (f"{text}: give it to Pool(initializer=..., initargs=(...,)), and keep it there as a global",)
