import filelock
import numpy as np
import pytest
import torch

from coup_lib import data
from coup_lib.data import load_split, split_rows, split_size

SIZES, SIZES_CIFAR = data.SIZES["digits"], data.SIZES["cifar10"]

FIRST_ROWS = {
    "train": [1031, 1264, 1158, 831, 785],
    "validation": [117, 1247, 855, 78, 301],
    "test": [1134, 491, 641, 1353, 1286],
}


@pytest.mark.parametrize("split", SIZES)
def test_contract(split):
    images = load_split("digits", split)
    assert len(images) == SIZES[split]
    assert images.x.shape == (SIZES[split], 1, 8, 8) and images.x.dtype == torch.float32
    assert images.y.shape == (SIZES[split],) and images.y.dtype == torch.int64
    assert images.x.min() == 0 and images.x.max() == 1


def test_splits_are_disjoint_and_complete():
    rows = np.concatenate(list(split_rows().values()))
    assert sorted(rows) == list(range(1797))


@pytest.mark.parametrize("split", SIZES)
def test_splits_are_stratified(split):
    counts = torch.bincount(load_split("digits", split).y, minlength=10)
    assert (counts / SIZES[split] - 0.1).abs().max() < 0.01


def test_rows_never_move():
    """Published results name images by position: another scikit-learn must not shuffle differently."""
    assert {split: rows[:5].tolist() for split, rows in split_rows().items()} == FIRST_ROWS


def test_first_test_images_are_a_fair_sample():
    counts = torch.bincount(load_split("digits", "test").first(128).y, minlength=10)
    assert counts.min() >= 6


def test_a_changed_copy_leaves_the_data_alone():
    load_split("digits", "test").x.zero_()
    assert load_split("digits", "test").x.max() == 1


def test_refusals_name_both_sides():
    with pytest.raises(ValueError, match=r"data set: expected one of digits, cifar10, cifar100; got 'mnist'"):
        load_split("mnist", "test")
    with pytest.raises(ValueError, match=r"split: expected one of train, validation, test; got 'val'"):
        load_split("digits", "val")
    with pytest.raises(ValueError, match=r"got n = 513"):
        load_split("digits", "test").first(513)
    with pytest.raises(ValueError, match=r"subset of digits: expected one of first; got 'paper'"):
        load_split("digits", "test", "paper")


