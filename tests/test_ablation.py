"""What purification costs: the table, and the digits' own numbers."""

import numpy as np
import pytest

from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Accuracy
from coup_lib.studies import ablation as clean


def test_the_table_relates_every_defence_to_its_own_classifier():
    own = np.repeat([1.0, 0.0], [8, 2])
    results = {
        "a": {"none": own, "coup": own / 2},
        "b": {"none": np.zeros(10), "coup": np.zeros(10)},  # nothing to relate to
    }
    frame = clean.table(results, Config())
    assert list(frame["Classifier"]) == ["a", "a", "b", "b"]
    assert frame["Clean accuracy"].iloc[1].startswith("40.00 [")
    assert list(frame["Of the classifier's own"]) == ["–", str(Accuracy.kept(own / 2, own)), "–", "–"]
    assert frame["The paper's, of its WRN-28-10's own"].iloc[1] == "93.70"


def test_the_papers_shares_are_those_of_its_tables():
    assert clean.reported(Config(norm="linf"), "coup") == pytest.approx(100 * 90.04 / 96.09)
    assert clean.reported(Config(norm="l2"), "diffpure") == pytest.approx(100 * 91.03 / 96.09)
    assert clean.reported(Config(), "reverse") is None


def test_clean_images_can_be_more_than_attacked_ones():
    config = Config(purpose="clean", n_images=8)
    assert clean.sized(config, None) == config
    assert clean.sized(config, 64).n_images == 64
    with pytest.raises(
        ValueError, match="n_clean: expected a whole number of at least 1 and at most 512; got 513"
    ):
        clean.sized(config, 513)


def test_digits_lose_little(results_folder):
    config = Config(purpose="clean", n_images=64)
    shares = clean.measure(config, config.classifier)
    assert list(shares) == ["none", "diffpure", "reverse", "coup"]
    assert {len(right) for right in shares.values()} == {64}
    assert shares["none"].mean() > 0.9 and shares["coup"].mean() > 0.9
