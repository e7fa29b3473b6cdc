import numpy as np
import pytest
import torch

from coup_lib.data import SIZES, load_split, split_rows

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
    with pytest.raises(ValueError, match=r"expected a data set out of digits, got 'mnist'"):
        load_split("mnist", "test")
    with pytest.raises(ValueError, match=r"expected a split out of train, validation, test, got 'val'"):
        load_split("digits", "val")
    with pytest.raises(ValueError, match=r"got n = 513"):
        load_split("digits", "test").first(513)
