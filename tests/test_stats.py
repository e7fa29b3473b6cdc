import math

import numpy as np
import pytest
import scipy.stats

from coup_lib.outcomes import Accuracy, Difference
from coup_lib.stats import Z_95, bonett_price, student, wilson


def table(gains, losses, n):
    """Per-image differences of a matched-pairs table."""
    return np.repeat([1.0, -1.0, 0.0], [gains, losses, n - gains - losses])


def normal(differences):
    spread = Z_95 * differences.std(ddof=1) / math.sqrt(len(differences))
    return differences.mean() - spread, differences.mean() + spread


def coverage(interval, n, gain, loss):
    """The exact probability that the interval of n images holds the true mean difference."""
    total = 0.0
    for gains in range(n + 1):
        for losses in range(n + 1 - gains):
            low, high = interval(table(gains, losses, n))
            if low <= gain - loss <= high:
                counts = [gains, losses, n - gains - losses]
                total += scipy.stats.multinomial.pmf(counts, n, [gain, loss, 1 - gain - loss])
    return total


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (337, 512)])
def test_wilson_is_scipys(right, n):
    expected = scipy.stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_refuses_nonsense():
    with pytest.raises(ValueError, match="got successes=5, n=4"):
        wilson(5, 4)


@pytest.mark.parametrize(("gains", "losses", "n"), [(0, 0, 64), (3, 1, 16), (150, 86, 1600)])
def test_bonett_price_adds_a_gain_and_a_loss(gains, losses, n):
    up, down, all_ = gains + 1, losses + 1, n + 2
    spread = Z_95 * math.sqrt(up + down - (up - down) ** 2 / all_) / all_
    expected = (up - down) / all_ - spread, (up - down) / all_ + spread
    assert bonett_price(table(gains, losses, n)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("gain", "loss"), [(0.03, 0.0), (0.1, 0.02), (0.15, 0.01), (0.2, 0.2)])
def test_bonett_price_covers_the_truth_where_the_normal_interval_does_not(gain, loss):
    assert coverage(bonett_price, 16, gain, loss) > 0.95
    assert coverage(normal, 16, gain, loss) < 0.95


def test_differences_of_many_draws_are_covered_better():
    """Few images differ, and those by tenths: the plain normal interval is far too narrow."""
    generator, truth, hits = np.random.default_rng(0), 0.1 * 0.3, {bonett_price: 0, normal: 0}
    for _ in range(2000):
        differs, tenths = generator.random(16) < 0.1, generator.binomial(10, 0.3, 16) / 10
        for interval in hits:
            low, high = interval(differs * tenths)
            hits[interval] += low <= truth <= high
    assert hits[bonett_price] / 2000 > 0.94
    assert hits[normal] / 2000 < 0.8


def test_the_interval_scales_with_the_differences():
    tenths = np.array([0.1, 0.0, -0.3, 0.2, 0.0])
    assert bonett_price(tenths) == pytest.approx(np.array(bonett_price(10 * tenths)) / 10)


def test_equal_decisions_leave_a_width():
    same = Difference.of(np.ones(64), np.ones(64))
    assert same.value == 0
    assert same.low < -1
    assert same.high > 1


def test_a_difference_is_no_larger_than_everything():
    all_won = Difference.of(np.ones(16), np.zeros(16))
    assert 60 < all_won.low < all_won.value == all_won.high == 100


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
