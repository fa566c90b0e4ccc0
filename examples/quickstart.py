"""The main job of tpool: real images, preprocessed and run through a small model in batches, by all workers.

Two photographs and 1,797 handwritten digits that ship inside scikit-learn are cut into batches; each batch is
preprocessed and described by a small convolutional network, once in this process and then in a pool by ``map`` and by
``imap_unordered``. The three must agree. There is no ``__main__`` guard, and the functions are plain functions of this
script: the default start method does not need more.

    python examples/quickstart.py [processes]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images

import tpool

TILE = 64  # pixels; tiles overlap by half
BATCH = 32


def load_batches() -> Iterator[torch.Tensor]:
    """Batches of uint8 images, each (BATCH, 3, TILE, TILE) or smaller at the end of a source."""
    for photo in load_sample_images().images:
        pixels = torch.from_numpy(photo.copy()).permute(2, 0, 1)  # (3, height, width)
        tiles = pixels.unfold(1, TILE, TILE // 2).unfold(2, TILE, TILE // 2)
        yield from tiles.permute(1, 2, 0, 3, 4).reshape(-1, 3, TILE, TILE).split(BATCH)
    digits = torch.from_numpy(load_digits().images / 16 * 255).to(torch.uint8)  # (1797, 8, 8)
    for batch in digits.split(BATCH):
        yield F.interpolate(batch[:, None].expand(-1, 3, -1, -1), size=(TILE, TILE))


def make_model() -> torch.nn.Module:
    """A small network that turns an image into 64 numbers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, stride=2), torch.nn.ReLU(),
        torch.nn.Conv2d(16, 32, 3, stride=2), torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, stride=2), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    ).eval()  # fmt: skip


@torch.inference_mode()
def describe(model: torch.nn.Module, item: tuple[int, torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Preprocess one batch and run the model: (number, (n, 3, TILE, TILE) uint8) -> (number, (n, 64) float32)."""
    number, images = item
    x = images.float() / 255
    x = (x - x.mean(dim=(2, 3), keepdim=True)) / (x.std(dim=(2, 3), keepdim=True) + 1e-3)
    x = torch.cat([x, x.flip(-1)])  # each image and its mirror image
    features = model(F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False))
    return number, features.view(2, len(images), -1).mean(0)


def report(name: str, images: int, seconds: float) -> None:
    """Print one line of the table."""
    print(f"{name:<28} {seconds:7.2f} s {images / seconds:9.0f} images/s", flush=True)


def main(processes: int) -> None:
    """Run the job three ways, compare, and print what it took."""
    batches = list(enumerate(load_batches()))
    images = sum(len(batch) for _, batch in batches)
    work = partial(describe, make_model())  # the model travels once per worker and job, not once per batch
    print(f"{images} images in {len(batches)} batches, {processes} workers", flush=True)

    torch.set_num_threads(1)  # one thread against `processes` workers with one thread each
    start = time.perf_counter()
    expected = dict(map(work, batches))
    report("serial, one thread", images, time.perf_counter() - start)

    with tpool.Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.map(work, batches[: 2 * processes])  # the first calls pay for starting the workers

        start = time.perf_counter()
        mapped = dict(pool.map(work, batches, chunksize=1))
        report("pool.map", images, time.perf_counter() - start)

        start = time.perf_counter()
        streamed = dict(pool.imap_unordered(work, enumerate(load_batches())))
        report("pool.imap_unordered, loading", images, time.perf_counter() - start)

        stats = pool.stats()
        for result in (mapped, streamed):
            assert result.keys() == expected.keys()
            for number, features in expected.items():
                torch.testing.assert_close(result[number], features)
        print(f"both agree with the serial result; {stats.moved_nbytes / 1e6:.1f} MB moved by handle, "
              f"{stats.piped_nbytes / 1e3:.1f} kB through pipes")  # fmt: skip


main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
