"""The images of each profile, in splits that never move."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from coup_lib import cifar
from coup_lib.checks import choice
from coup_lib.paths import data_dir

_CIFAR = {
    "train": cifar.TRAIN - cifar.TRAIN // cifar.HELD_OUT,
    "validation": cifar.TRAIN // cifar.HELD_OUT,
    "test": cifar.TEST,
}
SIZES = {
    "digits": {"train": 1000, "validation": 285, "test": 512},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
CLASSES = {
    "digits": [str(label) for label in range(10)],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": [str(label) for label in range(100)],  # its names come only with the download
}
SPLITS = ("train", "validation", "test")
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

    def to(self, device: torch.device) -> "Images":
        """The same on a device."""
        return Images(self.x.to(device), self.y.to(device))


def split_size(dataset: str, split: str, subset: str = "first") -> int:
    """How many images a split has; `subset` as in `load_split`.

    ValueError for an unknown data set, split or subset.
    """
    choice("data set", dataset, SIZES)
    choice("split", split, SPLITS)
    choice(f"subset of {dataset}", subset, subsets(dataset))
    if split == "test" and subset != "first":
        return len(cifar.SUBSETS[subset]())
    return SIZES[dataset][split]


def subsets(dataset: str) -> tuple[str, ...]:
    """The orders in which the test images of a data set can be asked for."""
    return ("first",) if dataset == "digits" else tuple(cifar.SUBSETS)


def load_split(dataset: str, split: str, subset: str = "first") -> Images:
    """One split of a data set, always in the same order: its first n images are a fair sample.

    digits: scikit-learn's 1797 images of 8×8 pixels; 1000 train, 285 validation, 512 test, stratified.
    cifar10, cifar100: every tenth training image is for validation; of the test images `subset` takes the
    "first" ones, the 512 of the "paper" or the 512 of "diffpure". See `cifar.pixels` for where they lie.

    Raises:
        ValueError: for an unknown data set, split or subset.
        FileNotFoundError: when images are missing, naming what is expected where.
    """
    split_size(dataset, split, subset)
    if dataset == "digits":
        x, y = _digits()
        rows = split_rows()[split]
        return Images(x[rows].clone(), y[rows].clone())
    pixels, rows = _held(dataset, split, subset)
    return Images(torch.from_numpy(pixels.x[rows]).float() / 255, torch.from_numpy(pixels.y[rows]))


def is_here(dataset: str) -> bool:
    """Whether a data set can be loaded without downloading it."""
    return dataset == "digits" or cifar.is_here(dataset, data_dir())


def _held(dataset: str, split: str, subset: str) -> tuple[cifar.Pixels, np.ndarray]:
    """What is at hand, and the split's rows in it. Of a stand-in with fewer training images all are taken."""
    pixels = cifar.pixels(dataset, "test" if split == "test" else "train", data_dir())
    if split != "test":
        rows = pixels.rows_of(cifar.training_places(split, SPLIT_SEED))
        return pixels, rows[rows >= 0]
    rows = pixels.rows_of(cifar.SUBSETS[subset]())
    if subset == "first":
        return pixels, rows[: np.argmin(rows) if rows.min() < 0 else None]
    if rows.min() < 0:
        raise FileNotFoundError(
            f"{(rows < 0).sum()} of the {len(rows)} test images of subset {subset!r} are not in "
            f"{data_dir()}, which holds {len(pixels.y)} of {dataset}; get the whole data set, or choose "
            "subset 'first'"
        )
    return pixels, rows


@cache
def split_rows() -> dict[str, np.ndarray]:
    """The rows of load_digits() in each split: disjoint, shuffled, with the same share of each digit."""
    from sklearn.datasets import load_digits  # scikit-learn takes a second to load
    from sklearn.model_selection import train_test_split

    labels, sizes = load_digits().target, SIZES["digits"]
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=sizes["test"], stratify=labels, random_state=SPLIT_SEED
    )
    train, validation = train_test_split(
        rest, test_size=sizes["validation"], stratify=labels[rest], random_state=SPLIT_SEED
    )
    return {"train": train, "validation": validation, "test": test}


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    return x, torch.tensor(digits.target, dtype=torch.int64)
