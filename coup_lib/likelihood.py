"""Likelihood maximisation (Chen et al. 2024, arXiv 2305.15241), with and without guidance (Sec. 5.2.1)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from coup_lib.checks import check_like, check_network, choice, count, number
from coup_lib.gradients import NoSecondDerivative, replayed
from coup_lib.guidance import WEIGHTS, Guided, gradient_of, log_confidence, to_image, to_state
from coup_lib.purify import Purified, StochasticPurifier, freeze, standard_normal
from coup_lib.sde import per_image
from coup_lib.solver import Callback

LIKELIHOOD_GRADIENTS = ("exact", "first_order", "bpda")
N_STEPS, LR, SIGMA = 5, 0.1, (0.4, 0.6)  # Chen et al.'s own
PER_PIXEL = 1.74  # ∫ σ⁻³ dσ over SIGMA
BETAS = (0.9, 0.999)  # of Adam, as published


class LikelihoodMaximiser(StochasticPurifier):
    """A few steps of Adam, from the image towards one that a denoiser leaves as it is.

    Minimised over x in [-1, 1], for every image apart:

        mean over its n pixels of (D(x + σε; σ) − x)²  −  λ / (1.74 n) log max_y p(y|(x + 1)/2)

    with x free in both places, a fresh σ ~ U(low, high) and ε ~ N(0, I) per image and step, and the result
    clamped once, at the end. The objectives are summed over the batch and Adam works on each pixel apart, so
    no image knows of its batch.

    The code of Chen et al. differs in three things. It takes the mean over the batch too, to which Adam is
    blind but for adam_eps. It bounds the l2 distance to the start, too widely for any 32 × 32 image to reach.
    And it seeds torch's global generator with 1 in every call: the image at one place of a batch always meets
    the same noise, and the attack's own is reset. `purify.FixedNoise` is the tidy way to such a defence.

    The paper does not say how it weighs the two terms. Here λ means what it means to COUP's score: it weighs
    log-confidence against log-likelihood. As −log p(x) = const + ∫ σ⁻³ E‖D − x‖² dσ (Kong et al. 2023), σ in
    (0.4, 0.6) contributes 1.74 n times the mean. Weighed against the mean itself, λ = 1 would let guidance
    swamp the denoising, 5,000 times stronger at 3 × 32 × 32 pixels.

    Gradients (what Adam's steps are to an attack):

        exact        backpropagation through all steps, second derivatives of D and of the classifier included
        first_order  the same with the guidance held constant
        bpda         the identity, as Chen et al. attack it

    There is no SDE, hence no adjoint. Adam's first step is lr · sign(g) up to adam_eps: wherever |g| is well
    above adam_eps its derivative vanishes, and the exact gradient of one step is BPDA's, but for the pixels
    that are clamped. From the second step on the ratios of successive gradients have a derivative, a large
    one; that a sign turns around is still seen by none. In a small trial on the digits exact was the stronger
    attack without guidance and bpda by far with weak guidance: use both.

    Args:
        denoiser: D(x, σ) → like x, an estimate of the clean image: x (B, C, H, W) is a state in [-1, 1] plus
            σ times standard normal noise, σ (B,). Twice differentiable in x for all but bpda.
        guide: images in [0, 1] → logits (B, K); None: no guidance.
        guidance_weight: λ, in the units of Eq. 5.
        n_steps: iterations.
        lr: Adam's learning rate, in units of the state: no pixel moves much further in one step.
        sigma: (low, high) of the noise level.
        adam_eps: Adam's ε.
        gradient: one of `LIKELIHOOD_GRADIENTS`.
        seed: of the purifier's generator, as in `StochasticPurifier`.

    Raises:
        ValueError: for an unknown gradient, or a setting out of range; in `forward`, for a denoiser whose
            answer is not like x.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        guide: nn.Module | None = None,
        *,
        guidance_weight: float = 1.0,
        n_steps: int = N_STEPS,
        lr: float = LR,
        sigma: tuple[float, float] = SIGMA,
        adam_eps: float = 1e-8,
        gradient: str = "exact",
        seed: int | None = None,
    ) -> None:
        choice("gradient (there is no SDE, so no adjoint)", gradient, LIKELIHOOD_GRADIENTS)
        super().__init__(gradient, seed)
        self.denoiser = freeze("denoiser", denoiser)
        self.guide = None if guide is None else freeze("guide", guide)
        if gradient == "first_order" and any(isinstance(part, Guided) for part in denoiser.modules()):
            raise ValueError("gradient: first_order holds the guide constant, not guidance in the denoiser")
        self.guidance_weight = number("guidance_weight", guidance_weight, *WEIGHTS)
        self.n_steps = count("n_steps", n_steps)
        self.lr, self.adam_eps = number("lr", lr, 0), number("adam_eps", adam_eps, 0)
        self.sigma = sigma
        if not 0 < sigma[0] <= sigma[1]:
            raise ValueError(f"sigma: expected (low, high) with 0 < low <= high; got {sigma}")

    def slope(self, x: Tensor, noise: Tensor) -> Tensor:
        """∇ₓ of the objective at states x (B, C, H, W), for one step's noise (B, 1 + CHW) of `draw`."""
        sigma, epsilon = self.level(noise[:, 0]), noise[:, 1:].reshape(x.shape)
        denoiser = self._without_second_derivatives if self.gradient == "first_order" else self.denoiser
        slope = gradient_of(lambda x: denoising_error(denoiser, x, sigma, epsilon), x)
        if self.guide is None:
            return slope
        guide, weight = self.guide, self.guidance_weight / (PER_PIXEL * x[0].numel())
        x = x.detach() if self.gradient == "first_order" else x
        return slope - weight * gradient_of(lambda x: log_confidence(guide, x), x)

    def _without_second_derivatives(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoiser's answer; ValueError where guidance that no module shows is in it."""
        with NoSecondDerivative():
            return self.denoiser(x, sigma)

    def level(self, normal: Tensor) -> Tensor:
        """σ, uniform in its range: by the distribution function of the standard normal draw (B,)."""
        low, high = self.sigma
        return low + (high - low) * torch.special.ndtr(normal)

    def draw(self, x: Tensor, seeds: Tensor) -> Tensor:
        """(n_steps, B, 1 + CHW) standard normal: what makes an image's σ, and its ε."""
        return standard_normal(seeds, self.n_steps, x.new_empty(len(x), 1 + x.shape[1:].numel()))

    def _run(self, x: Tensor, noise: Tensor) -> Tensor:
        for name, network in self.named_children():
            check_network(name, network, x)

        def step(index: int, state: Tensor) -> Tensor:
            slope = self.slope(state[0], noise[index])
            return adam_step(state, slope, index + 1, self.lr, self.adam_eps)

        def run(state: Tensor, callback: Callback) -> Tensor:
            for index in range(self.n_steps):
                callback(index, 0.0, state)
                state = step(index, state)
            callback(self.n_steps, 0.0, state)
            return state

        start = torch.stack([to_state(x), torch.zeros_like(x), torch.zeros_like(x)])
        return to_image(replayed(start, run, step, self)[0].clamp(-1, 1))


def likelihood(
    classifier: nn.Module, denoiser: nn.Module, guidance_weight: float = 0.0, **settings: Any
) -> Purified:
    """Likelihood maximisation before a classifier, which guides it where the weight is not 0.

    Settings are those of `LikelihoodMaximiser`.
    """
    guide = classifier if guidance_weight else None
    return Purified(
        classifier, LikelihoodMaximiser(denoiser, guide, guidance_weight=guidance_weight, **settings)
    )


def denoising_error(
    denoiser: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, noise: Tensor
) -> Tensor:
    """(B,): the mean over pixels of (D(x + σε; σ) − x)², at states x (B, C, H, W), σ (B,) and ε like x."""
    denoised = check_like("denoiser", denoiser(x + per_image(sigma, x) * noise, sigma), x)
    return (denoised - x).square().flatten(1).mean(1)


def adam_step(state: Tensor, slope: Tensor, step: int, lr: float, eps: float) -> Tensor:
    """Adam's step number 1, 2, … (Kingma & Ba 2015, Algorithm 1), differentiable.

    state is (x, m, v) in one tensor (3, *slope.shape), and so is the result: a replay needs all three.
    """
    (x, m, v), (decay_m, decay_v) = state, BETAS
    m = decay_m * m + (1 - decay_m) * slope
    v = decay_v * v + (1 - decay_v) * slope.square()
    root = _root(v / (1 - decay_v**step))
    return torch.stack([x - lr * (m / (1 - decay_m**step)) / (root + eps), m, v])


def _root(v: Tensor) -> Tensor:
    """√v with derivative 0 at v = 0, where autograd's is infinite and turns 0 · ∞ into NaN."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)