# CIFAR: pixels that tell where they are from, in the layouts that people have.


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A root with 40 test images and 300 training images of CIFAR-10, image i filled with i % 256."""
    places = np.random.default_rng(0).permutation(data.TRAIN)[:300]
    np.savez(
        tmp_path / "cifar10_exact_subset.npz",
        x_test=_filled(np.arange(40)),
        y_test=np.arange(40) % 10,
        x_train=_filled(places),
        y_train=places % 10,
        idx_train=places,
    )
    monkeypatch.setenv("COUP_DATA", str(tmp_path))
    data.pixels.cache_clear()
    yield places
    data.pixels.cache_clear()


def _filled(places):
    return np.broadcast_to((places % 256).astype(np.uint8)[:, None, None, None], (len(places), 3, 32, 32))


def test_published_subsets():
    """COUP draws its 512 test images once, DiffPure 8 times 64: 81 images are in both."""
    paper, diffpure = data.paper_places(), data.diffpure_places()
    assert len(paper) == len(set(paper)) == len(diffpure) == 512 and len(set(diffpure)) == 504
    assert len(set(paper) & set(diffpure)) == 81
    assert paper[:5].tolist() == [9394, 898, 2398, 5906, 2343]
    assert (split_size("cifar10", "test", "paper"), split_size("cifar10", "test")) == (512, 10_000)


def test_training_images_are_held_out_by_place():
    train, validation = (data.training_places(split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (SIZES_CIFAR["train"], SIZES_CIFAR["validation"])
    assert sorted([*train, *validation]) == list(range(data.TRAIN))


def test_a_part_of_cifar_stands_in(stand_in):
    first = load_split("cifar10", "test").first(40)
    assert first.x.shape == (40, 3, 32, 32) and first.x.dtype == torch.float32
    assert torch.equal((first.x[:, 0, 0, 0] * 255).round(), torch.arange(40.0)) and first.y[13] == 3
    with pytest.raises(ValueError, match="expected 1 to 40 images"):
        load_split("cifar10", "test").first(41)
    validation = load_split("cifar10", "validation")
    expected = [place for place in data.training_places("validation") if place in stand_in]
    assert torch.equal((validation.x[:, 0, 0, 0] * 255).round(), torch.tensor(expected) % 256)
    assert torch.equal(validation.y, torch.tensor(expected) % 10)


def test_a_subset_that_is_not_all_there_is_refused(stand_in):
    with pytest.raises(FileNotFoundError, match=r"of the 512 test images of subset 'paper' are not in"):
        load_split("cifar10", "test", "paper")


def test_of_a_subset_that_is_nearly_whole_the_rest_is_left_out(tmp_path, monkeypatch):
    here = np.setdiff1d(data.paper_places(), data.paper_places()[[7]])
    arrays = {"x_test": _filled(here), "y_test": here % 10, "idx_test": here}
    np.savez(tmp_path / "cifar10_exact_subset.npz", **arrays)
    monkeypatch.setenv("COUP_DATA", str(tmp_path))
    found = load_split("cifar10", "test", "paper")
    assert found.y.tolist() == (np.delete(data.paper_places(), 7) % 10).tolist()


def test_torchvision_is_asked_for_the_whole(tmp_path, monkeypatch):
    """A folder in torchvision's own layout: batches of pickled rows, checked by torchvision's MD5 sums."""
    datasets = pytest.importorskip("torchvision.datasets")

    class Whole:
        def __init__(self, root, train, download):
            assert root == str(tmp_path) and not download
            self.data, self.targets = np.arange(10 * 3072, dtype=np.uint8).reshape(10, 32, 32, 3), [3] * 10

    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(datasets, "CIFAR10", Whole)
    found = data.pixels.__wrapped__("cifar10", "test", tmp_path)
    assert (
        found.x.shape == (10, 3, 32, 32) and found.x[0, 1, 0, 2] == 7 and found.place.tolist() == [*range(10)]
    )


def test_a_folder_that_is_not_whole_is_fetched_by_one_process_at_a_time(tmp_path, monkeypatch):
    """As another shard leaves it that is still unpacking, or was killed meanwhile."""
    datasets = pytest.importorskip("torchvision.datasets")
    lock, asked = filelock.FileLock(tmp_path / ".cifar10.lock"), []

    class Halves:
        def __init__(self, root, train, download):
            asked.append(download)
            if not download:
                raise RuntimeError("Dataset not found or corrupted")
            with pytest.raises(filelock.Timeout):
                lock.acquire(timeout=0)
            self.data, self.targets = np.zeros((10, 32, 32, 3), dtype=np.uint8), [3] * 10

    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr(datasets, "CIFAR10", Halves)
    assert len(data.pixels.__wrapped__("cifar10", "test", tmp_path).y) == 10 and asked == [False, True]


@pytest.mark.parametrize("content", [b"", b"PK half an archive", b"<html>", None])
def test_a_stand_in_that_cannot_be_read_is_named(tmp_path, content):
    file = tmp_path / "cifar10_exact_subset.npz"
    np.savez(file, images=np.zeros(3)) if content is None else file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file}: expected an archive with x_test and y_test; "):
        data.pixels.__wrapped__("cifar10", "test", tmp_path)


def test_missing_data_says_what_to_put_where(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR100", offline)
    with pytest.raises(FileNotFoundError) as error:
        data.pixels.__wrapped__("cifar100", "test", tmp_path)
    for part in (str(tmp_path), "cifar-100-python", "COUP_DATA", "no route to host"):
        assert part in str(error.value)
