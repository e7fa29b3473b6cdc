"""The one-dimensional two-Gaussian study: label shift (Sec. 5.3.2, Fig. 1a and 3) and Propositions 1 and 2.

Everything is float64 and analytic but for the Euler steps: the score of the diffused mixture, the noisy
classifier and the gradient of its log confidence. All weights λ and noise levels c share the same Wiener
paths, so two settings can be compared run by run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from coup_lib.checks import count, number
from coup_lib.evaluation.config import is_smoke
from coup_lib.evaluation.records import record
from coup_lib.sde import VPSDE

DTYPE = torch.float64
SMOKE_RUNS = 2_000
# One chunk of paths has to stay in the processor's cache: all runs at once would wait for memory.
CHUNK_ELEMENTS = 32_768
# p(x) < 1e-5 out here: a path that ends beyond was thrown by a pole of the noisy classifier.
FAR = 5.0
X_MAX = 2.0  # of the check of Proposition 1
QUANTILES = (0.05, 0.5, 0.99)  # of the distances and bounds of Proposition 2


def parse_floats(name: str, text: str) -> tuple[float, ...]:
    """The numbers of a comma-separated parameter such as "0,0.5,1"; ValueError if one is not a number."""
    try:
        return tuple(float(part) for part in str(text).split(","))
    except ValueError:
        raise ValueError(
            f'{name}: expected comma-separated numbers such as "0,0.5,1"; got {text!r}'
        ) from None


@dataclass(frozen=True)
class ToySettings:
    """The settings of Sec. 5.3.2; the defaults are the paper's where it states them.

    lambdas, noise_levels and t_stars are comma-separated (papermill passes strings). The paper states the
    range of λ, but neither its grid nor the levels c of Fig. 3b. COUP_SMOKE cuts n_runs to at most 2,000.
    Raises ValueError that names the field, what was expected and what came.
    """

    profile: ClassVar[str] = "toy"  # folder of the figures, tables and records
    n_runs: int = 100_000
    n_steps: int = 100
    t_star: float = 0.1
    x0: float = 0.2
    lambdas: str = "0,0.5,1,1.5,2,3,4,5,6,8,10"
    noise_levels: str = "0,1,2,5,10,20"
    t_stars: str = "0.025,0.05,0.075,0.1,0.15,0.2,0.3"  # of the check of Proposition 2
    guidance_weight: float = 1.0  # λ of the check of Proposition 2
    seed: int = 0

    def __post_init__(self) -> None:
        fill = partial(object.__setattr__, self)
        for name in ("n_runs", "n_steps"):
            fill(name, count(name, getattr(self, name)))
        fill("seed", count("seed", self.seed, 2**31, low=0))
        fill("t_star", number("t_star", self.t_star, 0, 1))
        fill("x0", number("x0", self.x0, 0))
        fill("guidance_weight", number("guidance_weight", self.guidance_weight, 0, closed=True))
        for name, why in (("lambdas", "the unguided SDE"), ("noise_levels", "the true classifier")):
            values, got = parse_floats(name, getattr(self, name)), getattr(self, name)
            if values[0] != 0 or not math.isfinite(sum(values)) or list(values) != sorted({*values}):
                raise ValueError(f"{name}: expected increasing numbers that begin with 0, {why}; got {got!r}")
        for value in self.times:
            number("t_stars", value, 0, 1)
        if is_smoke():
            fill("n_runs", min(self.n_runs, SMOKE_RUNS))

    @property
    def weights(self) -> tuple[float, ...]:
        """The guidance weights λ."""
        return parse_floats("lambdas", self.lambdas)

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels c of the classifier."""
        return parse_floats("noise_levels", self.noise_levels)

    @property
    def times(self) -> tuple[float, ...]:
        """The purification times t* at which Proposition 2 is checked."""
        return parse_floats("t_stars", self.t_stars)

    @property
    def step(self) -> float:
        """Δt of the Euler method."""
        return self.t_star / self.n_steps


