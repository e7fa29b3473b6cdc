"""Classifier-confidence guidance (Sec. 4.1.2): a wrapper that adds itself to a score."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coup_lib.checks import check_like, check_logits, count, number, warn_of_probabilities
from coup_lib.contexts import assigned
from coup_lib.hessian import frozen_layers
from coup_lib.score import agreed_sde, sde_of
from coup_lib.sde import VPSDE, per_image
from coup_lib.solver import time_of

WEIGHTS = -1e3, 1e3  # λ lies between; a negative one is a control, guidance with its sign flipped

POWER = 2.0  # of the smoothed maximum

_asked: WeakSet[nn.Module] = WeakSet()  # the guides that have answered, of which one warning is enough
_constant = ContextVar("guidance is a constant", default=False)


def to_image(state: Tensor) -> Tensor:
    """The SDE's state in [-1, 1] as an image in [0, 1]."""
    return (state + 1) / 2


def to_state(image: Tensor) -> Tensor:
    """An image in [0, 1] as the SDE's state in [-1, 1]."""
    return image * 2 - 1


def log_confidence(classifier: nn.Module, x: Tensor) -> Tensor:
    """log max_y p(y|x), (B,), at the state x (B, C, H, W) in [-1, 1]; the classifier sees it in [0, 1]."""
    logits = check_logits(classifier(to_image(x)), x)
    if classifier not in _asked:
        _asked.add(classifier)
        warn_of_probabilities("guide", logits, "guidance by them is weak")
    return F.log_softmax(logits, dim=1).amax(dim=1)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∇ₓ of function, (B, ...) to (B,), at x.

    The result can be differentiated again where x asks for a gradient and gradients are on: that is the
    second-order term of Sec. 4.2.1. Whether it can or not, its value is the same.
    """
    second_order = torch.is_grad_enabled() and x.requires_grad
    # In inference mode nothing can be differentiated, nor can what was made in it: hence the copy.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        guidance_is_constant(False),
        frozen_layers(x) if second_order else nullcontext(),
    ):
        x = x if second_order else x.detach().clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x, create_graph=second_order)[0]


class Guided(nn.Module):
    """s(x, t) + λ ∇ₓ log max_y p(y|x): the bracket of Eq. 5.

    Another guidance is a subclass with a `guidance` of its own: what `forward` adds is what `FirstOrder`
    holds constant, however the guided score is wrapped. torch.compile belongs around the score inside:
    compiled code has no second derivatives.

    Args:
        score: s(x, t).
        classifier: images (B, C, H, W) in [0, 1] → logits (B, K); not conditioned on t.
        weight: λ; 0 gives the score itself, 1 is the paper's choice.

    Attributes:
        calls: of the classifier in each step, a derivative counting as one.
    """

    calls = 2

    def __init__(self, score: nn.Module, classifier: nn.Module, weight: float = 1.0) -> None:
        super().__init__()
        self.score, self.classifier = score, classifier
        self.weight = number("guidance_weight", weight, *WEIGHTS)
        self.sde = sde_of(score)

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """λ ∇ₓ log max_y p(y|x), like x."""
        return self.weight * gradient_of(lambda x: log_confidence(self.classifier, x), x)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided score at x (B, C, H, W) in [-1, 1] and t of shape () or (B,)."""
        return check_like("score", self.score(x, t), x) + self.guidance(held(x), t)


class FirstOrder(nn.Module):
    """A score whose derivative leaves the second-order guidance term out.

    All guidance that a `Guided` adds is held constant, in whatever the score is made of.
    """

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """s(x, t) for x (B, ...) and t of shape () or (B,)."""
        with guidance_is_constant(True):
            return self.score(x, t)


def guidance_is_constant(whether: bool) -> AbstractContextManager[None]:
    """In here `held` cuts guidance off from its graph, or does not."""
    return assigned(_constant, whether)


def held(x: Tensor) -> Tensor:
    """The x at which guidance is to be taken: a constant in `FirstOrder`."""
    return x.detach() if _constant.get() else x


# --- guidance beyond the paper (notebooks 07 and 08) ---


class DenoisedGuided(Guided):
    """Guidance by what the classifier makes of the denoised estimate x̂0 = (x + std² s)/m instead of x.

    The gradient runs through the score network, so it is taken in x and not in x̂0.
    """

    sde: VPSDE

    def __init__(self, score: nn.Module, classifier: nn.Module, weight: float = 1.0) -> None:
        super().__init__(score, classifier, weight)
        self.sde = agreed_sde(score, None)

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """Tweedie's E[x_0 | x_t = x], like x."""
        return (x + self.sde.std(t) ** 2 * self.score(x, t)) / self.sde.mean_coeff(t)

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """λ ∇ₓ log max_y p(y|x̂0(x, t)), like x."""
        return self.weight * gradient_of(lambda x: log_confidence(self.classifier, self.denoised(x, t)), x)


