"""One script, one machine or many: what changes is one argument.

A small network is searched for the best of many seeds: each task trains it on the handwritten digits that ship inside
scikit-learn, and says how good it became. The data are put into the pool once: in shared memory on one machine, in the
object store of each node on a cluster.

    python examples/one_machine_or_many.py            processes of this machine
    python examples/one_machine_or_many.py ray        a cluster of two nodes, both on this machine, for the example
    python examples/one_machine_or_many.py HOST:6379  your cluster
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import tpool

STEPS = 150
RATE = 0.5


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """Images, (1797, 64) float32 between 0 and 1, and what they show, (1797,) int64."""
    digits = load_digits()
    return torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)


def train(item: tuple[int, tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, int, torch.nn.Module]:
    """Train from a seed; gives accuracy on what was not trained on, the seed, and the model."""
    seed, (images, labels) = item
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    parameters = list(model.parameters())
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images[:1500]), labels[:1500])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():  # plain descent: an optimizer of torch's would take seconds to import, in each worker
            for parameter, gradient in zip(parameters, gradients):
                parameter -= RATE * gradient
    with torch.no_grad():
        right = model(images[1500:]).argmax(1) == labels[1500:]
    return right.float().mean().item(), seed, model


@contextlib.contextmanager
def choose_engine(where: str) -> Iterator[str | tpool.RayEngine]:
    """The one argument that changes; for ``ray`` with a cluster of two nodes for as long as it is used."""
    if where == "local":
        yield "local"
    elif where != "ray":
        yield tpool.RayEngine(address=where)
    else:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        try:
            yield tpool.RayEngine(address=cluster.address)
        finally:
            cluster.shutdown()


def main(where: str) -> None:
    """Search, and print what was found."""
    with choose_engine(where) as engine, tpool.Pool(2, engine=engine) as pool:
        data = pool.put(load())
        tried = pool.map(train, [(seed, data) for seed in range(12)], chunksize=1, retries=2)
        accuracy, seed, model = max(tried, key=lambda each: each[0])
        print(f"{len(tried)} seeds tried; the best is {seed}: {accuracy:.3f} of the digits are read right")
        assert accuracy > 0.85
        assert model(torch.zeros(1, 64)).shape == (1, 10)


main(sys.argv[1] if len(sys.argv) > 1 else "local")
