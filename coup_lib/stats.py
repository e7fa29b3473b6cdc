"""Intervals for accuracies."""

import math

import numpy as np

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


def paired_interval(differences: np.ndarray, z: float = Z_95) -> tuple[float, float]:
    """The normal interval (low, high) of the mean of per-image differences (n,), n ≥ 2.

    Pairing takes out what the two sides share, the difficulty of each image: the interval is narrower than
    the two accuracies' own intervals suggest.
    """
    spread = z * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return float(differences.mean()) - spread, float(differences.mean()) + spread
