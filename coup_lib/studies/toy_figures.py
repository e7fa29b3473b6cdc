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
from coup_lib.reporting.plots import PALETTE, estimates, titles
from coup_lib.studies.toy import DTYPE, FAR, TwoGaussians

BLUE, ORANGE, GREEN = PALETTE[:3]
MARKERS = "os^Dv*Px<>"


def _class_curves(axes: Axes, data: TwoGaussians, x: Tensor) -> None:
    for label, (density, colour) in enumerate(zip(data.class_densities(x), (BLUE, GREEN), strict=True)):
        axes.plot(x, density, color=colour, label=f"$p(x|y{{=}}{label})$")


def plot_objectives(data: TwoGaussians) -> Figure:
    """Fig. 1a: what is maximised without and with guidance; arrows are as long as its gradient is large."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True)
    x = torch.linspace(-3.4, 3.4, 801, dtype=DTYPE)
    p0, p1 = data.class_densities(x)
    objectives = {"$p(x)$": (p0 + p1) / 2, r"$\max_y\,p(x|y)$": torch.maximum(p0, p1)}
    places = slice(190, 611, 60)  # from -1.8 to 1.8, on either side of the boundary
    for axes, (label, objective) in zip(panels, objectives.items(), strict=True):
        _class_curves(axes, data, x)
        axes.plot(x, objective, ":", color=ORANGE, linewidth=2.6, label=label)
        (slope,) = torch.gradient(objective, spacing=(x,))
        steps = 1.7 * slope[places], 1.7 * slope[places] ** 2
        axes.quiver(
            x[places], objective[places] + 0.03, *steps, angles="xy", scale_units="xy", scale=1, color=ORANGE
        )
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.text(0.06, 0.01, "boundary", color="0.35", fontsize="small")
        axes.set(xlabel="$x$", ylim=(0, 0.5), xlim=(-3.4, 3.4))
        axes.legend(loc="upper left", fontsize="small")
    titles(panels, ("Without guidance: maximise $p(x)$", "With guidance: maximise max$_y$ $p(x|y)$"))
    panels[0].set_ylabel("density")
    return figure


def plot_data_and_classifier(data: TwoGaussians, x0: float, c: float = 1.0) -> Figure:
    """Fig. 3a: the class densities and the classifier's p(y=1|x), true and at noise level c."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(5.2, 4.6), sharex=True, gridspec_kw={"height_ratios": [1, 1.3]}
    )
    x = torch.linspace(-3.2, 3.2, 6401, dtype=DTYPE)
    _class_curves(top, data, x)
    top.set(ylabel="density", ylim=(0, 0.46))
    for level, colour, width in ((c, "0.55", 0.8), (0.0, "black", 1.6)):
        confidence = data.confidence(x, torch.tensor(level, dtype=DTYPE))
        bottom.plot(x, confidence, color=colour, linewidth=width, label=f"$c={level:g}$")
    bottom.axhspan(0, 1, color="0.5", alpha=0.07, linewidth=0, label="probabilities")
    bottom.set(xlabel="$x$", ylabel="classifier's $p(y{=}1|x)$", ylim=(-0.05, 1.45), xlim=(-3.2, 3.2))
    for axes in (top, bottom):
        axes.axvline(x0, color=ORANGE, linestyle="--", linewidth=1.2, label=f"$x_0={x0:g}$")
        axes.legend(loc="upper left", fontsize="small")
    titles((top, bottom), ("Two-Gaussian data", "Classifier"))
    return figure


def plot_label_flips(result: dict[str, Any]) -> Figure:
    """Fig. 3b from label_flips' result: both readings of "flip", and where the classifier breaks down."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.7), sharey=True)
    levels = result["levels"]
    colours = sns.color_palette("viridis", len(levels) + 1)[:-1]  # without the palest yellow
    for axes, event in zip(panels, ("flipped", "crossed", "outside"), strict=True):
        for index, level in enumerate(levels):
            look = {"color": colours[index], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            found = shares(result, event, index)
            estimates(axes, result["weights"], found, linewidth=1.3, label=f"$c={level:g}$", **look)
        axes.set(xlabel="guidance weight $\\lambda$", ylim=(-0.02, 1.0))
    titles(
        panels,
        (
            "Flip: $P(x_{t=0}<0)$",
            "Flip of Prop. 1: below 0 at some step",
            "Confidence left (0, 1) at some step",
        ),
    )
    panels[0].set_ylabel("share of runs")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
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
        ["Euler steps keep the order, t up to t*: smallest 1 + Δt·∂f₀/∂x", f"{growth:.4f}", growth > 0],
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
