"""Sources × targets on a few digits, and how draws become accuracies."""

import json

import numpy as np
import pytest
import scipy.stats

from coup_lib import paths
from coup_lib.config import Config
from coup_lib.evaluate import CLEAN, Evaluation, Source, image_seeds
from coup_lib.outcomes import Accuracy, Difference, Score, worst_of
from coup_lib.stats import paired_interval, wilson


@pytest.fixture
def results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


def score(report, suspicion, labels=(0, 0, 0), robust=None):
    return Score(np.array(labels), np.array(report), np.array(suspicion), robust)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (337, 512)])
def test_wilson_is_scipys(right, n):
    expected = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError, match="got successes=5, n=4"):
        wilson(5, 4)


def test_paired_interval_covers_the_mean_19_times_in_20():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = paired_interval(generator.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=200))
        hits += low <= 0.1 <= high
    assert hits / 2000 == pytest.approx(0.95, abs=0.015)


def test_ways_of_counting():
    found = score([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 2]], [1, 1, 1], robust=np.array([True, True, False]))
    assert found.mean.value == pytest.approx(100 * (1 + 0.75 + 0.25) / 3)
    assert found.worst_draw.value == pytest.approx(100 / 3)
    assert found.majority.value == pytest.approx(200 / 3)
    assert found.autoattack.value == pytest.approx(200 / 3)
    assert set(found.summary()) == {"mean", "worst_draw", "majority", "autoattack"}


def test_a_borrowed_attack_has_no_count_of_its_own():
    with pytest.raises(ValueError, match="no count of its own"):
        _ = score([[0]] * 3, [1, 1, 1]).autoattack


def test_the_worst_source_is_chosen_per_image_and_rescored():
    """Chosen by suspicion, not by the reported draws: the luckier report would make the last one 0."""
    first = score([[0, 0], [1, 1], [0, 0]], [1.0, 0.0, 0.4])
    second = score([[1, 1], [0, 0], [1, 1]], [0.0, 1.0, 0.6])
    assert worst_of([first, second]).tolist() == [0, 0, 1]


def test_the_worst_is_never_above_a_single_source():
    misled = score([[0, 0]] * 3, [0.0, 0.0, 0.0])
    strong = score([[1, 1]] * 3, [1.0, 1.0, 1.0])
    assert worst_of([misled, strong]).mean() == 0


def test_difference_and_its_verdict():
    right, wrong = np.ones(50), np.zeros(50)
    mixed = np.array([1.0, 0.0] * 25)
    assert Difference.of(right, mixed).verdict == "holds"
    assert Difference.of(wrong, mixed).verdict == "does not hold"
    assert Difference.of(mixed, mixed[::-1]).verdict == "is not decided"
    assert Difference.of(right, mixed).value == 50
    assert str(Accuracy.of(mixed)).startswith("50.00 [36.")


def test_sources_that_are_the_same_are_one():
    assert Source("apgd-ce", "reverse", "first_order") == Source("apgd-ce", "reverse")
    assert Source("apgd-ce", "coup", "first_order") != Source("apgd-ce", "coup")
    assert Source("clean", "coup") == CLEAN
    with pytest.raises(ValueError, match="defence: expected one of none, diffpure, reverse, coup; got 'gan'"):
        Source("apgd-ce", "gan")


def test_an_images_noise_does_not_depend_on_the_number_of_images():
    assert image_seeds(0, 2, range(3, 5), 4).tolist() == image_seeds(0, 2, range(8), 4)[3:5].tolist()
    assert image_seeds(0, 2, range(2), 4).tolist() != image_seeds(1, 2, range(2), 4).tolist()
    assert image_seeds(0, 2, range(2), 4).tolist() != image_seeds(0, 3, range(2), 4).tolist()


def test_an_unknown_classifier_is_refused():
    with pytest.raises(ValueError, match="classifier: expected one of cnn-small, cnn-large; got 'resnet'"):
        Evaluation(Config(), "resnet")


def test_columns_and_their_records(results_folder, capsys):
    config = Config(n_images=6, n_draws=3)
    columns = Evaluation(config).columns(("none", "reverse", "coup"), protocol=("rand",))
    assert list(columns["coup"]) == ["clean", "rand", "adaptive", "first_order", "from_none", "from_reverse"]
    assert columns["reverse"]["adaptive"] is columns["reverse"]["from_reverse"]
    assert columns["coup"]["clean"].report.shape == (6, 3)
    assert "[8/8] cnn-small: apgd-ce on coup (first_order): started" in capsys.readouterr().out

    path = next(results_folder.rglob("score-coup-on-cnn-small-linf-apgd-ce-coup-first_order-*.json"))
    record = json.loads(path.read_text())
    assert record["settings"]["attack"]["gradient"] == "first_order"
    assert record["settings"]["target"]["guidance_weight"] == 1.0
    assert record["result"]["accuracy"]["mean"]["n"] == 6
    assert len(record["result"]["report"]) == 6

    files = {path: path.stat().st_mtime_ns for path in results_folder.rglob("*.json")}
    again = Evaluation(config, verbose=False).columns(("none", "reverse", "coup"), protocol=("rand",))
    assert (again["coup"]["first_order"].report == columns["coup"]["first_order"].report).all()
    assert {path: path.stat().st_mtime_ns for path in results_folder.rglob("*.json")} == files


def test_scores_do_not_depend_on_the_chunks(results_folder, monkeypatch):
    config = Config(n_images=6, n_draws=4)
    whole = Evaluation(config, verbose=False).score("coup", CLEAN)
    for path in results_folder.rglob("*.json"):
        path.unlink()
    object.__setattr__(config.sizes, "chunk_size", 4)
    try:
        chunked = Evaluation(config, verbose=False).score("coup", CLEAN)
    finally:
        object.__setattr__(config.sizes, "chunk_size", 64)
    assert (whole.report == chunked.report).all()
    np.testing.assert_allclose(whole.suspicion, chunked.suspicion, atol=1e-6)


def test_only_the_settings_that_matter_name_a_record():
    weak, strong = (Evaluation(Config(guidance_weight=weight)) for weight in (1, 2))
    same = Source("apgd-ce", "reverse")
    assert weak.attack_settings(same) == strong.attack_settings(same)
    other = Source("apgd-ce", "coup")
    assert weak.attack_settings(other) != strong.attack_settings(other)
