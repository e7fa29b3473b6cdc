"""Signs of gradient masking, and what else makes an audit's numbers mean less than they seem to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from coup_lib.auditing.probe import Probe
from coup_lib.evaluation.outcomes import Accuracy, Difference, Predictions, Transfer, worst_of
from coup_lib.evaluation.stats import LEVEL

EXACT = ("ce", "long", "dlr", "margin", "kept", "em", "steps", "low")  # attacks by the defence's own gradient
WEAKER = ("fgsm", "square", "noise")
TOLERANCE = 2.0  # points by which a cheaper attack or more work may win
LOSS_TOLERANCE = 5.0  # points that a loss may be better than another one
NOISE_TOLERANCE = 10.0  # points that several draws a gradient may be better than one
ZERO_TOLERANCE = 0.05  # share of images that may have a gradient of zero


@dataclass(frozen=True)
class Sign:
    """Something that an attacker or a reader should know of a defence.

    masking: whether it is a sign of gradient masking. shown: by which numbers.
    """

    defence: str
    name: str
    shown: str
    masking: bool = True

    def __str__(self) -> str:
        return f"{self.defence}: {self.name} ({self.shown})"


def signs(
    defence: str,
    found: Probe,
    row: Mapping[Any, Predictions],
    label: Mapping[Any, str],
    by_radius: Mapping[float, np.ndarray],
) -> list[Sign]:
    """Every sign on one defence; differences count where a paired interval excludes zero.

    Args:
        row: column or `Transfer` → predictions.
        label: likewise → what the attack is called.
        by_radius: radius → the share of right draws of each image, (n,), as the radius grows.
    """
    shown = _asked(found)
    if not found.error:
        shown |= _compared({key: score.right for key, score in row.items()}, label)
        shown |= _at_large_radius(by_radius, row["clean"].labels)
        worst = worst_of([*row.values()])
        shown |= _like_noise(row["noise"].right, row["ce"].right, worst)
    return [Sign(defence, name, text, masking=name not in HARMLESS) for name, text in shown.items()]


# What an attack gets over by itself, or what may be meant.
HARMLESS = (
    "parts in train mode",
    "batch normalisation in train mode",
    "probabilities instead of logits",
    "another loss is stronger than the cross-entropy",
)


def _asked(found: Probe) -> dict[str, str]:
    """Name of a sign → what showed it, from what was found out by asking."""
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
    return {name: text for name, text in shown.items() if text}


def _compared(right: Mapping[Any, np.ndarray], label: Mapping[Any, str]) -> dict[str, str]:
    """The signs that one attack gives beside another."""
    exact = {key: right[key] for key in EXACT if key in right}
    strongest = min(exact, key=lambda key: float(exact[key].mean()))
    others = [key for key in right if key not in (*EXACT, "clean", "single", "standard")]
    beaten = {
        key: right[key]
        for key in others
        if _wins(right[key], exact[strongest], TOLERANCE, 1 - (1 - LEVEL) / len(others))
    }

    def said(keys: list[Any], than: Any) -> str:
        best = min(keys, key=lambda key: float(right[key].mean()))
        return f"{label[best]} leaves {_percent(right[best])}, {label[than]} {_percent(right[than])}"

    borrowed = [key for key in beaten if isinstance(key, Transfer)]
    cheaper = [key for key in beaten if key not in (*borrowed, *WEAKER)]
    weaker = [key for key in beaten if key in WEAKER]
    losses = [key for key in ("dlr", "margin") if key in right]
    found = {}
    if borrowed:
        found["images made against another defence are stronger"] = said(borrowed, strongest)
    if cheaper:
        found["another gradient is stronger than its own"] = said(cheaper, strongest)
    if weaker:
        found["an attack that sees less is stronger"] = said(weaker, strongest)
    if any(_wins(right[key], right["ce"], LOSS_TOLERANCE, LEVEL) for key in losses):
        found["another loss is stronger than the cross-entropy"] = said(losses, "ce")
    if "single" in right and _wins(right["ce"], right["single"], NOISE_TOLERANCE, LEVEL):
        found["its noise hides the gradient"] = said(["ce"], "single")
    if _wins(right["long"], right["ce"], TOLERANCE, LEVEL):
        found["more iterations still find something"] = said(["long"], "ce")
    return found


def _wins(stronger: np.ndarray, weaker: np.ndarray, tolerance: float, level: float) -> bool:
    """Whether an attack leaves less than another, by more than the tolerance and than noise explains."""
    difference = Difference.of(stronger, weaker, level)
    return difference.value < -tolerance and difference.high < 0


def _like_noise(noise: np.ndarray, exact: np.ndarray, worst: np.ndarray) -> dict[str, str]:
    """The gradient is no better than random noise, though the defence can be attacked."""
    if _wins(exact, noise, 0.0, LEVEL) or not _wins(worst, exact, TOLERANCE, LEVEL):
        return {}
    return {"random noise does as much as the gradient": f"{_percent(noise)} against {_percent(exact)}"}


def _at_large_radius(by_radius: Mapping[float, np.ndarray], labels: np.ndarray) -> dict[str, str]:
    """At the last radius every image can be made grey, so that no more than one class can be right."""
    if not by_radius:
        return {}
    radius, right = [*by_radius.items()][-1]
    chance = 100 * np.bincount(labels[: len(right)]).max() / len(right)
    left = Accuracy.of(right)
    if left.low <= chance:
        return {}
    shown = f"{left} % at {radius:.3g}, commonest class {chance:.0f} %"
    return {"accuracy at a large radius stays above chance": shown}


def _percent(right: np.ndarray) -> str:
    return f"{100 * right.mean():.1f} %"
