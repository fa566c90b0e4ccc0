"""A program as it is written for ``torch.multiprocessing``; ``swap_after.py`` is the same with one line changed.

It looks for the best ridge regression on the handwritten digits that ship inside scikit-learn: each task fits one
strength of regularisation on five folds and gives back its score and the weights, a tensor.

    python examples/swap_before.py [processes]
"""

import sys
import time

import torch
from sklearn.datasets import load_digits
from torch.multiprocessing import Pool

FOLDS = 5
FEATURES = 512

data = None


def prepare(seed):
    """Load the digits in each worker, with random features (the same in all)."""
    global data
    torch.set_num_threads(1)
    digits = load_digits()
    generator = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(digits.data / 16).float()
    features = (images @ torch.randn(images.shape[1], FEATURES, generator=generator)).relu()
    data = features, torch.nn.functional.one_hot(torch.from_numpy(digits.target)).float()


def fit(strength):
    """Score and weights of a regression with this strength of regularisation."""
    features, targets = data
    right = 0
    for fold in range(FOLDS):
        test = torch.arange(len(features)) % FOLDS == fold
        x, y = features[~test], targets[~test]
        weights = torch.linalg.solve(x.T @ x + strength * torch.eye(FEATURES), x.T @ y)
        right += ((features[test] @ weights).argmax(1) == targets[test].argmax(1)).sum().item()
    return right / len(features), strength, weights


def main(processes):
    """Try many strengths on features of two seeds, and print the best."""
    strengths = torch.logspace(-2, 4, 16).tolist()
    for seed in range(2):
        start = time.perf_counter()
        with Pool(processes, prepare, (seed,)) as pool:
            results = pool.map(fit, strengths, chunksize=1)
        score, strength, weights = max(results, key=lambda result: result[0])
        print(f"best of {len(strengths)}: strength {strength:.3g}, accuracy {score:.3f}, {len(weights)} features")
        print(f"{time.perf_counter() - start:.2f} s with the start of {processes} workers")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
