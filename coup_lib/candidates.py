"""Guided purifiers beyond the paper, for notebook 08: each a wrapper like `guidance.Guided`."""

import torch
from torch import Tensor, nn

from coup_lib.checks import check_images, check_seeds, count
from coup_lib.guidance import Guided, gradient_of, log_confidence
from coup_lib.purify import Purified, Purifier
from coup_lib.score import agreed_sde
from coup_lib.sde import VPSDE

STRIDE = 0x9E3779B1  # between the seeds of one image's purifications


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


class Between(Guided):
    """A guided score's guidance for times in [low, high] only."""

    def __init__(self, guided: Guided, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__(guided.score, guided.classifier, guided.weight)
        if not low <= high:
            raise ValueError(f"low, high: expected low <= high; got {low} and {high}")
        self.guided, self.low, self.high = guided, low, high

    def guidance(self, x: Tensor, t: Tensor) -> Tensor:
        """The guidance, or zero outside of the times, like x; t of shape ()."""
        return self.guided.guidance(x, t) if self.low <= float(t) <= self.high else torch.zeros_like(x)


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


class Averaged(Purified):
    """Decides by the mean logits over several purifications of the image."""

    def __init__(self, classifier: nn.Module, purifier: Purifier, draws: int = 4) -> None:
        super().__init__(classifier, purifier)
        self.draws = count("draws", draws)

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Mean logits (B, K); an image's seed (B,) fixes all of its purifications."""
        check_images(x, self.purifier.margin)
        if seeds is not None:
            check_seeds(seeds, x)
            # An odd stride: of a seed, torch's generator on the CPU takes the low 32 bits only.
            places = torch.arange(self.draws, device=seeds.device)
            seeds = ((seeds[:, None] + places * STRIDE) % 2**62).flatten()
        logits = super().forward(x.repeat_interleave(self.draws, dim=0), seeds)
        return logits.unflatten(0, (len(x), self.draws)).mean(1)