class ConfidenceGuided(Guided):
    """λ ∇ₓ max_y p(y|x): without the logarithm, guidance fades as the classifier doubts."""

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """λ p ∇ₓ log p with p = max_y p(y|x), like x."""
        return self.weight * gradient_of(lambda x: log_confidence(self.classifier, x).exp(), x)


class SmoothMax(Guided):
    """Guidance by log (Σ_y p(y|x)^k)^(1/k) with k = `POWER`: the maximum over classes without its kink.

    COUP's own guidance ∇ log max_y p jumps where the classifier changes its mind; this one does not.
    """

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """λ ∇ₓ of the smoothed log confidence, like x."""

        def smooth(x: Tensor) -> Tensor:
            return torch.logsumexp(POWER * F.log_softmax(self.classifier(to_image(x)), 1), 1) / POWER

        return self.weight * gradient_of(smooth, x)


class GuidanceInterval(Guided):
    """A guided score's guidance for times in [low, high] only."""

    def __init__(self, guided: Guided, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(guided.score, guided.classifier, guided.weight)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low, high: expected 0 <= low <= high <= 1; got {low} and {high}")
        self.guided, self.low, self.high = guided, low, high

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """The guidance, or zero outside of the times, like x; t of shape ()."""
        return self.guided.guidance(x, t) if self.low <= time_of(t) <= self.high else torch.zeros_like(x)


class ImageGuided(Guided):
    """Guidance that reads the attacked image; a `Purifier` carries the image beside the state.

    The score is that of pairs (state, image) along the channels, (B, 2C, H, W), so that every gradient of a
    path follows the image, too. The image's half, -x/2, is where the reverse SDE has no drift. A subclass has
    a `guidance` of pairs, like the states among them.
    """

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided score at pairs x (B, 2C, H, W) in [-1, 1] and t of shape () or (B,), like x."""
        state, image = x.chunk(2, dim=1)
        score = check_like("score", self.score(state, t), state)
        return torch.cat([score + self.guidance(held(x), t), -image / 2], dim=1)


class DistanceGuided(ImageGuided):
    """GDMP's guidance (Wang et al., arXiv 2205.14969): towards the attacked image y, noised to the same time.

    Down the slope of half the squared distance, by λ std/m, which is that paper's schedule √(1-ᾱ)/√ᾱ; what
    it divides by (the radius of the attack, the number of pixels) is in λ. The noise of y_t averages out, so
    that the slope is x - m y. The classifier is not asked.
    """

    calls = 0

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """-λ (std/m) (x - m y), like the states."""
        (state, image), sde = x.chunk(2, dim=1), agreed_sde(self.score, None)
        mean, std = per_image(sde.mean_coeff(t), x), per_image(sde.std(t), x)
        return -self.weight * std / mean * (state - mean * image)


class PredictionGuided(ImageGuided):
    """Guidance towards what the classifier says of the attacked image y, as DiffAP's (arXiv 2411.18956)."""

    calls = 3

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """λ ∇ₓ Σ_k p(k|y) log p(k|x), like the states."""
        state, image = x.chunk(2, dim=1)

        def agreement(state: Tensor) -> Tensor:
            # A copy, as in `gradient_of`: what comes from inference mode cannot be differentiated.
            said = self.classifier(to_image(image.clone())).softmax(1)
            return (said * F.log_softmax(self.classifier(to_image(state)), 1)).sum(1)

        return self.weight * gradient_of(agreement, state)


class Smoothed(nn.Module):
    """A classifier's mean probabilities over fixed Gaussian noise on the image, as logits (B, K)."""

    def __init__(self, classifier: nn.Module, std: float, draws: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.classifier, self.std, self.draws, self.seed = classifier, std, count("draws", draws), seed

    def forward(self, x: Tensor) -> Tensor:
        """log of the mean of p(y|x + std·ε), the same ε for every image x (B, C, H, W) in [0, 1]."""
        shape = (self.draws, 1, *x.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(x)
        logits = self.classifier((x + self.std * noise).flatten(0, 1))
        return torch.logsumexp(logits.log_softmax(1).unflatten(0, (self.draws, len(x))), dim=0)  # − log draws
