"""The one-dimensional two-Gaussian study: label shift (Sec. 5.3.2, Fig. 1a and 3) and Propositions 1 and 2.

Everything is float64 and analytic but for the Euler steps: the score of the diffused mixture, the noisy
classifier and the gradient of its log confidence. All weights λ and noise levels c share the same Wiener
paths, so two settings can be compared run by run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from coup_lib.config import count, is_smoke, number
from coup_lib.sde import VPSDE
from coup_lib.stats import wilson

DTYPE = torch.float64
SMOKE_RUNS = 2_000
# One chunk of paths has to stay in the processor's cache: all runs at once would wait for memory.
CHUNK_ELEMENTS = 32_768
# p(x) < 1e-5 out here: a path that ends beyond was thrown by a pole of the noisy classifier.
FAR = 5.0


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
        def fill(name: str, value: float) -> None:
            object.__setattr__(self, name, value)

        for name in ("n_runs", "n_steps"):
            fill(name, count(name, getattr(self, name)))
        fill("seed", count("seed", self.seed, 2**31, low=0))
        fill("t_star", number("t_star", self.t_star, 0, 1))
        fill("x0", number("x0", self.x0, 0))
        if number("guidance_weight", self.guidance_weight, -1) < 0:
            raise ValueError(f"guidance_weight: expected at least 0; got {self.guidance_weight!r}")
        fill("guidance_weight", float(self.guidance_weight))
        for name, why in (("lambdas", "the unguided SDE"), ("noise_levels", "the true classifier")):
            values = parse_floats(name, getattr(self, name))
            increasing = all(low < high for low, high in pairwise(values))
            if values[0] != 0 or not increasing or not all(map(math.isfinite, values)):
                got = getattr(self, name)
                raise ValueError(f"{name}: expected increasing numbers that begin with 0, {why}; got {got!r}")
        for value in parse_floats("t_stars", self.t_stars):
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

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) of the diffused mixture for x of any shape and t of shape ()."""
        mean = self.sde.mean_coeff(t) * self.mean
        logs = torch.stack([-0.5 * (x + mean) ** 2, -0.5 * (x - mean) ** 2])
        return logs.logsumexp(0) - math.log(2 * math.sqrt(2 * math.pi))

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

    def reverse_drift(self, x: Tensor, t: Tensor, lam: Tensor, c: Tensor) -> Tensor:
        """The drift of Eq. 5 *in the direction of travel*, -(f - g²[∇log p_t + λ∇log max_y p(y|x)]).

        Time runs backwards in Eq. 5, so what is printed there is the negative of what pushes x.
        """
        return self.push(x, t, self.score(x, t) + lam * self.guidance(x, c)[0])

    def push(self, x: Tensor, t: Tensor, ascent: Tensor) -> Tensor:
        """g²·ascent - f(x, t), the shape of x; `ascent` is the square bracket of Eq. 5."""
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
    *,
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
        x = x + data.push(x, t, score + lam * guidance) * dt + data.sde.diffusion(t) * math.sqrt(dt) * z
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
    runs = max(1, CHUNK_ELEMENTS // (len(settings.weights) * len(settings.levels)))
    chunks = [_simulate_chunk(data, settings, part) for part in noise.split(runs, dim=1)]
    return Paths(*(torch.cat(parts, dim=-1) for parts in zip(*chunks, strict=True)))


def _simulate_chunk(data: TwoGaussians, settings: ToySettings, noise: Tensor) -> tuple[Tensor, ...]:
    lowest, outside = torch.tensor(settings.x0, dtype=DTYPE), torch.tensor(False)
    for step in euler_steps(
        data,
        noise,
        x0=settings.x0,
        t_star=settings.t_star,
        weights=settings.weights,
        levels=settings.levels,
    ):
        lowest, outside = torch.minimum(lowest, step.x), outside | step.outside
    return step.x, lowest, outside


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
        "not_finite": _counts(~paths.finite),
        "outside": _counts(paths.outside),
        "far": _counts(paths.finite & (paths.final.abs() > FAR)),
    }
    for name, event in (("flipped", paths.flipped), ("crossed", paths.crossed)):
        unguided = event[:, settings.weights.index(0.0), None]
        result[name] = _counts(event)
        result[f"{name}_saved"] = _counts(unguided & ~event & paths.finite)
        result[f"{name}_harmed"] = _counts(event & ~unguided)
    return result


