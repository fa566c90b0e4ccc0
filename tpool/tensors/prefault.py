"""New pages for a large block, by several threads at once.

To get pages from the kernel takes ten times as long as to copy into pages that are there, and two threads are
faster than one. A copy of 16 MB into new pages took 17 to 19 ms page by page, 14 to 18 where one call had asked for
all, 11 to 14 where a second thread had asked for half (two virtual cores). So before the first copy into a large
block that is not warm its pages are asked for.
"""

from __future__ import annotations

import contextlib
import threading

from tpool.tensors.memfd import PAGE_NBYTES, populate_pages

__all__ = ["PREFAULT_NBYTES", "prefault"]

PREFAULT_NBYTES = 4 << 20
"""A guess: so much new memory takes 4 ms and more. Where a thread costs more than it gains was not measured."""

SHARE_NBYTES = 2 << 20
"""No thread is started for less; half of the above, so that a second one is."""

MAX_THREADS = 4
"""Two were measured, as there were two CPUs; a few more are allowed, but not all of a large machine."""


def prefault(address: int, nbytes: int, threads: int) -> None:
    """Have pages made for a part of a mapping, whose bytes stay as they are. Returns when that is done, or in vain.

    Args:
        address: where it begins.
        nbytes: how many.
        threads: how many CPUs may be kept busy.
    """
    count = max(1, min(threads, MAX_THREADS, nbytes // SHARE_NBYTES))
    share = nbytes // count // PAGE_NBYTES * PAGE_NBYTES
    helpers = [
        threading.Thread(target=populate_pages, args=(address + place * share, share), name="tpool-pages", daemon=True)
        for place in range(1, count)
    ]
    started: list[threading.Thread] = []
    try:
        with contextlib.suppress(RuntimeError):  # no more threads can be had, or the interpreter is ending
            for helper in helpers:
                helper.start()
                started.append(helper)
        populate_pages(address, share)
    finally:  # after an interrupt, too: the block must not go while somebody makes pages for it
        for helper in started:
            helper.join()
