"""Figures and tables of the toy study (notebook 00), from its records."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from coup_lib.evaluation.stats import Estimate, mean_interval
from coup_lib.reporting.plots import PALETTE, band, estimates, titles
from coup_lib.studies.toy import DTYPE, FAR, TwoGaussians

BLUE, ORANGE, GREEN = PALETTE[:3]
MARKERS = "os^Dv*Px<>"


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
    m, (p0, p1) = data.mean, data.class_densities(x)
    objectives: tuple[tuple[str, Tensor, dict[float, tuple[float, ...]]], ...] = (
        ("$p(x)$", (p0 + p1) / 2, {0.0: (-1.8, -1.15, -0.5, 0.5, 1.15, 1.8)}),
        (
            r"$\max_y\,p(x|y)$",
            torch.maximum(p0, p1),
            {-m: (-m - 1.15, -m - 0.5, 0.46 - m), m: (m - 0.46, m + 0.5, m + 1.15)},
        ),
    )
    for axes, (label, objective, peaks) in zip(panels, objectives, strict=True):
        _class_curves(axes, data, x)
        axes.axvline(0, ymax=0.86, color="0.6", linewidth=0.8, zorder=0)
        axes.plot(x, objective, ":", color=ORANGE, linewidth=2.6)
        for peak, starts in peaks.items():
            for start in starts:
                _uphill_arrow(axes, x, objective, start, start + 0.8 * max(-0.4, min(0.4, peak - start)))
        axes.text(0, 0.47, label, color=ORANGE, ha="center", va="center")
        axes.text(0.06, 0.01, "boundary", color="0.35", fontsize="small")
        axes.set(xlabel="$x$", ylim=(0, 0.5), xlim=(-3.4, 3.4))
    titles(panels, ("Without guidance: maximise $p(x)$", "With guidance: maximise max$_y$ $p(x|y)$"))
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
    line = {"arrowstyle": "-", "color": "0.55", "shrinkB": 0}
    bottom.annotate(f"$c={c:g}$", xy=(2.46, 1.09), xytext=(1.15, 1.25), color="0.35", arrowprops=line)
    bottom.axhspan(0, 1, color="0.5", alpha=0.07, linewidth=0)
    edge = {"fontsize": "x-small", "color": "0.35", "va": "bottom"}
    bottom.text(-3.15, 1.02, "probabilities lie below this edge", **edge)
    bottom.set(xlabel="$x$", ylabel="classifier's $p(y{=}1|x)$", ylim=(-0.05, 1.45), xlim=(-3.2, 3.2))
    for axes in (top, bottom):
        axes.axvline(x0, color=ORANGE, linestyle="--", linewidth=1.2)
    top.text(x0 + 0.05, 0.435, f"$x_0={x0:g}$", color=ORANGE, va="center")
    titles((top, bottom), ("Two-Gaussian data", "Classifier"))
    return figure


def plot_label_flips(result: dict[str, Any]) -> Figure:
    """Fig. 3b from label_flips' result: both readings of "flip", and where the classifier breaks down."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.7))
    for axes, event in zip(panels, ("flipped", "crossed", "outside"), strict=True):
        _share_lines(axes, result, event)
        axes.set(xlabel="guidance weight $\\lambda$", ylim=(-0.02, 1.0))
    titles(panels, ("Final sign flipped", "Below 0 at some step", "Confidence left (0, 1) at some step"))
    panels[0].set(ylim=(0, 0.72), ylabel="label flip probability $P(x_{t=0}<0)$")
    panels[1].set_ylabel("label flip probability $P_{<0}$ of Prop. 1")
    panels[2].set_ylabel("share of runs")
    return figure


def shares(result: dict[str, Any], event: str, level: int) -> list[Estimate]:
    """Per λ at the level's index: the share of finite runs with this event, and its 95 % interval."""
    found = []
    for k, lost in zip(result[event][level], result["not_finite"][level], strict=True):
        n = result["n_runs"] - lost
        interval = mean_interval(np.array([0, 1]), counts=np.array([n - k, k])) if n else (0.0, 1.0)
        found.append(Estimate(k / n if n else math.nan, *interval))
    return found


def rarer(found: Sequence[Estimate]) -> str:
    """What the intervals per λ say of: the event is rarer at the largest λ than at λ = 0."""
    first, last = found[0], found[-1]
    if last.high < first.low:
        return "holds"
    return "does not hold" if last.low > first.high else "is not decided"