def _counts(event: Tensor) -> list[list[int]]:
    return event.sum(-1).tolist()


# --- The propositions -------------------------------------------------------------------------------------


def prop1_hypotheses(data: TwoGaussians, settings: ToySettings, x_max: float = 2.0) -> dict[str, Any]:
    """Proposition 1's two hypotheses on a grid of x ∈ (0, x_max] and t ∈ [0, 1].

    `slope` is the range of d f₀/dx in the direction of travel, `growth` the smallest 1 + Δt·df₀/dx on
    [0, t*]: if that is positive an Euler step keeps the order of two paths, which the conclusion needs.
    `push_share` is the share of x ∈ (0, x_max] with f₁ > f₀ for λ > 0, one per level c.
    """
    x = torch.linspace(0, x_max, 6001, dtype=DTYPE)[1:]
    slopes = [data.unguided_slope(x, t) for t in torch.linspace(0, 1, 101, dtype=DTYPE)]
    early = [data.unguided_slope(x, t) for t in time_grid(settings.t_star, settings.n_steps)]
    levels = [torch.tensor(level, dtype=DTYPE) for level in settings.levels]
    return {
        "x_max": x_max,
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
    n_steps = max(1, round(t_star / settings.step))
    noise = wiener_noise(settings.n_runs, n_steps, settings.seed)
    parts = [_prop2_chunk(data, settings, t_star, part) for part in noise.split(CHUNK_ELEMENTS, dim=1)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _prop2_chunk(
    data: TwoGaussians, settings: ToySettings, t_star: float, noise: Tensor
) -> dict[str, Tensor]:
    weight = settings.guidance_weight
    score = guidance = wiener = torch.zeros((), dtype=DTYPE)
    steps = euler_steps(data, noise, x0=settings.x0, t_star=t_star, weights=[weight], levels=[0.0])
    for step, z in zip(steps, noise, strict=True):
        score = torch.maximum(score, step.score.abs())
        guidance = torch.maximum(guidance, weight * step.guidance.abs())
        wiener = wiener + torch.exp(data.sde.gamma(step.time)) * data.sde.diffusion(step.time) * z
    gamma = data.sde.gamma(torch.tensor(t_star, dtype=DTYPE))
    eps = wiener * math.sqrt(t_star / len(noise)) / torch.expm1(2 * gamma).sqrt()
    distance = (step.x - settings.x0).abs()
    return {
        "distance": distance[0, 0],
        "eps": eps.abs(),
        "c_s": 2 * score[0, 0],
        "c_p": 2 * guidance[0, 0],
    }


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
        "distance": _quantiles(runs["distance"]),
        "bound": _quantiles(bounds["printed"]),
    }
    for name, bound in bounds.items():
        entry[f"held_{name}"] = float((runs["distance"] <= bound).double().mean())
        entry[f"tightest_{name}"] = float((runs["distance"] / bound).max())
    return entry


def _quantiles(values: Tensor) -> list[float]:
    """The 5 %, 50 % and 99 % quantiles."""
    return np.quantile(values.numpy(), [0.05, 0.5, 0.99]).tolist()


# --- Figures ----------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN = (sns.color_palette("colorblind")[i] for i in range(3))
MARKERS = "os^Dv*Px<>"


def _panel_title(axes: Axes, letter: str, title: str) -> None:
    axes.set_title(f"({letter}) {title}", loc="left", fontsize="medium")


def _class_curves(axes: Axes, data: TwoGaussians, x: Tensor) -> None:
    """The two class densities, labelled at their outer flanks."""
    p0, p1 = data.class_densities(x)
    axes.plot(x, p0, color=BLUE)
    axes.plot(x, p1, color=GREEN)
    side = data.mean + 1.4
    height = float(data.class_densities(torch.tensor(side, dtype=DTYPE))[1])
    axes.text(-side - 0.14, height, "$p(x|y{=}0)$", color=BLUE, ha="right")
    axes.text(side + 0.14, height, "$p(x|y{=}1)$", color=GREEN, ha="left")


def plot_objectives(data: TwoGaussians) -> Figure:
    """Fig. 1a: what is maximised without and with guidance, and where its gradient points."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True)
    x = torch.linspace(-3.4, 3.4, 801, dtype=DTYPE)
    m = data.mean
    p0, p1 = data.class_densities(x)
    objectives: tuple[tuple[str, str, Tensor, dict[float, tuple[float, ...]], str], ...] = (
        (
            "a",
            "Without guidance: maximise $p(x)$",
            (p0 + p1) / 2,
            {0.0: (-1.8, -1.15, -0.5, 0.5, 1.15, 1.8)},
            "$p(x)$",
        ),
        (
            "b",
            "With guidance: maximise max$_y$ $p(x|y)$",
            torch.maximum(p0, p1),
            {-m: (-m - 1.15, -m - 0.5, 0.46 - m), m: (m - 0.46, m + 0.5, m + 1.15)},
            r"$\max_y\,p(x|y)$",
        ),
    )
    for axes, (letter, title, objective, peaks, label) in zip(panels, objectives, strict=True):
        _class_curves(axes, data, x)
        axes.axvline(0, ymax=0.86, color="0.6", linewidth=0.8, zorder=0)
        axes.plot(x, objective, ":", color=ORANGE, linewidth=2.6)
        for peak, starts in peaks.items():
            for start in starts:
                _uphill_arrow(axes, x, objective, start, start + 0.8 * max(-0.4, min(0.4, peak - start)))
        axes.text(0, 0.47, label, color=ORANGE, ha="center", va="center")
        axes.text(0.06, 0.01, "boundary", color="0.35", fontsize="small")
        axes.set(xlabel="$x$", ylim=(0, 0.5), xlim=(-3.4, 3.4))
        _panel_title(axes, letter, title)
    panels[0].set_ylabel("density")
    return figure


def _uphill_arrow(axes: Axes, x: Tensor, objective: Tensor, start: float, end: float) -> None:
    """An arrow just above the objective; ValueError if it does not point where the gradient does."""
    tail, head = (int((x - position).abs().argmin()) for position in (start, end))
    if objective[head] <= objective[tail]:
        raise ValueError(f"expected the objective to rise from {start:g} to {end:g}")
    ends = [(float(x[index]), float(objective[index]) + 0.022) for index in (head, tail)]
    style = {"arrowstyle": "-|>", "color": ORANGE, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=ends[0], xytext=ends[1], arrowprops=style)


def plot_data_and_classifier(data: TwoGaussians, x0: float, c: float = 1.0) -> Figure:
    """Fig. 3a: the class densities and the classifier's p(y=1|x), true and at noise level c."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.2, 4.6), sharex=True, gridspec_kw={"height_ratios": [1, 1.3]}
    )
    x = torch.linspace(-3.2, 3.2, 6401, dtype=DTYPE)
    _class_curves(top, data, x)
    top.set(ylabel="density", ylim=(0, 0.46))
    for level, colour, width in ((c, "0.55", 0.8), (0.0, "black", 1.6)):
        bottom.plot(x, data.confidence(x, torch.tensor(level, dtype=DTYPE)), color=colour, linewidth=width)
    bottom.text(-1.25, 0.42, "$c=0$ (true)", ha="right")
    bottom.annotate(
        f"$c={c:g}$",
        xy=(2.46, 1.09),
        xytext=(1.15, 1.25),
        color="0.35",
        arrowprops={"arrowstyle": "-", "color": "0.55", "shrinkB": 0},
    )
    bottom.axhspan(0, 1, color="0.5", alpha=0.07, linewidth=0)
    bottom.text(
        -3.15, 1.02, "probabilities lie below this edge", fontsize="x-small", color="0.35", va="bottom"
    )
    bottom.set(xlabel="$x$", ylabel="classifier's $p(y{=}1|x)$", ylim=(-0.05, 1.45), xlim=(-3.2, 3.2))
    for axes in (top, bottom):
        axes.axvline(x0, color=ORANGE, linestyle="--", linewidth=1.2)
    top.text(x0 + 0.05, 0.435, f"$x_0={x0:g}$", color=ORANGE, va="center")
    _panel_title(top, "a", "Two-Gaussian data")
    _panel_title(bottom, "b", "Classifier")
    return figure


