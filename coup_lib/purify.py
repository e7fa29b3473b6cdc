"""Purifiers as wrappers: around a score, and around a classifier (Algorithm 1)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from coup_lib.checks import (
    ROUNDING,
    check_images,
    check_logits,
    check_module,
    check_network,
    check_seeds,
    choice,
    count,
    number,
    warn_of_probabilities,
)
from coup_lib.gradients import (
    GRADIENTS,
    THROUGH_STEPS,
    check_compiled,
    images_kept,
    in_one_graph,
    solve_with_gradient,
)
from coup_lib.guidance import Guided, ImageGuided, to_image, to_state
from coup_lib.score import agreed_sde
from coup_lib.sde import T_END, VPSDE
from coup_lib.solver import Callback, Noise, solve, time_grid

STRIDE = 0x9E3779B1  # between the seeds of one image's purifications
SMALL = 2048  # so many numbers are drawn at once, as fewer take no less time


class StochasticPurifier(nn.Module):
    """What every purifier shares: noise of its own, and its gradient by name.

    Images (B, C, H, W) in [0, 1] go in and come out. Noise comes from the purifier's own generator, never
    from torch's global one: attacks reseed that, and would freeze the defence's noise.

    Args:
        gradient: one of `gradients.GRADIENTS`.
        seed: of the purifier's generator; None: fresh entropy, so that no two purifiers draw the same.

    Attributes:
        margin: how far beyond [0, 1] images may lie. A study that steps over the edge sets it.

    Raises:
        ValueError: for an unknown gradient.
    """

    margin = ROUNDING

    def __init__(self, gradient: str, seed: int | None) -> None:
        super().__init__()
        self.gradient = choice("gradient", gradient, GRADIENTS)
        self.reseed(seed)

    def reseed(self, seed: int | None = None) -> None:
        """Start the purifier's own generator anew; None: from fresh entropy."""
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Purify x (B, C, H, W) in [0, 1]; seeds (B,) int64 fix each image's noise, else it is fresh.

        One seed gives one image the same noise in whatever batch, place and precision.

        Raises:
            ValueError: for what is no batch of images in [0, 1], or not one seed per image.
            FloatingPointError: for NaN or infinity on the way, naming the network.
        """
        check_images(x, self.margin)
        noise = self._noise(x, seeds)
        if self.gradient == "bpda":
            with torch.no_grad():
                purified = self._run(x, noise)
            return x + (purified - x).detach()
        return self._run(x, noise)

    def _noise(self, x: Tensor, seeds: Tensor | None) -> Any:
        if seeds is None:
            seeds = torch.randint(2**62, (len(x),), generator=self._generator)
        return self.draw(x, seeds)

    def draw(self, x: Tensor, seeds: Tensor) -> Any:
        """All noise that purifying x takes, the image's at place b from seeds[b] alone; for `_run`."""
        raise NotImplementedError

    def _run(self, x: Tensor, noise: Any) -> Tensor:
        """The purified x, differentiable as `gradient` says ("bpda" is not asked)."""
        raise NotImplementedError


