"""The figures of the toy study, and the Markdown that reads them from their records."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from coup_lib.evaluation.stats import mean_interval
from coup_lib.reporting.plots import PALETTE
from coup_lib.studies.toy import DTYPE, FAR, TwoGaussians

BLUE, ORANGE, GREEN = PALETTE[:3]
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
    """Per λ at the level's index: the share of finite runs with event `key`, and its 95 % interval."""
    finite = [result["n_runs"] - lost for lost in result["not_finite"][level]]
    events = list(zip(result[key][level], finite, strict=True))
    return [k / n if n else math.nan for k, n in events], [
        mean_interval(np.array([0, 1]), counts=np.array([n - k, k])) if n else (0.0, 1.0) for k, n in events
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
            f"**Reading** ({result['n_runs']:,} runs per point, 95 % intervals; the last two "
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
