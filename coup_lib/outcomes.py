"""What the draws of an evaluation amount to: accuracies with intervals, and the worst source per image."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from coup_lib.stats import LEVEL, mean_interval, ratio_interval


@dataclass(frozen=True)
class Accuracy:
    """A share of images with its 95 % interval, all in percent."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: np.ndarray) -> "Accuracy":
        """From the share of right draws of each image: (n,) in [0, 1]."""
        low, high = mean_interval(right)
        return cls(100 * float(right.mean()), 100 * low, 100 * high, len(right))

    @classmethod
    def kept(cls, right: np.ndarray, own: np.ndarray) -> "Accuracy":
        """right over own, both (n,) on the same images: what a defence leaves of a classifier's own accuracy.

        Raises:
            ValueError: if the classifier is right on no image.
        """
        low, high = ratio_interval(right, own)
        return cls(100 * float(right.mean() / own.mean()), 100 * low, 100 * high, len(right))

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies on the same images, with its 95 % interval, in points."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: np.ndarray, reference: np.ndarray, level: float = LEVEL) -> "Difference":
        """right - reference, the shares of right draws of each image, both (n,); level: of the interval."""
        low, high = mean_interval(right - reference, -1, 1, level=level)
        return cls(100 * float((right - reference).mean()), 100 * low, 100 * high, len(right))

    @property
    def verdict(self) -> str:
        """What the interval says of the claim that the difference is positive."""
        if self.low > 0:
            return "holds"
        return "does not hold" if self.high < 0 else "is not decided"

    def __str__(self) -> str:
        value = round(self.value, 2) + 0.0  # never -0.00
        return f"{value:+.2f} points [{self.low:+.1f}, {self.high:+.1f}]"


@dataclass(frozen=True)
class Score:
    """One target's verdicts on one source's images.

    labels (n,); report (n, R): predicted classes on R noise draws that no attack has seen.
    average (n,): the class of the mean logits over those draws (DiffPure's rule against BPDA).
    suspicion (n,): the share of right draws on R further draws, ties broken by the mean probability of the
    true class; it serves to choose the worst source of an image.
    attack_robust (n,) bool: what the attack itself counted, where it was run against this target.
    """

    labels: np.ndarray
    report: np.ndarray
    average: np.ndarray
    suspicion: np.ndarray
    attack_robust: np.ndarray | None

    @cached_property
    def right(self) -> np.ndarray:
        """The share of right draws per image, (n,)."""
        return (self.report == self.labels[:, None]).mean(1)

    @property
    def majority_right(self) -> np.ndarray:
        """Whether the most frequent class is right (ties go to the smaller class index), (n,), 0 or 1."""
        votes = np.array([np.bincount(row).argmax() for row in self.report])
        return (votes == self.labels).astype(float)

    @property
    def average_right(self) -> np.ndarray:
        """Whether the mean of the logits is right, (n,), 0 or 1."""
        return (self.average == self.labels).astype(float)

    @property
    def mean(self) -> Accuracy:
        """Accuracy of a single draw, averaged over the draws."""
        return Accuracy.of(self.right)

    @property
    def worst_draw(self) -> Accuracy:
        """An image counts if every draw is right."""
        return Accuracy.of((self.right == 1).astype(float))

    @property
    def majority(self) -> Accuracy:
        """An image counts if the most frequent class is right (ties go to the smaller class index)."""
        return Accuracy.of(self.majority_right)

    @property
    def averaged(self) -> Accuracy:
        """An image counts if the mean of the logits over the draws is right."""
        return Accuracy.of(self.average_right)

    @property
    def counted(self) -> np.ndarray:
        """AutoAttack's own count, from the single draws that it looked at: (n,), 0 or 1."""
        if self.attack_robust is None:
            raise ValueError("the attack was not run against this target; it has no count of its own")
        return self.attack_robust.astype(float)

    @property
    def autoattack(self) -> Accuracy:
        """The accuracy by AutoAttack's own count."""
        return Accuracy.of(self.counted)


@dataclass(frozen=True)
class WorstCase:
    """Each image against its worst source.

    right (n,): the share of right draws among those that are reported. suspicion (n,): that among those by
    which the source was chosen, as in `Score`. n_sources: among how many.
    """

    right: np.ndarray
    suspicion: np.ndarray
    n_sources: int


def worst_case(scores: Sequence[Score]) -> WorstCase:
    """The worst source of each image, chosen by one set of draws and reported by another.

    To choose and report by the same draws would count luck as the attacker's skill. By luck a single source
    can therefore be reported a little below the worst case.
    """
    suspicion = np.stack([score.suspicion for score in scores])
    right = np.stack([score.right for score in scores])
    chosen = suspicion.argmin(0), np.arange(suspicion.shape[1])
    return WorstCase(right[chosen], suspicion[chosen], len(scores))


def worst_of(scores: Sequence[Score]) -> np.ndarray:
    """The share of right draws of each image (n,) in the `worst_case`."""
    return worst_case(scores).right


def lowest(shares: Sequence[np.ndarray]) -> np.ndarray:
    """Those of lowest mean: an attacker who has several ways takes the best of them."""
    return min(shares, key=lambda values: float(values.mean()))