class Purifier(StochasticPurifier):
    """The reverse-time SDE run straight from the image ("COUP w/o guidance"; with a `Guided` score, COUP).

    The SDE lives in [-1, 1]. The result is clamped, as in the COUP release.

    Args:
        score: s(x, t) on states.
        t_star: where the reverse SDE starts, in (1e-5, 1]; DiffPure's "100" is 0.1.
        n_steps: N Euler steps (paper: t*/1e-3).
        gradient: one of `gradients.GRADIENTS`.
        sde: that of the score; None: what the score says itself, or else the paper's.
        seed: of the purifier's generator, as in `StochasticPurifier`.

    Raises:
        ValueError: for a setting out of range, another SDE than the score's, or guidance in compiled code
            where the gradient differentiates it.
    """

    clamp = True

    def __init__(
        self,
        score: nn.Module,
        *,
        t_star: float = 0.1,
        n_steps: int = 100,
        gradient: str = "exact",
        sde: VPSDE | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(gradient, seed)
        self.score, self.sde = freeze("score", score), agreed_sde(score, sde)
        check_compiled(gradient, score)
        self.reads_image = any(isinstance(part, ImageGuided) for part in score.modules())
        self.t_star = number("t_star (DiffPure's 100 is 0.1 here)", t_star, T_END, 1)
        self.n_steps = count("n_steps", n_steps)
        self.times = time_grid(self.t_star, self.n_steps)

    def trajectory(
        self, x: Tensor, callback: Callback, *, brownian: bool = True, seeds: Tensor | None = None
    ) -> Tensor:
        """Purify with callback(i, t_i, state_i) along the path; brownian=False leaves the noise out.

        A state is what `finish` takes: beside the image, where guidance reads that.
        """
        check_images(x, self.margin)
        check_network("score", self.score, x)
        state, increments = self._begin(x, self._noise(x, seeds))
        noise = increments if brownian else None
        return self.finish(solve(self.score, self.sde, state, self.times, noise, callback))

    def start(self, state: Tensor, noise: Noise) -> Tensor:
        """The state at t*: the attacked image itself, unscaled and without forward noise."""
        return state

    def finish(self, state: Tensor) -> Tensor:
        """The image that the classifier sees."""
        state = state.chunk(2, dim=1)[0] if self.reads_image else state
        return to_image(state.clamp(-1, 1) if self.clamp else state)

    def _run(self, x: Tensor, noise: Noise) -> Tensor:
        check_network("score", self.score, x)
        state, increments = self._begin(x, noise)
        gradient = "exact" if self.gradient == "bpda" else self.gradient
        return self.finish(solve_with_gradient(gradient, self.score, self.sde, state, self.times, increments))

    def _begin(self, x: Tensor, noise: Noise) -> tuple[Tensor, Noise]:
        """(the state at t*, the increments from there), each beside the image's where guidance reads that."""
        state = self.start(to_state(x), noise)
        if self.reads_image:
            state = torch.cat([state, to_state(x)], dim=1)
        return state, Increments(noise, self.reads_image)

    def images_kept(self, x: Tensor) -> int:
        """How many images like x are differentiated without walking their paths again, see `gradients`."""
        state = torch.cat([x, x], dim=1) if self.reads_image else x
        return images_kept(self.gradient, self.score, self.sde, state, self.times)

    def draw(self, x: Tensor, seeds: Tensor) -> Noise:
        """N + 1 draws like x: the forward noise of DiffPure first, then one per step."""
        return StandardNormal(seeds, self.n_steps + 1, x.detach())


class DiffPurePurifier(Purifier):
    """DiffPure: noise the image forward to t*, then run the reverse SDE. No clamp, as in its code."""

    clamp = False

    def start(self, state: Tensor, noise: Noise) -> Tensor:
        """√ᾱ·x + √(1-ᾱ)·ε with the discrete ᾱ of DiffPure's code."""
        mean, std = self.sde.discrete_marginal(self.t_star)
        return mean * state + std * next(iter(noise))


class ProbabilityFlow(Purifier):
    """The probability flow of Song et al. (2021): half the score, and no noise; deterministic.

    Raises:
        ValueError: for guidance that reads the image, which would be halved as well.
    """

    def __init__(self, score: nn.Module, **settings: Any) -> None:
        super().__init__(Halved(score), **settings)
        if self.reads_image:
            raise ValueError("score: expected no guidance that reads the image; got one on the flow")

    def draw(self, x: Tensor, seeds: Tensor) -> Noise:
        check_seeds(seeds, x)
        return [torch.zeros_like(x)] * (self.n_steps + 1)


class Halved(nn.Module):
    """s(x, t)/2: with it the drift of Eq. 4 is that of the probability flow."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        check_module("score", score)
        self.score = score

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Half the score at x (B, ...) and t of shape () or (B,), like x."""
        return self.score(x, t) / 2


class Purified(nn.Module):
    """A classifier behind a purifier, to be attacked like any other: [0, 1] NCHW in, logits (B, K) out.

    The networks are put into eval mode and frozen: what is differentiated is the input.
    """

    def __init__(self, classifier: nn.Module, purifier: StochasticPurifier) -> None:
        super().__init__()
        self.classifier = freeze("classifier", classifier)
        self.purifier: Any = purifier  # what more it can do than purify depends on its kind
        self.eval()

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Logits of the purified x; `seeds` and errors as in `StochasticPurifier.forward`."""
        check_images(x, self.purifier.margin)
        check_network("classifier", self.classifier, x)
        weights = next(filter(Tensor.is_floating_point, self.classifier.parameters()), x)
        if x.dtype != weights.dtype:
            raise ValueError(f"x: expected {weights.dtype} like the classifier's weights; got {x.dtype}")
        purified = self.purifier(x, seeds)
        logits = check_logits(self.classifier(purified), x)
        if not bool(logits.isfinite().all()):
            culprit = "classifier" if bool(purified.isfinite().all()) else "purifier"
            raise FloatingPointError(f"NaN or infinity from the {culprit}")
        return logits


class Averaged(Purified):
    """Decides by the mean logits over several purifications of the image."""

    def __init__(self, classifier: nn.Module, purifier: Purifier, draws: int = 4) -> None:
        super().__init__(classifier, purifier)
        self.draws = count("draws", draws)

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Mean logits (B, K); an image's seed (B,) fixes all of its purifications."""
        check_images(x, self.purifier.margin)
        if seeds is not None:
            seeds = _spread(seeds, self.draws, x).flatten()
        logits = super().forward(x.repeat_interleave(self.draws, dim=0), seeds)
        return logits.unflatten(0, (len(x), self.draws)).mean(1)


def _spread(seeds: Tensor, draws: int, x: Tensor) -> Tensor:
    """(B, draws), the seeds of several purifications of each image of x from one seed (B,) each."""
    check_seeds(seeds, x)
    # An odd stride: of a seed, torch's generator on the CPU takes the low 32 bits only.
    places = torch.arange(draws, device=seeds.device)
    return (seeds[:, None] + places * STRIDE) % 2**62


class Vote(nn.Module):
    """Decides by several draws of any random module, so that an attack can aim at a defender who votes.

    The mean of probabilities is a majority with a gradient. Every draw is a call of its own, for a module
    whose images of a call share their noise.

    Args:
        model: images in, logits (B, K) out, on noise that it draws itself.
        draws: N, behind each decision.

    Raises:
        ValueError: for what is no module, or no whole number of draws.
    """

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        check_module("model", model)
        self.model, self.draws = model, count("draws", draws)
        self.training = False  # the model's own mode is its own affair: some draw their noise in train mode

    def forward(self, x: Tensor) -> Tensor:
        """The logarithm of the mean probabilities (B, K), all noise being torch's own generator's."""
        with in_one_graph(self.draws):
            logits = torch.stack([check_logits(self._draw(x), x) for _ in range(self.draws)])
        warn_of_probabilities("model of a Vote", logits[0], "it votes by them as if they were")
        return logits.log_softmax(2).logsumexp(0) - math.log(self.draws)

    def _draw(self, x: Tensor) -> Tensor:
        if isinstance(self.model, Purified):  # an attack sets torch's generator, not the purifier's
            return self.model(x, torch.randint(2**62, (len(x),)))
        return self.model(x)


class FixedNoise(nn.Module):
    """A purified classifier whose every purification, of whatever image, draws the noise of one seed.

    It is deterministic: for attacks that would rather not average over noise.
    """

    def __init__(self, purified: Purified, seed: int) -> None:
        super().__init__()
        self.purified, self.seed = purified, seed
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of the purified x."""
        return self.purified(x, torch.full((len(x),), self.seed))


def images_per_call(model: nn.Module, x: Tensor, most: int) -> int:
    """How many images like x are best purified at once, `most` or fewer.

    On a CPU, where small batches suit the caches, no more than need no path to be walked again.
    """
    purifier = model.purifier if isinstance(model, Purified) else None
    if x.is_cuda or not isinstance(purifier, Purifier) or purifier.gradient not in THROUGH_STEPS:
        return most
    return min(most, purifier.images_kept(x) // getattr(model, "draws", 1)) or most


def diffpure(classifier: nn.Module, score: nn.Module, **settings: Any) -> Purified:
    """DiffPure around a classifier; settings are those of `Purifier`."""
    return Purified(classifier, DiffPurePurifier(score, **settings))


def reverse_only(classifier: nn.Module, score: nn.Module, **settings: Any) -> Purified:
    """The reverse SDE alone, "COUP w/o guidance"; settings are those of `Purifier`."""
    return Purified(classifier, Purifier(score, **settings))


def coup(classifier: nn.Module, score: nn.Module, guidance_weight: float = 1.0, **settings: Any) -> Purified:
    """COUP (Algorithm 1): the same classifier guides and decides; settings are those of `Purifier`."""
    return Purified(classifier, Purifier(Guided(score, classifier, guidance_weight), **settings))


def freeze(name: str, network: nn.Module) -> nn.Module:
    """The network itself, put into eval mode and its weights frozen. ValueError for what is no network."""
    check_module(name, network)
    return network.eval().requires_grad_(False)


class StandardNormal:
    """n standard normal draws like `like` (B, ...), the image at place b from seeds[b] alone.

    They are made when asked for: a path holds one step's noise, and while a GPU is at that step the CPU draws
    for the next. Whoever iterates again gets the same draws. Drawn in float32 on the CPU and then cast, so
    that a seed means the same noise on every device and in every precision.

    Raises:
        ValueError: unless there is one seed per image.
    """

    def __init__(self, seeds: Tensor, n: int, like: Tensor) -> None:
        check_seeds(seeds, like)
        self.seeds, self.n, self.like = seeds.tolist(), n, like

    def __iter__(self) -> Iterator[Tensor]:
        shape, pinned = self.like.shape[1:], self.like.is_cuda
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        # PyTorch draws in groups of 16 numbers: whole groups at a time are those of one long draw.
        steps = 16 // math.gcd(16, shape.numel())
        steps *= max(1, SMALL // (steps * shape.numel()))
        steps = steps if shape.numel() >= 16 else self.n  # what is left over would be no group
        for first in range(0, self.n, steps):
            size = min(steps, self.n - first), *shape
            drawn = torch.stack([torch.randn(size, generator=generator) for generator in generators], dim=1)
            drawn = drawn.pin_memory() if pinned else drawn
            yield from drawn.to(self.like.device, self.like.dtype, non_blocking=pinned)


def standard_normal(seeds: Tensor, n: int, like: Tensor) -> Tensor:
    """All draws of `StandardNormal` in one tensor, (n, *like.shape)."""
    return torch.stack([*StandardNormal(seeds, n, like)])


@dataclass(frozen=True)
class Increments:
    """All noise but the first; beside each, where asked for, zeros for an image that takes no noise."""

    noise: Noise
    beside_image: bool

    def __iter__(self) -> Iterator[Tensor]:
        for drawn in islice(self.noise, 1, None):
            yield torch.cat([drawn, torch.zeros_like(drawn)], dim=1) if self.beside_image else drawn
