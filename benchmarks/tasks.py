"""What the workers run. Every pool imports these by name; none needs to send the code.

Tensors that a task makes are allocated and stamped, not filled: writing 16 MB would cost more than moving it, and the
cases measure the move. The stamp (the first KiB) is what the caller verifies.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import torch

_STAMP = 256  # elements of four bytes


def tensor(nbytes: int) -> torch.Tensor:
    """A new float32 tensor of this size, stamped with ones."""
    made = torch.empty(nbytes // 4)
    made[:_STAMP].fill_(1.0)
    return made


def stamped(made: torch.Tensor) -> bool:
    """Whether the stamp arrived."""
    return bool((made[:_STAMP] == 1.0).all())


def begun(made: torch.Tensor) -> bool:
    """Whether its first number arrived; a fifth of the work that `stamped` is."""
    return made[0].item() == 1.0


def noop(_item: object) -> None:
    """Nothing."""


def take(argument: torch.Tensor) -> int:
    """Receive a tensor, look at its size alone."""
    return argument.numel()


def take_verified(argument: torch.Tensor) -> int:
    """Receive a tensor; its size if the stamp arrived, else -1."""
    return argument.numel() if stamped(argument) else -1


def exchange(argument: torch.Tensor) -> torch.Tensor:
    """Receive a tensor, return a new one of the same size."""
    made = torch.empty_like(argument)
    made[:_STAMP].copy_(argument[:_STAMP])
    return made


def invert(batch: torch.Tensor) -> torch.Tensor:
    """A new batch, each byte inverted: a light augmentation, and real work on every byte."""
    return torch.bitwise_not(batch)


def tensor_dict(count: int) -> dict[str, torch.Tensor]:
    """A dict of `count` tensors of 1 KB."""
    return {f"field{index}": torch.ones(256) for index in range(count)}


def tensor_list(count: int) -> list[torch.Tensor]:
    """A list of `count` scalars-sized tensors (64 bytes each)."""
    return [torch.ones(16) for _ in range(count)]


def exchange_array(argument: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Receive an array, return a new one of the same size."""
    made = np.empty_like(argument)
    made[:_STAMP] = argument[:_STAMP]
    return made


def sleep(seconds: float) -> None:
    """A task that takes time but no CPU."""
    time.sleep(seconds)


def pid_after_tensor(_item: object) -> int:
    """Work a little with torch, so that what a first task touches is touched; say which process did it."""
    (torch.ones(1024) * 2).sum().item()
    time.sleep(0.02)  # so that both workers get some of these
    return os.getpid()


def work(argument: tuple[torch.Tensor, float]) -> int:
    """Receive a tensor and compute for so many seconds of CPU."""
    received, seconds = argument
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return received.numel()