def plot_label_flips(result: dict[str, Any]) -> Figure:
    """Fig. 3b from label_flips' result: both readings of "flip", and where the classifier breaks down."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.7))
    for axes, key, letter, title in zip(
        panels,
        ("flipped", "crossed", "outside"),
        "abc",
        ("Final sign flipped", "Below 0 at some step", "Confidence left (0, 1) at some step"),
        strict=True,
    ):
        _share_lines(axes, result, key)
        axes.set(xlabel="guidance weight $\\lambda$", ylim=(-0.02, 1.0))
        _panel_title(axes, letter, title)
    panels[0].set(ylim=(0, 0.72), ylabel="label flip probability $P(x_{t=0}<0)$")
    panels[1].set_ylabel("label flip probability $P_{<0}$ of Prop. 1")
    panels[2].set_ylabel("share of runs")
    return figure


def shares(result: dict[str, Any], key: str, level: int) -> tuple[list[float], list[tuple[float, float]]]:
    """Per λ at the level's index: the share of finite runs with event `key`, and its 95 % Wilson interval."""
    finite = [result["n_runs"] - lost for lost in result["not_finite"][level]]
    events = list(zip(result[key][level], finite, strict=True))
    return [k / n if n else math.nan for k, n in events], [
        wilson(k, n) if n else (0.0, 1.0) for k, n in events
    ]


