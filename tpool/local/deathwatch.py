"""Die with the parent while a fresh interpreter is busy importing torch, which takes seconds.

Loaded by path before anything of ``tpool`` is imported, so it needs the standard library only. A thread, since the
kernel's signal for the parent's death would come when the parent's *thread* ends that started us.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


def watch(parent_pid: int) -> Callable[[], None]:
    """Exit as soon as ``parent_pid`` is gone; returns what ends the watch, and its thread, again."""
    done_reader, done_writer = os.pipe()
    try:
        parent_pidfd = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        os._exit(1)

    def run() -> None:
        poll = select.poll()
        for fd in (done_reader, parent_pidfd):
            poll.register(fd, select.POLLIN)
        if any(fd == parent_pidfd for fd, _ in poll.poll()):
            os._exit(1)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def end() -> None:
        os.close(done_writer)
        thread.join()
        os.close(done_reader)
        os.close(parent_pidfd)

    return end
