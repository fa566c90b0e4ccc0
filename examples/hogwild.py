"""Hogwild: several workers train one model at the same time, in one memory, without locks.

``pool.put(model)`` moves the parameters into shared memory, where they stay: each worker's optimizer writes into the
very tensors that this process reads. See Niu et al., "Hogwild!: A Lock-Free Approach to Parallelizing Stochastic
Gradient Descent" (2011). The digits ship inside scikit-learn.

    python examples/hogwild.py [processes]
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import tpool

TEST = 360  # digits that are not trained on
STEPS = 600  # in all, whatever the number of workers
PORTION = 20  # steps in one task
BATCH = 32


def make_model() -> torch.nn.Module:
    """A network with one hidden layer: (n, 64) -> (n, 10) scores."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Some steps on rows of one's own choice, written into the shared parameters; gives the mean loss.

    The gradients are the worker's own; only the parameters are shared.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = 0.0
    for _ in range(PORTION):
        rows = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / PORTION


def main(processes: int) -> None:
    """Train in this process, then in one memory by all workers."""
    digits = load_digits()
    images = torch.from_numpy(digits.data / 16).float()
    labels = torch.from_numpy(digits.target)
    train_images, train_labels = images[:-TEST], labels[:-TEST]
    torch.set_num_threads(1)
    print(f"{STEPS} steps of {BATCH} digits, {processes} workers", flush=True)

    @torch.inference_mode()
    def report(name: str, model: torch.nn.Module, seconds: float) -> None:
        right = (model(images[-TEST:]).argmax(1) == labels[-TEST:]).float().mean().item()
        print(f"{name:<24} {seconds:6.2f} s   accuracy {right:.3f}", flush=True)

    model = make_model()
    report("untrained", model, 0)
    start = time.perf_counter()
    for _ in range(STEPS // PORTION):
        train(model, train_images, train_labels)
    report("this process", model, time.perf_counter() - start)

    model = make_model()
    with tpool.Pool(processes, threads=1, seed=0) as pool:
        shared = pool.put(model)
        data = pool.put(train_images), pool.put(train_labels)  # sent once, not with each task
        start = time.perf_counter()
        losses = pool.starmap(train, [(shared, *data)] * (STEPS // PORTION), chunksize=1)
        report("Hogwild", model, time.perf_counter() - start)  # our model: nothing was sent back
        print(f"mean loss of a task: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")


main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
