"""Seeds of random numbers: of a worker, and of a task, so that its numbers depend on the task alone.

The seed of a task is a hash of the pool's seed, the number of the call in the pool and the place of the item in the
call: no state, so it is the same whatever the workers, the chunks, the order or the retries (the idea of numpy's
``SeedSequence.spawn``, without its spawning order).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch

SEED_NBYTES = 32


def seed_task(seed: int, call: int, index: int) -> None:
    """Seed ``random``, ``torch`` and, where it is loaded (torch loads it where it is installed), ``numpy``."""
    digest = blake2b(f"{seed}/{call}/{index}".encode(), digest_size=SEED_NBYTES).digest()
    words = [int.from_bytes(digest[start : start + 4], "little") for start in range(0, SEED_NBYTES, 4)]
    random.seed(digest)
    _seed_libraries(int.from_bytes(digest[:8], "little") >> 1, words)


def seed_worker(seed: int) -> None:
    """Seed the same with one number of 64 bits, as ``get_worker_info().seed`` says."""
    random.seed(seed)
    _seed_libraries(seed, seed % 2**32)


def load_generators() -> None:
    """In a process that is to fork workers: what the first seeding loads, 10 ms and 1,300 pages.

    numpy loads ``numpy.random``, and torch for a GPU reads the sources of all of its callers, to tell them if the
    seeding fails once there is a context. Somebody else's device might be opened, so that is left to the workers.
    """
    if not _has_custom_device():
        _seed_libraries(0, 0)


def _seed_libraries(torch_seed: int, numpy_seed: int | list[int]) -> None:
    if _has_other_devices():
        torch.manual_seed(torch_seed)
    else:
        # All that this build has, and 1.4 us instead of 140: torch.manual_seed looks for each kind of device (2.13).
        torch.default_generator.manual_seed(torch_seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(numpy_seed)


def _has_other_devices() -> bool:
    """Whether torch may have generators beside the CPU's."""
    return any(getattr(torch.version, name, None) for name in ("cuda", "hip", "xpu")) or _has_custom_device()


def _has_custom_device() -> bool:
    """Whether a device is registered that is none of torch's own; as ``torch.manual_seed`` looks for it (2.13)."""
    return hasattr(torch, torch._C._get_privateuse1_backend_name())


class SeededCall:
    """A function that is called once; travels in its place.

    Args:
        function: the user's.
        seed: the pool's.
        call: the number of the call in the pool.
    """

    def __init__(self, function: Callable[..., Any], seed: int, call: int) -> None:
        self._function = function
        self._seed = seed
        self._call = call

    def __call__(self, *args: Any, **kwds: Any) -> Any:
        """Seed, and call the user's function."""
        seed_task(self._seed, self._call, 0)
        return self._function(*args, **kwds)


class SeededItems(SeededCall):
    """A function that is called on many items; it is given (place in the input, item)."""

    def __call__(self, *args: Any, **kwds: Any) -> Any:
        """Seed, and call the user's function on the item."""
        ((index, item),) = args
        seed_task(self._seed, self._call, index)
        return self._function(item)