@dataclass(frozen=True)
class TwoGaussians:
    """½N(-mean, 1) + ½N(+mean, 1), diffused by a VP-SDE, with the noisy classifier of Sec. 5.3.2.

    Unit variance is kept by the VP-SDE, so at time t only the means shrink, to ±m(t)·mean.
    """

    mean: float = 0.5
    sde: VPSDE = field(default_factory=VPSDE)

    def class_densities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """p(x|y=0) and p(x|y=1) at t = 0, each the shape of x."""
        scale = 1 / math.sqrt(2 * math.pi)
        below, above = x + self.mean, x - self.mean
        return torch.exp(-0.5 * below * below) * scale, torch.exp(-0.5 * above * above) * scale

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x) = -x + μ tanh(μx) with μ = m(t)·mean, for x of any shape and t of shape ()."""
        mean = self.sde.mean_coeff(t) * self.mean
        return mean * torch.tanh(mean * x) - x

    def confidence(self, x: Tensor, c: Tensor) -> Tensor:
        """p(y=1|x) = p₁/(p₀ + p₁ + c·sin(100x)/100), x and c broadcast; *outside [0, 1] where c is large*."""
        p0, p1 = self.class_densities(x)
        return p1 / (p0 + p1 + c * torch.sin(100 * x) / 100)

    def guidance(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """∇ log max(p, 1-p) and where p = p(y=1|x) left (0, 1), x and c broadcast.

        The formula is taken as printed, without clipping. max(p, 1-p) ≥ ½ for every real p, so the logarithm
        is always defined; only an exactly vanishing denominator or an overflow gives NaN or infinity.
        """
        p0, p1 = self.class_densities(x)
        rest = p0 + c * torch.sin(100 * x) / 100  # (p₁ + rest) · (1 - p), may be negative
        total = p1 + rest
        rest_slope = c * torch.cos(100 * x) - (x + self.mean) * p0
        log_p1_slope = self.mean - x
        log_total_slope = (log_p1_slope * p1 + rest_slope) / total
        says_one = p1 / total >= 0.5
        outside = (rest <= 0) | (total <= 0)
        return torch.where(says_one, log_p1_slope, rest_slope / rest) - log_total_slope, outside

    def reverse_drift(self, x: Tensor, t: Tensor, ascent: Tensor) -> Tensor:
        """The drift of Eq. 5 *in the direction of travel*, g²·ascent - f(x, t), the shape of x.

        `ascent` is the square bracket of Eq. 5, ∇log p_t + λ∇log max_y p(y|x). Time runs backwards in Eq. 5,
        so what is printed there is the negative of what pushes x.
        """
        return self.sde.beta(t) * ascent - self.sde.drift(x, t)

    def unguided_slope(self, x: Tensor, t: Tensor) -> Tensor:
        """d/dx of reverse_drift at λ = 0, β(-½ + μ² sech²(μx)): what Prop. 1 supposes to be positive."""
        mean = self.sde.mean_coeff(t) * self.mean
        return self.sde.beta(t) * ((mean / torch.cosh(mean * x)) ** 2 - 0.5)


# --- Simulation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One Euler step of every path; all tensors (levels c, weights λ, runs) but the time."""

    time: Tensor  # t before the step, of shape ()
    score: Tensor  # ∇ log p_t(x) before the step
    guidance: Tensor  # ∇ log max_y p(y|x) before the step, without λ
    outside: Tensor  # bool: the classifier's p(y=1|x) was not in (0, 1) before the step
    x: Tensor  # after the step