def _share_lines(axes: Axes, result: dict[str, Any], key: str) -> None:
    """A line with error bars per noise level, labelled at its right end."""
    weights = result["weights"]
    colours = sns.color_palette("viridis", len(result["levels"]) + 1)  # without the palest yellow
    ends = []
    for index, _ in enumerate(result["levels"]):
        share, intervals = shares(result, key, index)
        errors = np.abs(np.array(intervals).T - np.array(share))
        marker = MARKERS[index % len(MARKERS)]
        axes.errorbar(
            weights,
            share,
            errors,
            color=colours[index],
            marker=marker,
            markersize=4,
            linewidth=1.3,
            capsize=2,
        )
        ends.append(share[-1])
    low, high = (0.0, 0.72) if key == "flipped" else (0.0, 1.0)
    for level, height, y, colour in zip(
        result["levels"], ends, spread(ends, 0.055 * (high - low)), colours, strict=False
    ):
        x = weights[-1]
        axes.plot([x * 1.02, x * 1.055], [height, y], color=colour, linewidth=0.7, clip_on=False)
        axes.text(x * 1.065, y, f"$c={level:g}$", color=colour, va="center", fontsize="small")
    axes.set_xlim(-0.02 * weights[-1], 1.2 * weights[-1])
    axes.set_xticks(np.linspace(0, weights[-1], 6))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights for labels at least `gap` apart and above 0, in the order of the given ones and near them."""
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, dtype=float)[order]
    for _ in range(100):
        for lower in range(len(placed) - 1):
            missing = gap - (placed[lower + 1] - placed[lower])
            if missing > 0:
                placed[lower] -= missing / 2
                placed[lower + 1] += missing / 2
        placed = np.maximum(placed, gap / 2)
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()


def plot_prop2(result: dict[str, Any]) -> Figure:
    """Proposition 2 from prop2_check's result: distances beside the bound, and how tight the bound is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.4))
    times = result["t_star"]
    distance, bound = np.array(result["distance"]), np.array(result["bound"])
    for values, colour, label in (
        (distance, BLUE, "distance $|r(x)-x|$"),
        (bound, ORANGE, "bound of Eq. 8"),
    ):
        left.fill_between(times, values[:, 0], values[:, 2], color=colour, alpha=0.2, linewidth=0)
        left.plot(times, values[:, 1], "o-", color=colour, markersize=4, label=label)
    left.set(xlabel="purification time $t^*$", ylabel="median and 5–99 % of runs", yscale="log")
    left.legend(loc="lower right")
    _panel_title(left, "a", "Distance and bound")
    lines = (
        ("tightest_printed", "Eq. 8, constants of all runs", "o-", BLUE),
        ("tightest_own", "Eq. 8, constants of each run", "s-", GREEN),
        ("tightest_rigorous", "$e^\\gamma-1$ for $\\gamma$, constants of each run", "^-", "0.35"),
        ("allowed", "Eq. 8, score constant at its bound, $\\epsilon=0$", "D--", ORANGE),
    )
    for key, label, style, colour in lines:
        right.plot(times, result[key], style, color=colour, markersize=4, label=label)
    right.axhline(1, color="black", linewidth=1)
    right.text(times[-1], 0.99, "violated above this line", ha="right", va="top", fontsize="small")
    right.set(xlabel="purification time $t^*$", ylabel="largest distance / bound", ylim=(0, 2.05))
    right.legend(loc="upper left", fontsize="small")
    _panel_title(right, "b", "How tight the bound gets")
    return figure


