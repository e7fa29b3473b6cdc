"""Intervals for accuracies, their differences, and means of anything else."""

import math

import numpy as np
from scipy.stats import t

Z_95 = 1.959963984540054  # the normal quantile of a two-sided 95 % interval


def wilson(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval (low, high) of a proportion successes/n, both in [0, 1].

    `successes` may be fractional: the mean accuracy over several noise draws counts as n images, not as
    n × draws, because the draws of one image are not independent evidence about the next.

    Raises:
        ValueError: unless 0 ≤ successes ≤ n and n ≥ 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got successes={successes}, n={n}")
    share = successes / n
    centre = share + z**2 / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = (centre - spread) / (1 + z**2 / n), (centre + spread) / (1 + z**2 / n)
    return max(0.0, low), min(1.0, high)


def bonett_price(differences: np.ndarray, z: float = Z_95) -> tuple[float, float]:
    """The interval (low, high) of the mean of per-image differences (n,), n ≥ 1.

    That of Bonett and Price (J. Educ. Behav. Stat. 37, 2012) for matched proportions: the normal interval
    after two made-up images, a gain and a loss. Where few images differ the plain normal interval is too
    narrow, and has no width at all where none does. Differences may be fractional, as in `wilson`: the gain
    and the loss are as large as the largest difference seen, or 1 where there is none.

    Pairing takes out what the two sides share, the difficulty of each image: the interval is narrower than
    the two accuracies' own intervals suggest.
    """
    n, largest = len(differences) + 2, float(np.abs(differences).max()) or 1.0
    centre = float(differences.sum()) / n
    variance = (float(np.square(differences).sum()) + 2 * largest**2) / n - centre**2
    spread = z * math.sqrt(variance / n)
    return centre - spread, centre + spread


def student(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's 95 % interval (low, high) of the mean along the last axis of (..., n), n ≥ 2."""
    n = values.shape[-1]
    mean, spread = values.mean(-1), t.ppf(0.975, n - 1) * values.std(-1, ddof=1) / math.sqrt(n)
    return mean - spread, mean + spread
