"""Preprocessing streams into a training loop: a DataLoader and a pool do the same work, side by side.

1,797 handwritten digits that ship inside scikit-learn are turned, shifted and blurred anew in each epoch, by two
workers, while this process trains a small convolutional network on what comes. With the pool, the loader is one line:
``pool.imap(prepare, batches)``. It draws no more batches than keep the workers busy, and ``seed=`` makes the
augmentation the same in each run, whatever the number of workers.

    python examples/stream_into_training.py [processes]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset

import tpool

SIDE = 32  # pixels
BATCH = 64
EPOCHS = 3
TEST = 360  # digits that are not trained on

digits = load_digits()
IMAGES = torch.from_numpy(digits.images / 16).float()  # (1797, 8, 8), from 0 to 1
LABELS = torch.from_numpy(digits.target)


def prepare(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Load a batch of digits, each turned, shifted, scaled and blurred at random: (n, 1, SIDE, SIDE) and labels."""
    images = IMAGES[indices][:, None]
    n = len(indices)
    angle, scale = 0.25 * torch.randn(n), 1 + 0.1 * torch.randn(n)
    turn = torch.stack([angle.cos() * scale, -angle.sin(), angle.sin(), angle.cos() * scale], dim=1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn, 0.1 * torch.randn(n, 2, 1)], dim=2), [n, 1, SIDE, SIDE], align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    for _ in range(4):  # costs about as much as the decoding of a photograph
        images = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    return (images - images.mean()) / images.std(), LABELS[indices]


class Prepared(Dataset):
    """What a DataLoader wants in the place of a function: one "sample" is a batch here, as in the pool."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return prepare(self.batches[number])


def draw_batches() -> Iterator[torch.Tensor]:
    """Which digits are in each batch, for all epochs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        yield from torch.randperm(len(IMAGES) - TEST, generator=generator).split(BATCH)


def train(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.nn.Module:
    """Train a network on batches as they come."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 5, stride=2), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 5, stride=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(32 * 5 * 5, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@torch.inference_mode()
def accuracy(model: torch.nn.Module) -> float:
    """The share of unseen digits that it tells right, upright and where they belong."""
    images = F.interpolate(IMAGES[-TEST:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    for _ in range(4):
        images = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), 5, stride=1)
    images = (images - images.mean()) / images.std()
    return (model(images).argmax(1) == LABELS[-TEST:]).float().mean().item()


def report(name: str, model: torch.nn.Module, start: float) -> None:
    """Print one line of the table."""
    seconds = time.perf_counter() - start
    print(f"{name:<34} {seconds:6.2f} s   accuracy {accuracy(model):.3f}", flush=True)


def main(processes: int) -> None:
    """Train three times."""
    torch.set_num_threads(1)  # the other cores are the workers'
    batches = list(draw_batches())
    print(f"{EPOCHS} epochs, {len(batches)} batches of {BATCH}, {processes} workers")

    start = time.perf_counter()
    torch.manual_seed(1)
    prepared = [prepare(batch) for batch in batches]
    report("prepared first, in this process", train(prepared), start)

    start = time.perf_counter()
    # batch_size=None: a sample is a batch already. "fork", because other workers would need a __main__ guard here.
    loader = DataLoader(Prepared(batches), None, num_workers=processes, multiprocessing_context="fork")
    report("DataLoader, with its start", train(loader), start)

    start = time.perf_counter()
    with tpool.Pool(processes, seed=0) as pool:
        model = train(pool.imap(prepare, batches))
        report("pool.imap, with its start", model, start)
        start = time.perf_counter()
        again = train(pool.imap(prepare, batches))
        report("pool.imap, once more", again, start)
        moved = pool.stats().moved_nbytes
    print(f"{moved / 1e6:.1f} MB came by handle")


main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
