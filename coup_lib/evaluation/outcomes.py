"""Accuracies with intervals from the draws of an evaluation, and the worst attack on each image."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from coup_lib.evaluation.stats import LEVEL, Estimate, mean_interval, ratio_interval


@dataclass(frozen=True)
class Accuracy(Estimate):
    """A share of n images with its 95 % interval, all in percent."""

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
class Difference(Estimate):
    """A difference of two accuracies on the same n images, with its 95 % interval, in points."""

    n: int

    @classmethod
    def of(
        cls, right: np.ndarray, reference: np.ndarray, level: float = LEVEL, most: float = 1
    ) -> "Difference":
        """right - reference, the shares of right draws of each image, both (n,).

        level: of the interval. most: none of the differences can be larger.
        """
        low, high = mean_interval(right - reference, -most, most, level=level)
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


def joint(differences: Iterable[Difference]) -> str:
    """The verdict on the claim that all of them are positive."""
    verdicts = {difference.verdict for difference in differences}
    return next(word for word in ("does not hold", "is not decided", "holds") if word in verdicts)


@dataclass(frozen=True)
class Predictions:
    """One target's verdicts on one source's images.

    labels (n,); report (n, R): predicted classes on R noise draws that no attack has seen.
    average (n,): the class of the mean logits over those draws (DiffPure's rule against BPDA).
    selection (n,): the share of right draws on R further draws, ties broken by the mean probability of the
    true class; it serves to choose the worst source of an image.
    attack_robust (n,) bool: what the attack itself counted, where it was run against this target.
    attack_judged (n,) bool: that count without the clean draw, of an attack that may come second.
    """

    labels: np.ndarray
    report: np.ndarray
    average: np.ndarray
    selection: np.ndarray
    attack_robust: np.ndarray | None = None
    attack_judged: np.ndarray | None = None

    @cached_property
    def right(self) -> np.ndarray:
        """The share of right draws per image, (n,)."""
        return right_draws(self.report, self.labels)

    @property
    def counted(self) -> np.ndarray:
        """AutoAttack's own count, from the single draws that it looked at: (n,), 0 or 1."""
        if self.attack_robust is None:
            raise ValueError("the attack was not run against this target; it has no count of its own")
        return self.attack_robust.astype(float)

    def counted_with(self, second: "Predictions") -> np.ndarray:
        """AutoAttack's own count of this attack and a second one after it, one clean draw in all: (n,)."""
        if second.attack_judged is None:
            raise ValueError("the second attack has no verdict without its clean draw")
        return self.counted * second.attack_judged

    def decided(self, rule: str) -> np.ndarray:
        """The share of right decisions per image, (n,), by one of `RULES`; 0 or 1 where all draws decide."""
        if rule == "single":
            return self.right
        if rule == "worst_draw":
            return (self.right == 1).astype(float)
        decided = most_frequent(self.report) if rule == "majority" else self.average
        return (decided == self.labels).astype(float)


# Ways to decide an image from several draws; a tied majority goes to the smallest class index.
RULES = {
    "single": "a single draw",
    "averaged": "the mean of the logits",
    "majority": "the majority of draws",
    "worst_draw": "all draws (the worst)",
}


class Transfer(NamedTuple):
    """The key of an attack that was made against another defence: that surrogate, and its column there."""

    surrogate: str
    column: str


def direct(row: Mapping[Any, Predictions]) -> dict[str, Predictions]:
    """The columns that a target's row of scores has of its own, without those that are transferred."""
    return {key: score for key, score in row.items() if not isinstance(key, Transfer)}


def transferred(row: Mapping[Any, Predictions]) -> dict[Transfer, Predictions]:
    """What was made against other defences and has no column of its own in a target's row of scores."""
    return {key: score for key, score in row.items() if isinstance(key, Transfer)}


def most_frequent(classes: np.ndarray) -> np.ndarray:
    """The class that most of N draws (..., N) decide for, (...); of tied ones the smallest, -1 is none."""
    return (classes[..., None] == np.arange(-1, classes.max() + 1)).sum(-2).argmax(-1) - 1


def right_draws(report: Any, labels: Any) -> np.ndarray:
    """The share of right draws per image, (n,), of predicted classes (n, R) and true ones (n,)."""
    return (np.asarray(report) == np.asarray(labels)[:, None]).mean(1)


@dataclass(frozen=True)
class WorstCase:
    """Each image against the attack that is worst for it.

    right (n,): the share of right draws among those that are reported. expected (n,): what was expected of it
    when the attack was chosen, on average never above what any attack showed. scores: of all attacks.
    source (n,): the place among them of the one that was chosen.
    """

    right: np.ndarray
    expected: np.ndarray
    scores: tuple[Predictions, ...]
    source: np.ndarray

    @property
    def n_sources(self) -> int:
        """Among how many attacks was chosen."""
        return len(self.scores)

    def decided(self, draws: int) -> dict[str, np.ndarray]:
        """Rule → the share of right decisions per image, (n,), by so many draws each, see `RULES`.

        Of several draws under the worst of those attacks that were scored by as many; of one draw under the
        worst of all.
        """
        scores = [score for score in self.scores if score.report.shape[1] == draws]
        chosen = worst_case(scores).source, np.arange(len(self.right))
        found = {rule: np.stack([score.decided(rule) for score in scores])[chosen] for rule in RULES}
        return found | {"single": self.right}


def worst_case(scores: Sequence[Predictions]) -> WorstCase:
    """The worst attack on each image, chosen by one set of draws and reported by another.

    To choose and report by the same draws would count luck as the attacker's skill. And to choose by each
    image's few draws alone would make luck a bad adviser, worse than to stay with the strongest source: so
    the draws of an image are shrunk towards what image and source show on average, by as much as noise
    explains (empirical Bayes; Efron and Morris, J. Am. Stat. Assoc. 70 (1975) 311).
    """
    seen, right = (np.stack([getattr(score, name) for score in scores]) for name in ("selection", "right"))
    draws = np.array([score.report.shape[1] for score in scores])
    expected = _shrunk(seen, draws)
    source = expected.argmin(0)
    chosen = source, np.arange(seen.shape[1])
    return WorstCase(right[chosen], expected[chosen], tuple(scores), source)


def _shrunk(seen: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Shares of right draws (S, n), of so many draws (S,), without the part that is noise."""
    additive = seen.mean(0, keepdims=True) + seen.mean(1, keepdims=True) - seen.mean()
    rest, share = seen - additive, seen.clip(0, 1)
    noise = float((share * (1 - share) / np.maximum(draws - 1, 1)[:, None]).mean())
    spread = float((rest**2).sum()) / max((len(seen) - 1) * (seen.shape[1] - 1), 1)
    return additive + rest * max(0.0, 1 - noise / spread if spread else 0.0)


def worst_of(scores: Sequence[Predictions]) -> np.ndarray:
    """The share of right draws of each image (n,) in the `worst_case`."""
    return worst_case(scores).right