# --- What the figures say, in words -----------------------------------------------------------------------


def read_label_flips(result: dict[str, Any]) -> str:
    """Markdown that reads label_flips' result: best λ per noise level, harm, and where p leaves (0, 1)."""
    weights, levels = result["weights"], result["levels"]
    ends, crosses = ([shares(result, key, i) for i in range(len(levels))] for key in ("flipped", "crossed"))
    outside, far = ([shares(result, key, i)[0][-1] for i in range(len(levels))] for key in ("outside", "far"))
    rows = [
        "| c | final flips at the best λ | … at the largest λ | ever below 0 at the best λ | … at the "
        "largest λ "
        f"| confidence left (0, 1) | ends at \\|x\\| > {FAR:g} |",
        "|---" * 7 + "|",
    ]
    for i, level in enumerate(levels):
        cells = [f"{level:g}", *_best_and_last(weights, *ends[i]), *_best_and_last(weights, *crosses[i])]
        rows.append("| " + " | ".join([*cells, f"{outside[i]:.2%}", f"{far[i]:.2%}"]) + " |")
    harmful = [f"{level:g}" for level, (_, ci) in zip(levels, ends, strict=True) if ci[-1][0] > ci[0][1]]
    helped = all(share[j] < share[0] for share in (ends[0][0], crosses[0][0]) for j in range(1, len(weights)))
    lost = sum(map(sum, result["not_finite"]))
    verdict = (
        f"With the true classifier (c = 0) both kinds of flip are {'' if helped else 'NOT '}rarer at "
        "every λ > 0. "
    )
    if harmful:
        verdict += (
            f"For c = {', '.join(harmful)} there are more final flips at λ = {weights[-1]:g} than without "
            "guidance: “overall helpful” ends there, as the paper says of high noise. "
        )
    return "\n".join(
        [
            f"**Reading** ({result['n_runs']:,} runs per point, 95 % Wilson intervals; the last two "
            "columns are "
            f"for λ = {weights[-1]:g}). Without guidance {_percent(ends[0][0][0], ends[0][1][0])} of the "
            "runs "
            f"end below zero and {_percent(crosses[0][0][0], crosses[0][1][0])} are below zero at some step.",
            "",
            *rows,
            "",
            f"{verdict}Runs that became NaN or infinite: {lost:,}. A large c does not break the "
            "arithmetic but "
            "the model: the confidence leaves (0, 1) (up to "
            f"{max(outside):.1%} of the runs), its poles throw runs far away (up to {max(far):.1%}), and "
            "the sign "
            "of such a run says little about labels.",
        ]
    )


