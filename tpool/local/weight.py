"""How much memory a worker keeps for itself, on the CPU and on GPUs: whether it is time for a fresh one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["Weight", "cuda_nbytes", "private_nbytes", "weigh"]

_PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")


def weigh(max_nbytes: int | None, max_cuda_nbytes: int | None) -> Callable[[], str] | None:
    """What is asked after each task: the reason to leave, in words, or nothing.

    Args:
        max_nbytes: of private memory; None for any amount.
        max_cuda_nbytes: of memory on GPUs; None for any amount.

    Returns:
        None where there is nothing to ask.
    """
    weight = None if max_nbytes is None else Weight(max_nbytes)

    def ask() -> str:
        excess = None if weight is None else weight.excess()
        if excess is not None:
            return f"its private memory of {excess / 1e6:.0f} MB was too much"
        if max_cuda_nbytes is not None and (nbytes := cuda_nbytes()) > max_cuda_nbytes:
            return f"its CUDA memory of {nbytes / 1e6:.0f} MB was too much"
        return ""

    return None if weight is None and max_cuda_nbytes is None else ask


def cuda_nbytes() -> int:
    """What torch's caching allocator has reserved for this process on all GPUs, in use or not.

    Not in it: the CUDA context, what libraries allocate by themselves, memory that came from other processes.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    return sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))


class Weight:
    """Looks at this process's private memory after each task.

    Private is anonymous memory; of pages that are still shared with the process that forked this one, its part.
    Shared memory of the pool is none of it, whoever maps it. What is exact takes a millisecond per gigabyte, so a
    bound that takes two microseconds is looked at first: anonymous memory, whoever shares it.

    Args:
        limit_nbytes: above this it is too much.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self._limit = limit_nbytes
        self._harmless_nbytes = limit_nbytes  # so much anonymous memory at least there is when the limit is reached
        self._statm_fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def excess(self) -> int | None:
        """How much private memory there is, if that is above the limit."""
        fields = os.pread(self._statm_fd, 128, 0).split()
        anonymous = (int(fields[1]) - int(fields[2])) * _PAGE_NBYTES
        if anonymous <= self._harmless_nbytes:
            return None
        private = private_nbytes()
        if private is None:
            private = anonymous
        if private > self._limit:
            return private
        self._harmless_nbytes = anonymous + self._limit - private
        return None


def private_nbytes() -> int | None:
    """This process's private memory; None where the kernel does not tell (before Linux 5.4)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/self/smaps_rollup").read_text()
        return int(text.partition("Pss_Anon:")[2].split()[0]) * 1024
    return None
