"""A model runs over a table of images in batches: it is sent to each worker once, whatever the number of calls.

A small network is trained on the handwritten digits that ship inside scikit-learn, then describes thousands of shifted
copies of those that it has not seen. ``pool.put`` has each worker keep the model; ``map_batches`` goes through the
images by views of shared memory and has the workers write into one output. A better model then takes its place.

    python examples/batch_inference.py [processes]
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import tpool

TEST = 360  # digits that are not trained on
SHIFTS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
COPIES = 1  # of each shifted digit, with noise of its own
BATCH = 256


class Reader(torch.nn.Module):
    """Tells which digit stands in an image: (n, 1, 8, 8) -> (n, 10) scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(),
            torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(),
            torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(64 * 16, 10),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Score a batch."""
        return self.layers(images)


def shifted(images: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    """The images moved by some pixels; what leaves one side comes in at the other."""
    return images.roll((dy, dx), dims=(-2, -1))


def train(model: Reader, images: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
    """A few steps on images at random places."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        rows = torch.randint(len(images), (128,))
        batch = shifted(images[rows], *SHIFTS[step % len(SHIFTS)])
        optimizer.zero_grad()
        F.cross_entropy(model(batch), labels[rows]).backward()
        optimizer.step()


def main(processes: int) -> None:
    """Train, run in this process, run in the pool, train on, run again."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.from_numpy(digits.images / 16).float()[:, None]
    labels = torch.from_numpy(digits.target)
    many = torch.cat([shifted(images[-TEST:], dy, dx) for dy, dx in SHIFTS * COPIES])
    many += 0.1 * torch.randn(many.shape)
    answers = labels[-TEST:].repeat(len(SHIFTS) * COPIES)
    print(f"{len(many)} images in batches of {BATCH}, {processes} workers", flush=True)

    def report(name: str, scores: torch.Tensor, start: float) -> None:
        seconds = time.perf_counter() - start
        right = (scores.argmax(1) == answers).float().mean().item()
        print(f"{name:<26} {seconds:6.2f} s {len(many) / seconds:8.0f} images/s   accuracy {right:.3f}", flush=True)

    model = Reader()
    train(model, images[:-TEST], labels[:-TEST], steps=40)
    start = time.perf_counter()
    with torch.inference_mode():
        expected = torch.cat([model(batch) for batch in many.split(BATCH)])
    report("this process, one thread", expected, start)

    with tpool.Pool(processes, threads=1) as pool:
        kept = pool.put(model.eval().requires_grad_(False))
        pool.map_batches(kept, many[:BATCH], batch_size=1 + BATCH // 8)  # the first calls pay for starting the workers
        start = time.perf_counter()
        scores = pool.map_batches(kept, many, batch_size=BATCH)
        report("pool.map_batches", scores, start)
        torch.testing.assert_close(scores, expected)

        better = Reader()
        better.load_state_dict(model.state_dict())
        train(better, images[:-TEST], labels[:-TEST], steps=80)
        kept.update(better.requires_grad_(False))
        start = time.perf_counter()
        report("the same, a better model", pool.map_batches(kept, many, batch_size=BATCH, out=scores), start)


main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
