"""Results of attacks, made up image by image."""

import numpy as np

from coup_lib.evaluation.outcomes import Predictions


def losing(n_wrong: int, n: int = 40) -> np.ndarray:
    """(n,) of zeros and ones: the first n_wrong images are lost."""
    return (np.arange(n) >= n_wrong).astype(float)


def scored(
    n_wrong: int, n: int = 40, robust: np.ndarray | None = None, judged: np.ndarray | None = None
) -> Predictions:
    """Five draws of n images, the first n_wrong always misclassified; robust (n,) bool is the attack's count.

    judged (n,): that count without the clean draw.
    """
    report = np.repeat(1 - losing(n_wrong, n).astype(int)[:, None], 5, axis=1)
    return Predictions(np.zeros(n, dtype=int), report, report[:, 0], 1.0 - report[:, 0], robust, judged)
