"""The end of a worker that was let go: destructors run, as they would at the end of a program."""

from __future__ import annotations

import gc
import multiprocessing.util
import threading

__all__ = ["end_program"]

# Non-daemonic threads that a task left behind get this long to end at retirement. Longer would let one task hang the
# pool's end; shorter would cut off a thread that is about to flush a file.
LINGERING_THREADS_SECONDS = 4.0


def end_program() -> None:
    """Collect garbage, run the finalizers of ``multiprocessing``, and wait for threads."""
    gc.collect()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]
    ours = (threading.current_thread(), threading.main_thread())  # on Ray, tasks run beside the main thread
    for thread in threading.enumerate():
        if thread not in ours and not thread.daemon:
            thread.join(LINGERING_THREADS_SECONDS)
