"""Signs of gradient masking, and what else makes an attack's numbers mean less than they seem to.

The rules are those of Athalye et al. (arXiv:1802.00420, Sec. 3.1) and Carlini et al. (arXiv:1902.06705).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from coup_lib.auditing.probe import Probe
from coup_lib.evaluation.outcomes import Accuracy, Difference, Predictions, Transfer, worst_of

# Attacks by the defence's own gradient, by their columns.
OWN = ("ce", "long", "dlr", "margin", "kept", "em", "steps", "low", "vote")
WEAKER = ("fgsm", "square", "rays", "noise")
EFFORTS = ("short", "ce", "long")  # each with more iterations than the one before
NOT_COMPARED = ("clean", "single", "standard", "restart", "worst", *EFFORTS)
TOLERANCE = 2.0  # points by which a cheaper attack or more work may win
LOSS_TOLERANCE = 5.0  # points that a loss may be better than another one
NOISE_TOLERANCE = 10.0  # points that several draws a gradient may be better than one, or than random noise
ZERO_TOLERANCE = 0.05  # share of images that may have a gradient of zero

# What an attack gets over by itself, or what may be meant.
HARMLESS = (
    "parts in train mode",
    "batch normalisation in train mode",
    "probabilities instead of logits",
    "another loss is stronger than the cross-entropy",
    "clean accuracy is not above chance",
)


@dataclass(frozen=True)
class Sign:
    """Something that an attacker or a reader should know of a defence, if it is seen.

    shown: by which numbers.
    """

    defence: str
    name: str
    shown: str
    seen: bool = True

    @property
    def masking(self) -> bool:
        """Whether it is a sign of gradient masking."""
        return self.seen and self.name not in HARMLESS

    def __str__(self) -> str:
        return f"{self.defence}: {self.name} ({self.shown})"


def signs(
    defence: str,
    found: Probe,
    row: Mapping[Any, Predictions],
    label: Mapping[Any, str],
    by_radius: Mapping[float, np.ndarray],
) -> list[Sign]:
    """Every sign that is seen on one defence.

    Args:
        row: column or `Transfer` → predictions.
        label, by_radius: those of `compared`.
    """
    shown = asked(defence, found)
    if not found.error:
        right = {key: score.right for key, score in row.items()} | {"worst": worst_of([*row.values()])}
        others = {key: score.selection for key, score in row.items()}
        shown += compared(defence, right, others, label, by_radius, row["clean"].labels)
    return [sign for sign in shown if sign.seen]


def asked(defence: str, found: Probe) -> list[Sign]:
    """What was found out by asking."""
    shown = {
        "no gradient": found.error,
        "no gradient in some calls": f"{found.missing:.0%} of them" if 0 < found.missing < 1 else "",
        "gradients of zero": f"on {found.zero:.0%} of the images" if found.zero > ZERO_TOLERANCE else "",
        "gradients with NaN or infinity": f"on {found.broken:.0%} of the images" if found.broken else "",
        "gradients that turn at once": "0.001 apart they have nothing in common" if found.turned else "",
        "frozen noise": "it draws random numbers, in every call the same" if found.frozen else "",
        "answers depend on the batch": "judged one by one" if found.alone and not found.random else "",
        "answers that are no numbers": f"{found.unanswered:.0%} of clean images" if found.unanswered else "",
        "answers change with use": "after the audit, other than before" if found.changed else "",
        "probabilities instead of logits": "attacked through their logarithm" if found.probabilities else "",
        "batch normalisation in train mode": ", ".join(found.batch_statistics),
        "parts in train mode": ", ".join(found.dropping),
    }
    return [Sign(defence, name, text, seen=bool(text)) for name, text in shown.items()]


def compared(
    defence: str,
    right: Mapping[Any, np.ndarray],
    selection: Mapping[Any, np.ndarray],
    label: Mapping[Any, str],
    by_radius: Mapping[float, np.ndarray],
    labels: np.ndarray,
    own: Sequence[str] = OWN,
) -> list[Sign]:
    """Whether one attack beside another, or a larger radius, is a sign; seen or not.

    A difference counts where its paired interval excludes zero and it is above the tolerance. There is no
    correction for how many attacks are tried: to look again at an honest defence costs less than to pass over
    a masked one.

    Args:
        right: column or `Transfer` → the share of right draws of each image, (n,). There are "ce" (APGD on
            the cross-entropy by its own gradient), "noise" and "worst" (the worst case); what else is not
            there is not asked for.
        selection: likewise → the share of other draws, by which the strongest attack is chosen.
        label: likewise → what the attack is called.
        by_radius: radius → the share of right draws of each image, (m,), as the radius grows.
        labels: (n,), which classes there are.
        own: attacks by its own gradient, to the strongest of which the others are compared.
    """
    found: list[Sign] = []
    strongest = strongest_of([key for key in own if key in right], selection)
    others = [key for key in right if key not in (*OWN, *NOT_COMPARED)]

    def ask(name: str, keys: Sequence[Any], than: Any, tolerance: float = TOLERANCE) -> None:
        keys = [key for key in keys if key in right]
        if keys and than in right:
            won = [key for key in keys if _wins(right[key], right[than], tolerance)]
            best = strongest_of(won or keys, selection)
            shown = f"{label[best]} leaves {_percent(right[best])}, {label[than]} {_percent(right[than])}"
            found.append(Sign(defence, name, shown, seen=bool(won)))

    borrowed = [key for key in others if isinstance(key, Transfer)]
    cheaper = [key for key in others if key not in (*borrowed, *WEAKER)]
    ask("images made against another defence are stronger", borrowed, strongest)
    ask("another gradient is stronger than its own", cheaper, strongest)
    ask("an attack that sees less is stronger", WEAKER, strongest)
    ask("another loss is stronger than the cross-entropy", ("dlr", "margin"), "ce", LOSS_TOLERANCE)
    ask("its noise hides the gradient", ("ce",), "single", NOISE_TOLERANCE)
    ask("another start still finds something", ("restart",), "ce")
    efforts = [key for key in EFFORTS if key in right]
    shown = ", ".join(f"{label[key]} {_percent(right[key])}" for key in efforts)
    seen = any(_wins(right[more], right[less]) for less, more in pairwise(efforts))
    found.append(Sign(defence, "more iterations still find something", shown, seen=seen))
    found += _at_large_radius(defence, by_radius, labels) + _like_noise(defence, right)
    return found + _at_chance(defence, right, labels)


def strongest_of(keys: Sequence[Any], selection: Mapping[Any, np.ndarray]) -> Any:
    """The attack that leaves least, by other draws than those that are reported."""
    return min(keys, key=lambda key: float(selection[key].mean()))


def _wins(stronger: np.ndarray, weaker: np.ndarray, tolerance: float = TOLERANCE) -> bool:
    """Whether an attack leaves less than another, by more than the tolerance and than noise explains."""
    difference = Difference.of(stronger, weaker)
    return difference.value < -tolerance and difference.high < 0


def _like_noise(defence: str, right: Mapping[Any, np.ndarray]) -> list[Sign]:
    """The gradient is shown to be hardly better than random noise, though the defence can be attacked."""
    noise, exact, worst = (right[key] for key in ("noise", "ce", "worst"))
    seen = Difference.of(noise, exact).high < NOISE_TOLERANCE and _wins(worst, exact)
    shown = f"{_percent(noise)} against {_percent(exact)}"
    return [Sign(defence, "random noise does as much as the gradient", shown, seen=seen)]


def _at_large_radius(defence: str, by_radius: Mapping[float, np.ndarray], labels: np.ndarray) -> list[Sign]:
    """Accuracy has to fall with the radius, and where every image can be made grey, to chance.

    It is above chance if its interval is: of few images, all grey, more than a share of 1 / classes may be of
    one class.
    """
    if not by_radius:
        return []
    radius, right = [*by_radius.items()][-1]
    chance = 1 / len(np.unique(labels))
    rises = any(_wins(less, more, 0.0) for less, more in pairwise(by_radius.values()))
    shown = f"{_percent(right)} at {radius:.3g}, chance {100 * chance:.3g} %" + ", and rises" * rises
    seen = rises or Accuracy.of(right).low > 100 * chance
    return [Sign(defence, "accuracy at a large radius stays above chance", shown, seen=seen)]


def _at_chance(defence: str, right: Mapping[Any, np.ndarray], labels: np.ndarray) -> list[Sign]:
    """Clean accuracy is near chance: the labels may be in another order than the logits."""
    if "clean" not in right:
        return []
    found, chance = Accuracy.of(right["clean"]), 100 / max(2, len(np.unique(labels)))
    shown = f"{found}, chance {chance:.3g} %; are the labels in the order of the logits?"
    seen = found.low <= chance and found.value < 2 * chance
    return [Sign(defence, "clean accuracy is not above chance", shown, seen=seen)]


def _percent(right: np.ndarray) -> str:
    return f"{100 * right.mean():.1f} %"
