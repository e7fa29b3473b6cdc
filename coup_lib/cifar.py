"""CIFAR-10 and CIFAR-100 as torchvision reads them, and the test images that the papers drew."""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from zipfile import BadZipFile

import filelock
import numpy as np

from coup_lib.paths import DATA_VARIABLE, data_dir

TRAIN, TEST = 50_000, 10_000
HELD_OUT = 10  # every tenth training image is for validation
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}


@dataclass(frozen=True)
class Pixels:
    """Images x (n, 3, 32, 32) uint8, labels y (n,) and their places in the data set's own order (n,)."""

    x: np.ndarray
    y: np.ndarray
    place: np.ndarray

    def rows_of(self, places: np.ndarray) -> np.ndarray:
        """Where these places are held; -1 for one that is not."""
        rows = np.full(max(self.place.max(), places.max()) + 1, -1)
        rows[self.place] = np.arange(len(self.place))
        return rows[places]


def paper_places() -> np.ndarray:
    """The 512 test images of COUP: one draw, seed 0 (from the authors' release)."""
    return np.random.RandomState(0).choice(TEST, 512, replace=False)


def diffpure_places() -> np.ndarray:
    """The 512 test images of DiffPure: 8 draws of 64, seeds 0 to 7; 504 of them are distinct."""
    draws = [np.random.RandomState(seed).choice(TEST, 64, replace=False) for seed in range(8)]
    return np.concatenate(draws)


def first_places() -> np.ndarray:
    """The test images in the data set's own order."""
    return np.arange(TEST)


SUBSETS = {"first": first_places, "paper": paper_places, "diffpure": diffpure_places}


def training_places(split: str, seed: int) -> np.ndarray:
    """The training images of "train" or "validation", shuffled; disjoint, and the same on every machine."""
    places = np.random.default_rng(seed).permutation(TRAIN)
    held_out = places % HELD_OUT == 0
    return places[held_out if split == "validation" else ~held_out]


def is_here(dataset: str, root: Path) -> bool:
    """Whether `pixels` can read the data set without downloading it."""
    return _stand_in_at(root, dataset).exists() or (root / FOLDERS[dataset]).exists()


@cache
def pixels(dataset: str, part: str, root: Path | None = None) -> Pixels:
    """All images of a part, "train" or "test", that lie under root (None: `paths.data_dir()`).

    torchvision's own folder is read first, and downloaded by torchvision if it is not there or not whole;
    where only `<dataset>_exact_subset.npz` lies there (x_train, y_train, idx_train, x_test, y_test), that
    stands in: fewer images, the same places.

    Raises:
        FileNotFoundError: naming the folder, the file to put there and where to get it.
        ValueError: for a stand-in that cannot be read.
        ImportError: naming the extra to install, when torchvision is missing.
    """
    root = root or data_dir()
    stand_in = _stand_in_at(root, dataset)
    if stand_in.exists() and not (root / FOLDERS[dataset]).exists():
        return _stand_in(stand_in, part)
    return _torchvision(dataset, part, root)


def _stand_in_at(root: Path, dataset: str) -> Path:
    return root / f"{dataset}_exact_subset.npz"


def _stand_in(file: Path, part: str) -> Pixels:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
            place = arrays[f"idx_{part}"] if f"idx_{part}" in arrays else np.arange(len(x))
    except (BadZipFile, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: expected an archive with x_{part} and y_{part}; {error}") from error
    return Pixels(x, y.astype(np.int64), place)


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
            f"https://www.cs.toronto.edu/~kriz/{ARCHIVES[dataset]} (or set {DATA_VARIABLE} to where it is). "
            f"Fetching it failed: {error}"
        ) from error
    x = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
    return Pixels(x, np.array(data.targets, dtype=np.int64), np.arange(len(x)))
