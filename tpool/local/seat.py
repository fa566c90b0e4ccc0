"""What the user gives each worker: threads, CPUs, a device, and how much memory it may keep."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from tpool.local.cpus import available_cpus

__all__ = ["Seat", "Steering"]

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


@dataclass(frozen=True, slots=True)
class Seat:
    """What one worker is given; travels with its first message.

    Attributes:
        threads: intra-op threads of torch.
        all_libraries: these threads were asked for, also for the OpenMP and BLAS libraries that are loaded already.
        cpus: that it may run on; None for all that the caller may.
        device: where torch makes tensors if not told otherwise; None for the CPU.
        max_memory_nbytes: of private memory, above which it is replaced; None for any amount.
        max_cuda_nbytes: likewise of what torch's allocator has reserved on GPUs.
    """

    threads: int
    all_libraries: bool = False
    cpus: frozenset[int] | None = None
    device: str | None = None
    max_memory_nbytes: int | None = None
    max_cuda_nbytes: int | None = None

    def take(self) -> None:
        """Become a worker that has it; called once, after the environment has been set."""
        if self.cpus is not None:
            os.sched_setaffinity(0, self.cpus)
        torch.set_num_threads(self.threads)
        if self.all_libraries:
            self._limit_libraries()
        else:
            for name in THREAD_VARIABLES:  # else each worker's numpy or scipy would start a thread for each CPU
                os.environ.setdefault(name, str(self.threads))
        if self.device is not None:
            device = torch.device(self.device)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            torch.set_default_device(device)

    def _limit_libraries(self) -> None:
        """By their variables where they are loaded later, and by threadpoolctl, if there is one, where they are."""
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(self.threads)))
        try:
            import threadpoolctl
        except ImportError:
            return
        threadpoolctl.threadpool_limits(self.threads)


@dataclass(frozen=True, slots=True)
class Steering:
    """What the user asked for, validated.

    Attributes:
        threads: for each worker; None for its share of the CPUs.
        cpus: dealt out to the workers in turn; empty for no affinity.
        devices: likewise; empty for none.
        max_memory_nbytes, max_cuda_nbytes: see ``Seat``.
    """

    threads: int | None = None
    cpus: tuple[frozenset[int], ...] = ()
    devices: tuple[str, ...] = ()
    max_memory_nbytes: int | None = None
    max_cuda_nbytes: int | None = None
    available: int = field(default_factory=available_cpus)

    def seat(self, slot: int, processes: int, method: str) -> Seat:
        """What the worker of this slot is given."""
        cpus = self.cpus[slot % len(self.cpus)] if self.cpus else None
        threads = self.threads
        if threads is None:
            # After an OpenMP region in the parent, a forked child that starts a second thread hangs.
            threads = 1 if method == "fork" else max(1, self.available // processes)
        device = self.devices[slot % len(self.devices)] if self.devices else None
        return Seat(threads, self.threads is not None, cpus, device, self.max_memory_nbytes, self.max_cuda_nbytes)
