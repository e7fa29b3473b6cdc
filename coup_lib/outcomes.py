"""What the draws of an evaluation amount to: accuracies with intervals, and the worst source per image."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from coup_lib.stats import Z_95, bonett_price, wilson


@dataclass(frozen=True)
class Accuracy:
    """A share of images with its 95 % interval (Wilson's, but for `kept`), all in percent."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, right: np.ndarray) -> "Accuracy":
        """From the share of right draws of each image: (n,) in [0, 1]."""
        low, high = wilson(float(right.sum()), len(right))
        return cls(100 * float(right.mean()), 100 * low, 100 * high, len(right))

    @classmethod
    def kept(cls, right: np.ndarray, own: np.ndarray) -> "Accuracy":
        """right over own, both (n,) on the same images: what a defence leaves of a classifier's own accuracy.

        The interval is paired, by the delta method: of mean(right − kept · own) / mean(own), about kept.

        Raises:
            ValueError: if the classifier is right on no image.
        """
        if not own.any():
            raise ValueError("expected a classifier that is right on some image; got one that is on none")
        share = right.mean() / own.mean()
        low, high = (share + bound for bound in bonett_price((right - share * own) / own.mean()))
        return cls(100 * float(share), 100 * low, 100 * high, len(right))

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
    def of(cls, right: np.ndarray, reference: np.ndarray, z: float = Z_95) -> "Difference":
        """right - reference, the shares of right draws of each image, both (n,); z: as in `bonett_price`."""
        low, high = np.clip(bonett_price(right - reference, z), -1, 1)
        return cls(100 * float((right - reference).mean()), 100 * float(low), 100 * float(high), len(right))

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

    def summary(self) -> dict[str, Any]:
        """Every way of counting, as plain numbers for a record."""
        counts = {
            "mean": self.mean,
            "worst_draw": self.worst_draw,
            "majority": self.majority,
            "averaged": self.averaged,
        }
        counts |= {} if self.attack_robust is None else {"autoattack": self.autoattack}
        return {name: asdict(accuracy) for name, accuracy in counts.items()}

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


def worst_of(scores: Sequence[Score]) -> np.ndarray:
    """The share of right draws of each image (n,) against its worst source.

    The source is chosen by one set of draws and re-scored on another: choosing and reporting on the same
    ones would count luck as skill. The attacker may also stay with one source for all images, so the mean is
    never above the lowest of the sources.
    """
    right = np.stack([score.right for score in scores])
    chosen = np.stack([score.suspicion for score in scores]).argmin(0)
    return lowest([right[chosen, np.arange(len(chosen))], *right])


def worst_columns(scores: Sequence[Score], lent: Sequence[Score]) -> dict[str, np.ndarray]:
    """ "lent", the worst of the sources made against others; "worst", of all: never above it. (n,) each."""
    borrowed = worst_of(lent)
    return {"lent": borrowed, "worst": lowest([worst_of(scores), borrowed])}


def lowest(shares: Sequence[np.ndarray]) -> np.ndarray:
    """Those of lowest mean: an attacker who has several ways takes the best of them."""
    return min(shares, key=lambda values: float(values.mean()))
