"""The images of each profile, in splits that never move: scikit-learn's digits, and torchvision's CIFAR."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from zipfile import BadZipFile

import filelock
import numpy as np
import torch
from torch import Tensor

from coup_lib.checks import choice
from coup_lib.paths import DATA_VARIABLE, data_dir

TRAIN, TEST = 50_000, 10_000  # CIFAR's
HELD_OUT = 10  # every tenth training image of CIFAR is for validation
MOST_MISSING = 0.01  # of a subset's images
_CIFAR = {"train": TRAIN - TRAIN // HELD_OUT, "validation": TRAIN // HELD_OUT, "test": TEST}
_DIGITS = {"train": 1000, "validation": 285, "test": 512}
SIZES = {"digits": _DIGITS, "cifar10": _CIFAR, "cifar100": _CIFAR}
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
CLASSES = {
    "digits": [str(label) for label in range(10)],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": [str(label) for label in range(100)],  # its names come only with the download
}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
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
        """These images on a device."""
        return Images(self.x.to(device), self.y.to(device))


def split_size(dataset: str, split: str, subset: str = "first") -> int:
    """How many images a split has; `subset` as in `load_split`.

    ValueError for an unknown data set, split or subset.
    """
    choice("data set", dataset, SIZES)
    choice("split", split, SPLITS)
    choice(f"subset of {dataset}", subset, subsets(dataset))
    if split == "test" and subset != "first":
        return len(SUBSETS[subset]())
    return SIZES[dataset][split]


def subsets(dataset: str) -> tuple[str, ...]:
    """The orders in which the test images of a data set can be asked for."""
    return ("first",) if dataset == "digits" else tuple(SUBSETS)


def load_split(dataset: str, split: str, subset: str = "first") -> Images:
    """One split of a data set, always in the same order: its first n images are a fair sample.

    digits: scikit-learn's 1797 images of 8×8 pixels; 1000 train, 285 validation, 512 test, stratified.
    cifar10, cifar100: every tenth training image is for validation; of the test images `subset` takes the
    "first" ones, the 512 of the "paper" or the 512 of "diffpure". Of a subset one image in a hundred may be
    missing: it is left out. See `pixels` for where they lie.

    Raises:
        ValueError: for an unknown data set, split or subset.
        FileNotFoundError: when images are missing, naming what is expected where.
    """
    split_size(dataset, split, subset)
    if dataset == "digits":
        return _digits(split)
    found = pixels(dataset, "test" if split == "test" else "train", data_dir())
    rows = found.rows_of(SUBSETS[subset]() if split == "test" else training_places(split))
    missing = rows < 0
    if split == "test" and subset != "first" and missing.mean() > MOST_MISSING:
        raise FileNotFoundError(
            f"{missing.sum()} of the {len(rows)} test images of subset {subset!r} are not in {data_dir()}, "
            f"which holds {len(found.y)} of {dataset}; get the whole data set, or choose subset 'first'"
        )
    if split == "test" and subset == "first" and missing.any():
        rows = rows[: missing.argmax()]  # up to the first gap
    rows = rows[rows >= 0]
    return Images(torch.from_numpy(found.x[rows]).float() / 255, torch.from_numpy(found.y[rows]))


def is_here(dataset: str) -> bool:
    """Whether a data set can be loaded without downloading it."""
    root = data_dir()
    return dataset == "digits" or _stand_in(root, dataset).exists() or (root / FOLDERS[dataset]).exists()


# --- digits ---


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


def _digits(split: str) -> Images:
    from sklearn.datasets import load_digits

    digits, rows = load_digits(), split_rows()[split]
    x = torch.tensor(digits.images[rows] / 16, dtype=torch.float32)[:, None]
    return Images(x, torch.tensor(digits.target[rows], dtype=torch.int64))


# --- CIFAR ---


@dataclass(frozen=True)
class Pixels:
    """Images x (n, 3, 32, 32) uint8, labels y (n,) and their places in the data set's own order (n,)."""

    x: np.ndarray
    y: np.ndarray
    place: np.ndarray

    def rows_of(self, places: np.ndarray) -> np.ndarray:
        """The row of each place; -1 for a place that is missing."""
        rows = np.full(max(self.place.max(), places.max()) + 1, -1)
        rows[self.place] = np.arange(len(self.place))
        return rows[places]


def paper_places() -> np.ndarray:
    """The 512 test images of COUP: one draw, seed 0 (from the authors' release)."""
    return np.random.RandomState(0).choice(TEST, 512, replace=False)


def diffpure_places() -> np.ndarray:
    """The 512 test images of DiffPure: 8 draws of 64, seeds 0 to 7; 504 of them are distinct."""
    return np.concatenate([np.random.RandomState(seed).choice(TEST, 64, replace=False) for seed in range(8)])


SUBSETS: dict[str, Callable[[], np.ndarray]] = {
    "first": partial(np.arange, TEST),
    "paper": paper_places,
    "diffpure": diffpure_places,
}


def training_places(split: str) -> np.ndarray:
    """The training images of "train" or "validation", shuffled; disjoint, and the same on every machine."""
    places = np.random.default_rng(SPLIT_SEED).permutation(TRAIN)
    held_out = places % HELD_OUT == 0
    return places[held_out if split == "validation" else ~held_out]


@cache
def pixels(dataset: str, part: str, root: Path) -> Pixels:
    """All images of a part, "train" or "test", that lie under root.

    torchvision's own folder is read first, and downloaded by torchvision if it is not there or not whole;
    where only `<dataset>_exact_subset.npz` lies there (x_train, y_train, idx_train, x_test, y_test), that
    stands in: fewer images, the same places.

    Raises:
        FileNotFoundError: naming the folder, the file to put there and where to get it.
        ValueError: for a stand-in that cannot be read.
        ImportError: naming the extra to install, when torchvision is missing.
    """
    file = _stand_in(root, dataset)
    if not file.exists() or (root / FOLDERS[dataset]).exists():
        return _torchvision(dataset, part, root)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
            place = arrays[f"idx_{part}"] if f"idx_{part}" in arrays else np.arange(len(x))
    except (BadZipFile, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: expected an archive with x_{part} and y_{part}; {error}") from error
    return Pixels(x, y.astype(np.int64), place)


def _stand_in(root: Path, dataset: str) -> Path:
    return root / f"{dataset}_exact_subset.npz"


def _torchvision(dataset: str, part: str, root: Path) -> Pixels:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"{dataset} is read by torchvision, and {error}; install it with: pip install 'coup-lib[cifar]'"
        ) from error
    known = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
    make = partial(known[dataset], str(root), train=part == "train")
    try:
        try:
            data = make(download=False)
        except RuntimeError:  # not found, or not whole: another process may be at it
            root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(root / f".{dataset}.lock"):
                data = make(download=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"no whole {dataset} at {root}: expected the folder {FOLDERS[dataset]} there, unpacked from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html (or set {DATA_VARIABLE} to where it is). "
            f"Fetching it failed: {error}"
        ) from error
    x = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
    return Pixels(x, np.array(data.targets, dtype=np.int64), np.arange(len(x)))
