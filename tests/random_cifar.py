"""Random pixels where CIFAR is looked for."""

from pathlib import Path

import numpy as np


def write(folder: Path, classes: int = 10, train: int = 60, test: int = 10) -> None:
    """Of CIFAR-10, or CIFAR-100 with as many classes, this many images, in the layout of a stand-in."""
    random, arrays = np.random.default_rng(0), {}
    for part, n in (("train", train), ("test", test)):
        arrays[f"x_{part}"] = random.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        arrays[f"y_{part}"] = random.integers(0, classes, n)
    np.savez(folder / f"cifar{classes}_exact_subset.npz", **arrays, idx_train=np.arange(train))