def wiener_noise(n_runs: int, n_steps: int, seed: int) -> Tensor:
    """Standard normal (n_steps, n_runs) from a generator of its own."""
    return torch.randn(n_steps, n_runs, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def time_grid(t_star: float, n_steps: int) -> Tensor:
    """The times t*, t* - Δt, … Δt at which the Euler method evaluates Eq. 5, (n_steps,); it ends at t = 0.

    At 0, not at 1e-5 as for images: this score is regular there.
    """
    return torch.linspace(t_star, 0, n_steps + 1, dtype=DTYPE)[:-1]


def euler_steps(
    data: TwoGaussians,
    noise: Tensor,
    x0: float,
    t_star: float,
    weights: Sequence[float],
    levels: Sequence[float],
) -> Iterator[Step]:
    """Eq. 5 from x0 at t* to t = 0, step by step, for noise (n_steps, runs), every λ and every c."""
    lam = torch.tensor(weights, dtype=DTYPE)[None, :, None]
    c = torch.tensor(levels, dtype=DTYPE)[:, None, None]
    dt = t_star / len(noise)
    x = torch.full((len(levels), len(weights), noise.shape[1]), x0, dtype=DTYPE)
    for t, z in zip(time_grid(t_star, len(noise)), noise, strict=True):
        score = data.score(x, t)
        guidance, outside = data.guidance(x, c)
        drift = data.reverse_drift(x, t, score + lam * guidance)
        x = x + drift * dt + data.sde.diffusion(t) * math.sqrt(dt) * z
        yield Step(t, score, guidance, outside, x)


@dataclass(frozen=True)
class Paths:
    """What Fig. 3b needs of every path; all (levels c, weights λ, runs)."""

    final: Tensor  # x at t = 0
    lowest: Tensor  # min over all steps; NaN if x was once
    outside: Tensor  # bool: the classifier's p(y=1|x) was not in (0, 1) at some step

    @property
    def finite(self) -> Tensor:
        """bool: x stayed finite all the way."""
        return self.final.isfinite() & self.lowest.isfinite()

    @property
    def flipped(self) -> Tensor:
        """bool: the final sign is not that of x0, what Sec. 5.3.2 calls a label flip."""
        return (self.final < 0) & self.finite

    @property
    def crossed(self) -> Tensor:
        """bool: x was below zero at *some* step, Proposition 1's label flip."""
        return (self.lowest < 0) & self.finite


def simulate(data: TwoGaussians, settings: ToySettings, noise: Tensor) -> Paths:
    """The paths of Fig. 3b for noise (n_steps, runs), which every (c, λ) shares."""
    weights, levels, chunks = settings.weights, settings.levels, []
    for part in noise.split(max(1, CHUNK_ELEMENTS // (len(weights) * len(levels))), dim=1):
        lowest, outside = torch.tensor(settings.x0, dtype=DTYPE), torch.tensor(False)
        for step in euler_steps(data, part, settings.x0, settings.t_star, weights, levels):
            lowest, outside = torch.minimum(lowest, step.x), outside | step.outside
        chunks.append((step.x, lowest, outside))
    return Paths(*(torch.cat(parts, dim=-1) for parts in zip(*chunks, strict=True)))


def label_flips(data: TwoGaussians, settings: ToySettings) -> dict[str, Any]:
    """Fig. 3b as counts of runs, lists [c][λ], for both readings of "label flip".

    `*_saved` and `*_harmed` compare with the unguided path *of the same noise*: flips that guidance prevents,
    and flips that it causes. Runs that became NaN or infinite are in `not_finite` and in no other count.
    """
    paths = simulate(data, settings, wiener_noise(settings.n_runs, settings.n_steps, settings.seed))
    result: dict[str, Any] = {
        "weights": list(settings.weights),
        "levels": list(settings.levels),
        "n_runs": settings.n_runs,
        "not_finite": (~paths.finite).sum(-1).tolist(),
        "outside": paths.outside.sum(-1).tolist(),
        "far": (paths.finite & (paths.final.abs() > FAR)).sum(-1).tolist(),
    }
    for name, event in (("flipped", paths.flipped), ("crossed", paths.crossed)):
        unguided = event[:, settings.weights.index(0.0), None]
        result[name] = event.sum(-1).tolist()
        result[f"{name}_saved"] = (unguided & ~event & paths.finite).sum(-1).tolist()
        result[f"{name}_harmed"] = (event & ~unguided).sum(-1).tolist()
    return result


# --- The propositions -------------------------------------------------------------------------------------


def prop1_hypotheses(data: TwoGaussians, settings: ToySettings) -> dict[str, Any]:
    """Proposition 1's two hypotheses on a grid of x ∈ (0, X_MAX] and t ∈ [0, 1].

    `slope` is the range of d f₀/dx in the direction of travel, `growth` the smallest 1 + Δt·df₀/dx on
    [0, t*]: if that is positive an Euler step keeps the order of two paths, which the conclusion needs.
    `push_share` is the share of x ∈ (0, X_MAX] with f₁ > f₀ for λ > 0, one per level c.
    """
    x = torch.linspace(0, X_MAX, 6001, dtype=DTYPE)[1:]
    slopes = [data.unguided_slope(x, t) for t in torch.linspace(0, 1, 101, dtype=DTYPE)]
    early = [data.unguided_slope(x, t) for t in time_grid(settings.t_star, settings.n_steps)]
    levels = [torch.tensor(level, dtype=DTYPE) for level in settings.levels]
    return {
        "x_max": X_MAX,
        "slope": [float(min(s.min() for s in slopes)), float(max(s.max() for s in slopes))],
        "growth": 1 + settings.step * float(min(s.min() for s in early)),
        "push_share": [float((data.guidance(x, c)[0] > 0).double().mean()) for c in levels],
    }


def prop2_bound(gamma: Any, c_s: Any, c_p: Any, c_x: float, eps: Any, *, rigorous: bool = False) -> Any:
    """The right-hand side of Eq. 8 for tensors or floats; eps is ‖ε‖.

    Variation of constants gives ∫₀^{t*} e^{γ(t)} β(t) dt = 2(e^γ - 1) before (C_s + C_p)/2, where Eq. 8 has
    the smaller 2γ; `rigorous` puts e^γ - 1 in its place.
    """
    ascent = math.expm1(gamma) if rigorous else gamma
    return ascent * (c_s + c_p) + math.expm1(gamma) * c_x + math.sqrt(math.expm1(2 * gamma)) * eps


def prop2_runs(data: TwoGaussians, settings: ToySettings, t_star: float) -> dict[str, Tensor]:
    """Per run (runs,): |r(x0) - x0|, the realised |ε| and the path's own constants C_s and C_p.

    ε = Σ e^{γ(t)} g(t) Δw / √(e^{2γ(t*)} - 1) is the Gaussian into which the derivation collects the Wiener
    increments. The true classifier (c = 0) guides; C_p bounds λ∇log max p, which is what Eq. 5 adds, where
    the proposition writes ∇p(·|x).
    """
    weight, chunks = settings.guidance_weight, []
    noise = wiener_noise(settings.n_runs, max(1, round(t_star / settings.step)), settings.seed)
    gamma = data.sde.gamma(torch.tensor(t_star, dtype=DTYPE))
    for part in noise.split(CHUNK_ELEMENTS, dim=1):
        score = guidance = wiener = torch.zeros((), dtype=DTYPE)
        steps = euler_steps(data, part, settings.x0, t_star, [weight], [0.0])
        for step, z in zip(steps, part, strict=True):
            score = torch.maximum(score, step.score.abs())
            guidance = torch.maximum(guidance, weight * step.guidance.abs())
            wiener = wiener + torch.exp(data.sde.gamma(step.time)) * data.sde.diffusion(step.time) * z
        eps = wiener * math.sqrt(t_star / len(part)) / torch.expm1(2 * gamma).sqrt()
        distance = (step.x - settings.x0).abs()
        chunks.append((distance[0, 0], eps.abs(), 2 * score[0, 0], 2 * guidance[0, 0]))
    found = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return dict(zip(("distance", "eps", "c_s", "c_p"), found, strict=True))


def prop2_check(data: TwoGaussians, settings: ToySettings) -> dict[str, Any]:
    """Eq. 8 against simulated runs, one entry per t* in each list.

    `held` is the share of runs within the bound, `tightest` the largest distance/bound over the runs, for
    "printed" (constants over all runs), "own" (printed, with the constants of each run's own path) and
    "rigorous" (own constants, e^γ - 1 for γ). `allowed` is the ratio that the assumptions allow: a score
    that stays at its bound, no guidance, no noise and x = 0 move x by (e^γ - 1)·C_s, more than γ·C_s.
    """
    entries = [_prop2_entry(data, settings, t_star) for t_star in settings.times]
    return {key: [entry[key] for entry in entries] for key in entries[0]}


def _prop2_entry(data: TwoGaussians, settings: ToySettings, t_star: float) -> dict[str, Any]:
    runs = prop2_runs(data, settings, t_star)
    gamma = float(data.sde.gamma(torch.tensor(t_star, dtype=DTYPE)))
    eps, c_s, c_p = runs["eps"], runs["c_s"], runs["c_p"]
    bounds = {
        "printed": prop2_bound(gamma, c_s.max(), c_p.max(), settings.x0, eps),
        "own": prop2_bound(gamma, c_s, c_p, settings.x0, eps),
        "rigorous": prop2_bound(gamma, c_s, c_p, settings.x0, eps, rigorous=True),
    }
    entry: dict[str, Any] = {
        "t_star": t_star,
        "gamma": gamma,
        "c_s": float(c_s.max()),
        "c_p": float(c_p.max()),
        "mean_square_eps": float((eps**2).mean()),
        "allowed": math.expm1(gamma) / gamma,
        "distance": np.quantile(runs["distance"].numpy(), QUANTILES).tolist(),
        "bound": np.quantile(bounds["printed"].numpy(), QUANTILES).tolist(),
    }
    for name, bound in bounds.items():
        entry[f"held_{name}"] = float((runs["distance"] <= bound).double().mean())
        entry[f"tightest_{name}"] = float((runs["distance"] / bound).max())
    return entry


def recorded(name: str, settings: ToySettings) -> dict[str, Any]:
    """The result of "label_flips", "prop1" or "prop2", from its record or computed now."""
    measure = {"label_flips": label_flips, "prop1": prop1_hypotheses, "prop2": prop2_check}[name]
    return record("toy", name, asdict(settings), lambda: measure(TwoGaussians(), settings))["result"]
