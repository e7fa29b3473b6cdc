"""The images of each profile, in splits that never move."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SIZES = {"train": 1000, "validation": 285, "test": 512}
DATASETS = ("digits",)
SPLIT_SEED = 2408


@dataclass(frozen=True)
class Images:
    """Images x (n, C, H, W), float32 in [0, 1], and their labels y (n,), int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def first(self, n: int) -> "Images":
        """The first n images; ValueError when there are fewer."""
        if not 0 < n <= len(self):
            raise ValueError(f"expected 1 to {len(self)} images, got n = {n}")
        return Images(self.x[:n], self.y[:n])


def load_split(dataset: str, split: str) -> Images:
    """One split of a data set, always in the same shuffled order: its first n images are a fair sample.

    digits: scikit-learn's 1797 images of 8×8 pixels; 1000 train, 285 validation, 512 test, stratified.
    ValueError for an unknown data set or split.
    """
    if dataset not in DATASETS:
        raise ValueError(f"expected a data set out of {', '.join(DATASETS)}, got {dataset!r}")
    if split not in SIZES:
        raise ValueError(f"expected a split out of {', '.join(SIZES)}, got {split!r}")
    x, y = _digits()
    rows = split_rows()[split]
    return Images(x[rows].clone(), y[rows].clone())


@cache
def split_rows() -> dict[str, np.ndarray]:
    """The rows of load_digits() in each split: disjoint, shuffled, with the same share of each digit."""
    labels = load_digits().target
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=SIZES["test"], stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=SIZES["validation"], stratify=labels[rest], random_state=SPLIT_SEED
    )
    return {"train": train, "validation": validation, "test": test}


@cache
def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    return x, torch.tensor(digits.target, dtype=torch.int64)