def _share_lines(axes: Axes, result: dict[str, Any], event: str) -> None:
    """A line with error bars per noise level, labelled at its right end."""
    weights, levels = result["weights"], result["levels"]
    colours = sns.color_palette("viridis", len(levels) + 1)[:-1]  # without the palest yellow
    found = [shares(result, event, index) for index in range(len(levels))]
    for index, (colour, each) in enumerate(zip(colours, found, strict=True)):
        look = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        estimates(axes, weights, each, linewidth=1.3, **look)
    ends, x = [each[-1].value for each in found], weights[-1]
    heights = spread(ends, 0.055 * (0.72 if event == "flipped" else 1.0))
    for level, end, height, colour in zip(levels, ends, heights, colours, strict=True):
        axes.plot([x * 1.02, x * 1.055], [end, height], color=colour, linewidth=0.7, clip_on=False)
        axes.text(x * 1.065, height, f"$c={level:g}$", color=colour, va="center", fontsize="small")
    axes.set_xlim(-0.02 * x, 1.2 * x)
    axes.set_xticks(np.linspace(0, x, 6))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights for labels at least `gap` apart and above 0, in the order of the given ones."""
    placed, lowest = list(heights), gap / 2
    for place in np.argsort(heights, kind="stable").tolist():
        placed[place] = max(heights[place], lowest)
        lowest = placed[place] + gap
    return placed


def plot_prop2(result: dict[str, Any]) -> Figure:
    """Proposition 2 from prop2_check's result: distances beside the bound, and how tight the bound is."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.8, 3.4))
    times = result["t_star"]
    for key, colour, label in (
        ("distance", BLUE, "distance $|r(x)-x|$"),
        ("bound", ORANGE, "bound of Eq. 8"),
    ):
        low, middle, high = np.array(result[key]).T
        band(left, times, middle, (low, high), "o-", colour, label=label)
    left.set(xlabel="purification time $t^*$", ylabel="median and 5–99 % of runs", yscale="log")
    left.legend(loc="lower right")
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
    titles((left, right), ("Distance and bound", "How tight the bound gets"))
    return figure


# --- Tables -----------------------------------------------------------------------------------------------


def flip_table(result: dict[str, Any]) -> pd.DataFrame:
    """Shares of runs of `toy.label_flips` per noise level, in percent, and what guidance does to the flips.

    The verdict compares the intervals at the largest λ and at λ = 0.
    """
    weights, lines = result["weights"], []
    for index, level in enumerate(result["levels"]):
        line = {"c": f"{level:g}"}
        for event, label in (("flipped", "Final flip"), ("crossed", "Ever below 0")):
            found = shares(result, event, index)
            best = int(np.nanargmin([each.value for each in found]))
            line[f"{label}, λ = 0"] = _percent(found[0])
            line[f"{label}, best λ"] = f"{100 * found[best].value:.2f} % (λ = {weights[best]:g})"
            line[f"{label}, λ = {weights[-1]:g}"] = _percent(found[-1])
            line[f"{label}: rarer with guidance"] = rarer(found)
        for event, label in (
            ("outside", "Confidence left (0, 1)"),
            ("far", f"Ends at &#124;x&#124; > {FAR:g}"),
        ):
            line[label] = f"{100 * shares(result, event, index)[-1].value:.2f} %"
        line["NaN or infinite"] = f"{sum(result['not_finite'][index]):,} runs"
        lines.append(line)
    return pd.DataFrame(lines).set_index("c")


def hypothesis_table(hypotheses: dict[str, Any]) -> pd.DataFrame:
    """The result of `toy.prop1_hypotheses` about the unguided drift f₀, in the direction of travel."""
    (low, high), growth = hypotheses["slope"], hypotheses["growth"]
    lines = [
        ["(ii) f₀ increases: smallest and largest ∂f₀/∂x", f"{low:.3g}, {high:.3g}", low > 0],
        ["Euler steps keep the order: smallest 1 + Δt·∂f₀/∂x", f"{growth:.4f}", growth > 0],
    ]
    where = f"For t in [0, 1] and x in (0, {hypotheses['x_max']:g}]"
    frame = pd.DataFrame(lines, columns=["Hypothesis", where, "Verdict"]).set_index("Hypothesis")
    return frame.replace({"Verdict": {True: "holds", False: "does not hold"}})


def crossing_table(result: dict[str, Any], hypotheses: dict[str, Any]) -> pd.DataFrame:
    """Per noise level, the runs that guidance keeps from crossing zero and makes cross, with the same noise.

    Hypothesis (i) is the share of the axis on which guidance pushes away from the boundary.
    """
    lines = []
    for index, level in enumerate(result["levels"]):
        saved, harmed = (result[f"crossed_{name}"][index] for name in ("saved", "harmed"))
        line = {"c": f"{level:g}", "(i) holds at": f"{hypotheses['push_share'][index]:.1%} of x"}
        for place, weight in enumerate(result["weights"]):
            if weight:
                line[f"λ = {weight:g}"] = f"{saved[place]:,} / {harmed[place]:,}"
        line["Eq. 7, path by path"] = "does not hold" if any(harmed) else "holds"
        lines.append(line)
    return pd.DataFrame(lines).set_index("c")


def prop2_table(result: dict[str, Any]) -> pd.DataFrame:
    """The result of `toy.prop2_check`, one line per t*."""
    distance, bound = (np.array(result[key])[:, 1] for key in ("distance", "bound"))
    columns = {
        "γ(t*)": ("{:.4g}", result["gamma"]),
        "C_s": ("{:.4g}", result["c_s"]),
        "C_p": ("{:.4g}", result["c_p"]),
        "Median distance": ("{:.4g}", distance),
        "Median bound": ("{:.4g}", bound),
        "Their ratio": ("{:.0%}", distance / bound),
        "Runs within Eq. 8": ("{:.2%}", result["held_printed"]),
        "… with each run's constants": ("{:.2%}", result["held_own"]),
        "Largest distance/bound": ("{:.3f}", result["tightest_printed"]),
        "… with each run's constants ": ("{:.3f}", result["tightest_own"]),
        "Allowed by the assumptions": ("{:.3f}", result["allowed"]),
    }
    frame = pd.DataFrame({name: map(style.format, values) for name, (style, values) in columns.items()})
    return frame.set_index(pd.Index([f"{t_star:g}" for t_star in result["t_star"]], name="t*"))


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.2f} % [{100 * share.low:.2f}, {100 * share.high:.2f}]"
