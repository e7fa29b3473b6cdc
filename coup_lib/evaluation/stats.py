"""Intervals for accuracies, their differences and ratios, and for means of anything else."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

LEVEL = 0.95  # of every interval, unless a call says otherwise


@dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float


def mean_interval(
    values: np.ndarray,
    low: float = 0.0,
    high: float = 1.0,
    *,
    counts: np.ndarray | None = None,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Gaffke's interval (low, high) for the mean of a quantity that lies in [low, high].

    From images' values (n,), n ≥ 1: shares of right draws, or differences of such shares. Nothing else is
    assumed of them: a value that no image had may still occur, so one made-up image of the extreme value
    joins the others, and all are weighted at random (Dirichlet, all parameters 1); the bound is a quantile of
    the weighted mean. For values 0 and 1 this is Clopper and Pearson's exact interval.

    Source: N. Gaffke, Math. Methods of Statistics 14 (2005) 451; E. Learned-Miller and P. Thomas,
    arXiv:1905.06208. Symmetric intervals (Wilson's, Bonett and Price's, the normal one) fall far short of
    their level where few images differ and those by different amounts, as averages over noise draws do.

    Args:
        counts: (n,), how many images had each value; one each unless given.

    Raises:
        ValueError: for no values, or values outside of [low, high].
    """
    values = np.asarray(values, dtype=float)
    if not values.size or values.min() < low or values.max() > high:
        raise ValueError(f"expected values in [{low:g}, {high:g}], at least one; got {values}")
    distinct, places = np.unique(values, return_inverse=True)
    counts = np.bincount(places, counts)
    tail = (1 - level) / 2

    def bound(extreme: float, share: float) -> float:
        points, weights = np.append(distinct, extreme), np.append(counts, 1)
        ends = float(points.min()), float(points.max())
        return _root(lambda mean: below_zero(points - mean, weights), *ends, share)

    return bound(low, tail), bound(high, 1 - tail)


def ratio_interval(values: np.ndarray, reference: np.ndarray, *, level: float = LEVEL) -> tuple[float, float]:
    """The interval (low, high) of mean(values) / mean(reference), both (n,) in [0, 1] on the same images.

    Fieller's way: the ratios at which the mean of values − ratio · reference can be zero, by the method of
    `mean_interval`. The made-up image is right in one of the two only.

    Raises:
        ValueError: if the reference is zero on all images.
    """
    if not np.any(reference):
        raise ValueError("expected a reference that is right on some image; got one that is on none")
    pairs, counts = np.unique(np.stack([values, reference]), axis=1, return_counts=True)
    weights, tail = np.append(counts, 1), (1 - level) / 2

    def bound(extreme: tuple[float, float], share: float) -> float:
        above, below = np.column_stack([pairs, extreme])
        largest = 1.0
        while below_zero(above - largest * below, weights) <= share:
            largest *= 2
        return _root(lambda ratio: below_zero(above - ratio * below, weights), 0.0, largest, share)

    return bound((0.0, 1.0), tail), bound((1.0, 0.0), 1 - tail)


def _root(probability: Callable[[float], float], low: float, high: float, share: float) -> float:
    """Where the probability, which grows from 0 to 1 between low and high, is `share`."""
    target = ndtri(share)

    def excess(place: float) -> float:  # on the normal scale it is nearly a straight line
        return float(ndtri(np.clip(probability(place), 1e-12, 1 - 1e-12)) - target)

    return (
        low
        if excess(low) >= 0
        else high
        if excess(high) <= 0
        else float(brentq(excess, low, high, xtol=1e-7))
    )


def below_zero(factors: np.ndarray, shapes: np.ndarray) -> float:
    """P(Σ factors · G ≤ 0) for independent G ~ Gamma(shapes), both (m,).

    A Dirichlet-weighted mean is below a threshold if such a sum is below zero. By inversion of the
    characteristic function (Gil-Pelaez), with the sum of Davies, Applied Statistics 29 (1980) 323.
    """
    if factors.min() >= 0 or factors.max() <= 0:
        return float(factors.max() <= 0)
    factors = factors / math.sqrt(float(shapes @ factors**2))  # so that the sum's standard deviation is 1
    if abs(mean := float(shapes @ factors)) > 18:
        return float(mean < 0)
    step, end = 2 * math.pi / 40, 1.0  # within 20 standard deviations of zero is all that counts
    while shapes @ np.log1p((factors * end) ** 2) < 40 and end < 2000:
        end *= 1.5
    places = step * (np.arange(math.ceil(end / step)) + 0.5)
    products = np.outer(factors, places)
    phase = shapes @ np.arctan(products)
    decay = np.exp(-0.5 * (shapes @ np.log1p(products**2)))
    return float(np.clip(0.5 - np.sum(np.sin(phase) * decay / places) * step / math.pi, 0, 1))


def student(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's 95 % interval (low, high) of the mean along the last axis of (..., n), n ≥ 2."""
    n = values.shape[-1]
    mean, spread = values.mean(-1), stdtrit(n - 1, 0.975) * values.std(-1, ddof=1) / math.sqrt(n)
    return mean - spread, mean + spread
