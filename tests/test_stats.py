"""Intervals: exact where there is a closed form, and by simulation where symmetric ones fail."""

import numpy as np
import pytest
import scipy.stats

from coup_lib.evaluation.outcomes import Accuracy, Difference
from coup_lib.evaluation.stats import below_zero, mean_interval, ratio_interval, student


def holds(above, below, truth, low, high):
    """Whether the interval of mean(above)/mean(below) holds the truth; quicker than to compute the interval.

    low, high: the made-up image (above, below) of either bound.
    """

    def probability(extreme):
        pairs = np.append(np.stack([above, below]), np.transpose([extreme]), axis=1)
        distinct, counts = np.unique(pairs[0] - truth * pairs[1], return_counts=True)
        return below_zero(distinct, counts)

    return probability(low) >= 0.025 and probability(high) <= 0.975


@pytest.mark.parametrize(
    ("right", "n"), [(0, 1), (1, 1), (0, 10), (3, 10), (10, 10), (337, 512), (3, 10**5), (30_000, 10**5)]
)
def test_shares_of_zeros_and_ones_have_the_exact_interval(right, n):
    expected = scipy.stats.binomtest(right, n).proportion_ci(method="exact")
    found = mean_interval(np.array([0, 1]), counts=np.array([n - right, right]))
    assert found == pytest.approx((expected.low, expected.high), abs=2e-6)


def test_a_bound_is_a_quantile_of_dirichlet_weighted_means():
    generator = np.random.default_rng(0)
    tenths = generator.integers(-3, 11, 40) / 10
    weights = generator.dirichlet(np.ones(41), 200_000)
    low = np.quantile(weights @ [*tenths, -1.0], 0.025)
    high = np.quantile(weights @ [*tenths, 1.0], 0.975)
    assert mean_interval(tenths, -1, 1) == pytest.approx((low, high), abs=2e-3)
    half = np.quantile(weights @ [*tenths, 1.0], 0.75)
    assert mean_interval(tenths, -1, 1, level=0.5)[1] == pytest.approx(half, abs=2e-3)


@pytest.mark.parametrize("n", [16, 64, 512])
@pytest.mark.parametrize("draws", [1, 2, 10])
@pytest.mark.parametrize("flips", [0.0, 0.01, 0.02, 0.05])
def test_averages_over_draws_are_covered(n, draws, flips):
    """Some images flip wholly, others by single draws: differences, accuracies, and what is kept of one."""
    generator, shape, ones = np.random.default_rng(n), (200, n), np.ones(n)
    lost = (generator.random(shape) < flips).astype(float)
    noisy = (generator.random(shape) < 0.1) * generator.binomial(draws, 0.1, shape) / draws
    difference, own = (1 - lost) * noisy - lost, (generator.random(shape) < 0.9).astype(float)
    sure = (1 - lost) * generator.binomial(draws, 0.97, shape) / draws
    right = own * (1 - lost) * generator.binomial(draws, 0.8, shape) / draws
    cases = {
        "difference": (difference, [ones] * 200, 0.01 * (1 - flips) - flips, (-1, 1), (1, 1)),
        "accuracy": (sure, [ones] * 200, 0.97 * (1 - flips), (0, 1), (1, 1)),
        "kept": (right, own, 0.8 * (1 - flips), (0, 1), (1, 0)),
    }
    for name, (above, below, *more) in cases.items():
        found = [holds(*pair, *more) for pair in zip(above, below, strict=True)]
        assert np.mean(found) >= 0.93, name
    inside = mean_interval(difference[0], -1, 1)
    assert holds(difference[0], ones, inside[0] + 1e-4, (-1, 1), (1, 1))
    assert not holds(difference[0], ones, inside[0] - 1e-4, (-1, 1), (1, 1))


@pytest.mark.parametrize("loss", [0.01, 0.02])
def test_small_gains_do_not_hide_rare_losses(loss):
    """Gains of 0.1 on 10 % of the images, whole losses on a few: there is no gain, on average."""
    generator = np.random.default_rng(0)
    kinds = generator.choice([0.1, -1.0, 0.0], (300, 64), p=[0.1, loss, 0.9 - loss])
    assert np.mean([mean_interval(row, -1, 1)[0] > 0 for row in kinds]) <= 0.04
    symmetric = kinds.mean(1) - 1.96 * kinds.std(1, ddof=1) / 8
    assert np.mean(symmetric > 0) > 0.1  # where the normal interval fails


def test_the_interval_scales_with_its_range():
    tenths = np.array([0.1, 0.0, -0.3, 0.2, 0.0])
    assert mean_interval(tenths, -0.5, 0.5) == pytest.approx(np.array(mean_interval(10 * tenths, -5, 5)) / 10)
    low, high = mean_interval(tenths, -1, 1)
    assert mean_interval(-tenths, -1, 1) == pytest.approx((-high, -low), abs=1e-6)


@pytest.mark.parametrize("values", [[], [0.5, 1.2], [-0.1]])
def test_values_out_of_their_range_are_refused(values):
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\], at least one; got"):
        mean_interval(np.array(values))


def test_equal_decisions_leave_a_width():
    same = Difference.of(np.ones(64), np.ones(64))
    assert same.value == 0
    assert same.low < -1
    assert same.high > 1


def test_a_difference_is_no_larger_than_everything():
    all_won = Difference.of(np.ones(16), np.zeros(16))
    assert 55 < all_won.low < all_won.value == all_won.high == 100


def test_student_is_scipys():
    values = np.random.default_rng(0).normal(size=(3, 7))
    found = np.stack(student(values))
    for place, row in enumerate(values):
        expected = scipy.stats.ttest_1samp(row, 0).confidence_interval(0.95)
        np.testing.assert_allclose(found[:, place], [expected.low, expected.high], rtol=1e-12)


@pytest.mark.parametrize(("right", "own"), [(0.9, 0.9), (0.4, 0.8), (0.9, 0.3)])
def test_what_is_kept_lies_in_its_interval(right, own):
    """Below, at and above all of the classifier's own."""
    places = np.arange(100) / 100
    kept = Accuracy.kept((places < right).astype(float), (places < own).astype(float))
    assert kept.value == pytest.approx(100 * right / own)
    assert kept.low < kept.value < kept.high


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="right on some image"):
        ratio_interval(np.ones(4), np.zeros(4))


def test_of_a_reference_that_is_always_right_the_ratio_is_the_mean():
    tenths = np.random.default_rng(0).integers(0, 11, 200) / 10
    assert ratio_interval(tenths, np.ones(200)) == pytest.approx(mean_interval(tenths), abs=0.02)
