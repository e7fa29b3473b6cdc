"""Every defence by name: the paper's four, and the candidates of notebook 08."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from coup_lib.candidates import Averaged, Between, ConfidenceGuided, DenoisedGuided, Smoothed
from coup_lib.guidance import Guided
from coup_lib.likelihood import likelihood
from coup_lib.purify import DiffPurePurifier, Purified, Purifier
from coup_lib.score import ScoreDenoiser

GuidedScore = Callable[[nn.Module, nn.Module, float], nn.Module]  # score, guide, λ → score
AVERAGED = 4  # purifications behind one decision of an averaging candidate
SMOOTHING = 0.1  # noise of the smoothed guide, in units of the image
# Guidance begins or ends here: late is below, early above. No step of the profiles' grids is at this time: it
# would be on one side in float32 and on the other in float64.
SWITCH = 0.0305


@dataclass(frozen=True)
class Recipe:
    """What a defence is made of.

    label: its name in figures and tables. guidance: makes the guided score (None: no guidance).
    forward_noise: starts like DiffPure. robust_guide: guided by the adversarially trained classifier.
    draws: purifications whose logits are averaged. maximised: no SDE but likelihood maximisation.
    through_score: it differentiates the score, so that its own exact gradient is a second derivative of that.
    """

    label: str
    guidance: GuidedScore | None = None
    forward_noise: bool = False
    robust_guide: bool = False
    draws: int = 1
    maximised: bool = False
    through_score: bool = False


def guided_late(score: nn.Module, guide: nn.Module, weight: float) -> nn.Module:
    """Guidance near the image only."""
    return Between(Guided(score, guide, weight), high=SWITCH)


def guided_early(score: nn.Module, guide: nn.Module, weight: float) -> nn.Module:
    """Guidance far from the image only."""
    return Between(Guided(score, guide, weight), low=SWITCH)


def guided_late_by_denoised(score: nn.Module, guide: nn.Module, weight: float) -> nn.Module:
    """Guidance by x̂0, near the image only."""
    return Between(DenoisedGuided(score, guide, weight), high=SWITCH)


def guided_by_smoothed(score: nn.Module, guide: nn.Module, weight: float) -> nn.Module:
    """Guidance by the expectation over noise."""
    return Guided(score, Smoothed(guide, SMOOTHING), weight)


PURIFIERS = {
    "diffpure": Recipe("DiffPure", forward_noise=True),
    "reverse": Recipe("COUP w/o guidance"),
    "coup": Recipe("COUP", Guided),
    "noised": Recipe("guided after forward noise", Guided, forward_noise=True),
    "denoised": Recipe("guided by x̂0", DenoisedGuided, through_score=True),
    "late": Recipe("guided late", guided_late),
    "early": Recipe("guided early", guided_early),
    "late-denoised": Recipe("guided late by x̂0", guided_late_by_denoised, through_score=True),
    "smoothed": Recipe("guided by a smoothed classifier", guided_by_smoothed),
    "doubting": Recipe("guidance fading with doubt", ConfidenceGuided),
    "robust-guide": Recipe("guided by a robust classifier", Guided, robust_guide=True),
    "averaged": Recipe("no guidance, averaged", draws=AVERAGED),
    "coup-averaged": Recipe("COUP, averaged", Guided, draws=AVERAGED),
    "robust-guide-averaged": Recipe("robust guide, averaged", Guided, robust_guide=True, draws=AVERAGED),
    "likelihood": Recipe("likelihood maximisation", maximised=True, through_score=True),
    "guided-likelihood": Recipe("guided likelihood maximisation", Guided, maximised=True, through_score=True),
}
LABELS = {"none": "No defence"} | {name: recipe.label for name, recipe in PURIFIERS.items()}
DEFENCES = tuple(LABELS)
PAPER = ("none", "diffpure", "reverse", "coup")
MAXIMISERS = tuple(name for name in PURIFIERS if PURIFIERS[name].maximised)  # Sec. 5.2.1
CANDIDATES = tuple(name for name in PURIFIERS if name not in (*PAPER, *MAXIMISERS))


def build(
    recipe: Recipe,
    classifier: nn.Module,
    score: nn.Module,
    guide: nn.Module,
    *,
    guidance_weight: float,
    t_star: float,
    n_steps: int,
    gradient: str,
) -> Purified:
    """The recipe's purifier around the classifier; `guide` is whose confidence guides, if any does.

    Likelihood maximisation has iterations of its own, and knows neither t_star nor n_steps.
    """
    if recipe.maximised:
        weight = guidance_weight if recipe.guidance else 0.0
        return likelihood(classifier, ScoreDenoiser(score), weight, gradient=gradient)
    guided = recipe.guidance(score, guide, guidance_weight) if recipe.guidance else score
    kind = DiffPurePurifier if recipe.forward_noise else Purifier
    purifier = kind(guided, t_star=t_star, n_steps=n_steps, gradient=gradient)
    if recipe.draws > 1:
        return Averaged(classifier, purifier, recipe.draws)
    return Purified(classifier, purifier)


def purifications(name: str) -> int:
    """How many purifications a decision of this defence takes; 1 of what is no SDE."""
    return PURIFIERS[name].draws if name in PURIFIERS else 1


def is_guided(name: str) -> bool:
    """Whether there is guidance, and with it a second-order term."""
    return name in PURIFIERS and PURIFIERS[name].guidance is not None