def _best_and_last(
    weights: Sequence[float], share: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> list[str]:
    best = int(np.nanargmin(share))
    return [f"{share[best]:.2%} (λ = {weights[best]:g})", _percent(share[-1], intervals[-1])]


def _percent(share: float, interval: tuple[float, float]) -> str:
    return f"{100 * share:.2f} % [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def read_prop1(result: dict[str, Any], hypotheses: dict[str, Any]) -> str:
    """Markdown that reads label_flips' and prop1_hypotheses' results against Proposition 1."""
    low, high = hypotheses["slope"]
    monotone = "f₀ is strictly *decreasing*: **hypothesis (ii) fails**" if high < 0 else "of both signs"
    push = ", ".join(
        f"{share:.1%} (c = {level:g})"
        for level, share in zip(result["levels"], hypotheses["push_share"], strict=True)
    )
    rows = ["| c | " + " | ".join(f"λ = {weight:g}" for weight in result["weights"][1:]) + " |"]
    rows.append("|---" * len(result["weights"]) + "|")
    for i, level in enumerate(result["levels"]):
        pairs = zip(result["crossed_saved"][i][1:], result["crossed_harmed"][i][1:], strict=True)
        rows.append(
            f"| {level:g} | " + " | ".join(f"{saved:,} / {harmed:,}" for saved, harmed in pairs) + " |"
        )
    harmed = sum(result["crossed_harmed"][0])
    return "\n".join(
        [
            f"**Reading.** Over t ∈ [0, 1] and x ∈ (0, {hypotheses['x_max']:g}], ∂f₀/∂x lies in "
            f"[{low:.3g}, {high:.3g}] in the direction of travel; {monotone}. Read as Eq. 5 prints the drift "
            "(it multiplies dt < 0), both signs turn: then (ii) holds and (i) is reversed. In neither "
            "reading do "
            "both hold, contrary to the remark below Proposition 1. The weaker condition: "
            f"1 + Δt·∂f₀/∂x ≥ {hypotheses['growth']:.4f}.",
            "",
            f"Share of x ∈ (0, {hypotheses['x_max']:g}] on which guidance pushes away from the boundary, "
            f"hypothesis (i): {push}.",
            "",
            "Runs that guidance *keeps from* crossing zero / *makes* cross it, with the same noise:",
            "",
            *rows,
            "",
            f"With the true classifier guidance made {harmed:,} runs cross: the conclusion (Eq. 7) "
            + ("**holds, path by path**" if harmed == 0 else "**does not hold path by path**")
            + ", strictly where the first number is above 0. With a noisy classifier (i) holds on part of "
            "the axis "
            "only and the order of paths is lost; what remains is the balance of the two numbers.",
        ]
    )


def read_prop2(result: dict[str, Any]) -> str:
    """Markdown that reads prop2_check's result."""
    rows = [
        "| t* | γ(t*) | C_s | C_p | median distance | median bound | runs within Eq. 8 | largest "
        "distance/bound "
        "| … with each run's constants | counterexample |",
        "|---" * 10 + "|",
    ]
    for i, t_star in enumerate(result["t_star"]):
        numbers = [t_star, *(result[key][i] for key in ("gamma", "c_s", "c_p"))]
        numbers += [result["distance"][i][1], result["bound"][i][1]]
        cells = [f"{value:.4g}" for value in numbers] + [f"{result['held_printed'][i]:.2%}"]
        cells += [f"{result[key][i]:.3f}" for key in ("tightest_printed", "tightest_own", "allowed")]
        rows.append("| " + " | ".join(cells) + " |")
    held = min(result["held_printed"] + result["held_own"])
    used = [result["distance"][i][1] / result["bound"][i][1] for i in (0, -1)]
    first, last = result["t_star"][0], result["t_star"][-1]
    return "\n".join(
        [
            "**Reading.** The lowest share of runs within Eq. 8, over all t* and for constants of all "
            "runs or of "
            f"each run, is {held:.2%}. The median distance is {used[0]:.0%} of the median bound at t* = "
            f"{first:g} "
            f"and {used[1]:.0%} at t* = {last:g}: for short times the noise term is nearly all of both.",
            "",
            *rows,
            "",
            "As printed, Eq. 8 does not follow from its assumptions: a score that stays at its bound "
            "moves x = 0, "
            f"without noise, up to {max(result['allowed']) - 1:.1%} beyond it (last column, orange in the "
            "figure). "
            "With e^γ - 1 for γ before C_s + C_p the bound is a theorem. Here the slack of the other "
            "terms hides "
            "the difference.",
        ]
    )
