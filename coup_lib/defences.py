"""Every defence by name: the paper's four, and the candidates and rivals of notebook 08."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from coup_lib.ascent import NORMS
from coup_lib.guidance import (
    POWER,
    ConfidenceGuided,
    DenoisedGuided,
    DistanceGuided,
    GuidanceInterval,
    Guided,
    ImageGuided,
    PredictionGuided,
    Smoothed,
    SmoothMax,
)
from coup_lib.likelihood import likelihood
from coup_lib.purify import Averaged, DiffPurePurifier, ProbabilityFlow, Purified, Purifier
from coup_lib.score import ScoreDenoiser

AVERAGED = 4  # purifications behind one decision of an averaging candidate
SMOOTHING, SMOOTHING_DRAWS = 0.1, 4  # noise of the smoothed guide, in units of the image, and its draws
# Guidance begins or ends here. No step of the profiles' grids is at this time: it would be on one side in
# float32 and on the other in float64.
SWITCH = 0.0305
ALWAYS = (0.0, 1.0)


@dataclass(frozen=True)
class Recipe:
    """What a defence is made of.

    label: its name in figures and tables. guidance: of the score (None: no guidance). times: between which
    there is guidance. smoothing: noise over which the guide is averaged. path: from the image to the purified
    one. robust_guide: guided by the adversarially trained classifier; other_norm: by that of the other norm.
    draws: purifications whose logits are averaged. maximised: no SDE but likelihood maximisation.
    differentiates_score: its own exact gradient is a second derivative of the score.
    """

    label: str
    guidance: type[Guided] | None = None
    times: tuple[float, float] = ALWAYS
    smoothing: float = 0.0
    path: type[Purifier] = Purifier
    robust_guide: bool = False
    other_norm: bool = False
    draws: int = 1
    maximised: bool = False
    differentiates_score: bool = False

    @property
    def reads_image(self) -> bool:
        """Whether the guidance is made from the attacked image, and not from the state alone."""
        return self.guidance is not None and issubclass(self.guidance, ImageGuided)

    def guide_norm(self, norm: str) -> str:
        """The norm that the robust guide was trained for, where the attack's is this one."""
        return next(name for name in NORMS if (name != norm) == self.other_norm)

    @property
    def constants(self) -> dict[str, Any]:
        """The numbers that it fixes beside a configuration's; they are part of what names a record."""
        found: dict[str, Any] = {}
        if self.times != ALWAYS:
            found["times"] = list(self.times)
        if self.smoothing:
            found |= {"smoothing": self.smoothing, "smoothing_draws": SMOOTHING_DRAWS}
        if self.draws > 1:
            found["draws"] = self.draws
        if self.guidance is SmoothMax:
            found["power"] = POWER
        return found


PURIFIERS = {
    "diffpure": Recipe("DiffPure", path=DiffPurePurifier),
    "reverse": Recipe("Reverse SDE"),
    "coup": Recipe("COUP", Guided),
    "guided-diffpure": Recipe("guided DiffPure", Guided, path=DiffPurePurifier),
    "denoised": Recipe("guided by x̂0", DenoisedGuided, differentiates_score=True),
    "low-noise": Recipe("guided at low noise", Guided, times=(0.0, SWITCH)),
    "high-noise": Recipe("guided at high noise", Guided, times=(SWITCH, 1.0)),
    "low-noise-denoised": Recipe(
        "guided at low noise by x̂0", DenoisedGuided, times=(0.0, SWITCH), differentiates_score=True
    ),
    "smoothed": Recipe("guided by a smoothed classifier", Guided, smoothing=SMOOTHING),
    "confidence-weighted": Recipe("confidence-weighted guidance", ConfidenceGuided),
    "robust-guide": Recipe("guided by a robust classifier", Guided, robust_guide=True),
    "averaged": Recipe("no guidance, averaged", draws=AVERAGED),
    "coup-averaged": Recipe("COUP, averaged", Guided, draws=AVERAGED),
    "robust-guide-averaged": Recipe("robust guide, averaged", Guided, robust_guide=True, draws=AVERAGED),
    "smooth-max": Recipe("COUP, smoothed max", SmoothMax),
    "likelihood": Recipe("likelihood maximisation", maximised=True, differentiates_score=True),
    "guided-likelihood": Recipe(
        "guided likelihood maximisation", Guided, maximised=True, differentiates_score=True
    ),
    "gdmp": Recipe("guided by distance (GDMP)", DistanceGuided, path=DiffPurePurifier),
    "prediction": Recipe("guided to the prediction of the input", PredictionGuided),
    "flow": Recipe("probability flow", path=ProbabilityFlow),
    "other-norm-guide": Recipe(
        "guided by one robust in the other norm", Guided, robust_guide=True, other_norm=True
    ),
}
LABELS = {"none": "No defence"} | {name: recipe.label for name, recipe in PURIFIERS.items()}
DEFENCES = tuple(LABELS)
PAPER = ("none", "diffpure", "reverse", "coup")
MAXIMISERS = tuple(name for name in PURIFIERS if PURIFIERS[name].maximised)  # Sec. 5.2.1
CONTROLS = ("smooth-max",)  # of notebook 07
RIVALS = ("gdmp", "prediction", "flow", "other-norm-guide")  # of notebook 08
CANDIDATES = tuple(name for name in PURIFIERS if name not in (*PAPER, *MAXIMISERS, *CONTROLS, *RIVALS))


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
    guide = Smoothed(guide, recipe.smoothing, SMOOTHING_DRAWS) if recipe.smoothing else guide
    guided = recipe.guidance(score, guide, guidance_weight) if recipe.guidance else score
    if isinstance(guided, Guided) and recipe.times != ALWAYS:
        guided = GuidanceInterval(guided, *recipe.times)
    purifier = recipe.path(guided, t_star=t_star, n_steps=n_steps, gradient=gradient)
    if recipe.draws > 1:
        return Averaged(classifier, purifier, recipe.draws)
    return Purified(classifier, purifier)


def purifications(name: str) -> int:
    """How many purifications a decision of this defence takes; 1 of what is no SDE."""
    return PURIFIERS[name].draws if name in PURIFIERS else 1


def is_guided(name: str) -> bool:
    """Whether there is guidance, and with it a second-order term."""
    return name in PURIFIERS and PURIFIERS[name].guidance is not None
