"""Fig. 4: accuracy and robustness along t* and λ; chosen on validation, confirmed once on the test split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coup_lib.checks import number
from coup_lib.defences import LABELS
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Accuracy, Difference
from coup_lib.evaluation.progress import Plan
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.specs import OF
from coup_lib.evaluation.stats import LEVEL
from coup_lib.reporting import plots, tables
from coup_lib.reporting.toy_figures import spread

Row = dict[str, np.ndarray]  # column → share of right draws of each image, (n,)
Sweep = dict[float, Row]  # value of t* or λ → row

T_STARS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
WEIGHTS = (0, 0.25, 0.5, 1, 2, 4, 8)
SYMBOLS = {"t_star": "t*", "guidance_weight": "λ"}
SHOWN = {"clean": "clean", "adaptive": "{gradient}", "first_order": "first-order", "worst": "worst of these"}
STYLES = {  # marker, line, filled
    "clean": ("^", ":", True),
    "adaptive": ("D", "-", True),
    "first_order": ("v", "--", True),
    "worst": ("o", "-", False),
}
JUDGED = ("adaptive", "worst")  # what the paper looks at, and what a claim has to stand on


def values_to_sweep(config: Config, name: str, values: Any) -> list[float]:
    """The values in order, with the profile's own (the paper's choice) among them.

    Raises:
        ValueError: unless they are numbers, and at least three.
    """
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{name}: expected a list of numbers; got {values!r}")
    found = sorted({getattr(config, name), *(number(name, value, -1e3, 1e3) for value in values)})
    if len(found) < 3:
        raise ValueError(f"{name}: expected three values or more, the profile's own included; got {found}")
    return found


def at(config: Config, name: str, value: float) -> Config:
    """The configuration with another t* or λ."""
    changes: dict[str, Any] = {name: value}
    return replace(config, **changes)


def measure(config: Config) -> Row:
    """COUP's columns; without guidance it is reverse-only, whose records serve more than one notebook.

    Every λ faces what is made against none (a column) and against the paper's λ (lent) at the same t*. Values
    are compared by the worst of these attacks ("worst"): on record ("recorded") the paper's own faces more.
    """
    defence, papers = "coup" if config.guidance_weight else "reverse", config.sizes.guidance_weight
    evaluation = Evaluation(config, verbose=False)
    row = evaluation.columns((defence,))
    if config.guidance_weight != papers:
        gradients = {"adaptive": config.gradient, "first_order": "first_order"}
        lent = {
            f"{name}{OF}coup": against("apgd-ce", "coup", gradient, guidance_weight=papers)
            for name, gradient in gradients.items()
        }
        row[defence] |= evaluation.scores({defence: lent})[defence]
    return tables.shares(row)[defence] | {"recorded": evaluation.recorded(row)[defence].right}


def sweep(config: Config, name: str, values: Sequence[float]) -> Sweep:
    """COUP's columns for every value of "t_star" or "guidance_weight", all else as in `config`."""
    plan, found = Plan([1.0] * len(values), verbose=True), {}
    for value in values:
        here = at(config, name, value)
        plan.start(f"t* = {here.t_star:g}, λ = {here.guidance_weight:g}")
        found[value] = measure(here)
    return found


def best(found: Sweep, column: str) -> float:
    """The value with the highest mean in this column; of equal ones the smallest."""
    return max(found, key=lambda value: (float(found[value][column].mean()), -value))


# --- claims ---


def simultaneous(right: np.ndarray, reference: np.ndarray, comparisons: int) -> Difference:
    """The paired difference with an interval that holds for this many comparisons at once (Bonferroni).

    Whoever looks at many differences and reports the most striking one needs wider intervals.
    """
    return Difference.of(right, reference, 1 - (1 - LEVEL) / comparisons)


def falls(found: Sweep, column: str = "clean") -> tuple[str, str]:
    """(verdict, evidence) on: the column falls from the first value to the last and never rises."""
    values = list(found)
    ends = Difference.of(found[values[0]][column], found[values[-1]][column])
    steps = [
        simultaneous(found[after][column], found[before][column], len(values) - 1)
        for before, after in pairwise(values)
    ]
    verdict = "does not hold" if any(step.low > 0 for step in steps) else ends.verdict
    return verdict, f"{values[0]:g} minus {values[-1]:g}: {ends}"


def peaks_inside(found: Sweep, column: str) -> tuple[str, str]:
    """(verdict, evidence) on: both the smallest and the largest value are worse than some value between."""
    first, *between, last = found
    peak = best({value: found[value] for value in between}, column)
    # The peak was chosen among as many as lie between, and is compared with two ends.
    ends = [simultaneous(found[peak][column], found[end][column], 2 * len(between)) for end in (first, last)]
    evidence = "; ".join(
        f"{peak:g} minus {end:g}: {difference}" for end, difference in zip((first, last), ends, strict=True)
    )
    return _joint(ends), evidence


def is_best(found: Sweep, column: str, value: float) -> tuple[str, str]:
    """(verdict, evidence) on: `value` is better than every other one; the evidence is its strongest rival."""
    others = [other for other in found if other != value]
    rivals = {
        other: simultaneous(found[value][column], found[other][column], len(others)) for other in others
    }
    closest = min(rivals, key=lambda other: rivals[other].high)
    evidence = f"{value:g} minus its strongest rival, {closest:g}: {rivals[closest]}"
    return _joint(list(rivals.values())), evidence


def _joint(differences: Sequence[Difference]) -> str:
    """The verdict on: all of them are positive."""
    verdicts = {difference.verdict for difference in differences}
    for verdict in ("does not hold", "is not decided"):
        if verdict in verdicts:
            return verdict
    return "holds"


def claim_lines(times: Sweep, weights: Sweep, config: Config) -> str:
    """Markdown: a table with the paper's claims of Sec. 5.4, the verdict on each, and what it rests on."""
    labels = tables.column_names({"coup": times[config.t_star]}, config)
    lines = ["| Claim (Sec. 5.4) | Measured as | Verdict | Evidence (points) |", "|---" * 4 + "|"]

    def add(claim: str, column: str, judged: tuple[str, str]) -> None:
        lines.append(f"| {claim} | {labels[column]} | **{judged[0]}** | {judged[1]} |")

    add("accuracy falls as t* grows", "clean", falls(times))
    claims: list[tuple[str, Callable[[str], tuple[str, str]]]] = [
        ("too short and too long t* are both worse", lambda column: peaks_inside(times, column)),
        (f"t* = {config.t_star:g} is best", lambda column: is_best(times, column, config.t_star)),
        (
            f"λ = {config.guidance_weight:g} is best",
            lambda column: is_best(weights, column, config.guidance_weight),
        ),
    ]
    for claim, judge in claims:
        for column in JUDGED:
            add(claim, column, judge(column))
    lines += [
        "",
        f"On n = {config.n_images} images of the {config.split} split; paired 95 % intervals, and where one "
        "of several differences is picked out, wide enough for all of them at once (Bonferroni).",
    ]
    return "\n".join(lines)


def guidance_line(weights: Sweep, config: Config) -> str:
    """Markdown: what the most guidance does to robustness, by the adaptive and by the worst attack."""
    labels = tables.column_names({"coup": weights[config.guidance_weight]}, config)
    low, high = min(weights), max(weights)
    found = {name: Difference.of(weights[high][name], weights[low][name]) for name in JUDGED}
    says = "; ".join(
        f"{labels[name]}: **{difference.verdict}** ({difference})" for name, difference in found.items()
    )
    masked = found["adaptive"].verdict == "holds" and found["worst"].verdict == "does not hold"
    meaning = (
        " Guidance did not make the images safer, but the defence's own gradient a worse guide for attacks."
    )
    return (
        f"*The more guidance the better* (λ = {high:g} minus λ = {low:g}): {says}.{meaning if masked else ''}"
    )


# --- choice and confirmation ---


def choices(times: Sweep, weights: Sweep, config: Config) -> dict[str, Config]:
    """What is to be confirmed: the paper's own setting, and the best t* and the best λ by the worst case.

    Each of the two is chosen with the other at the paper's value, as in the paper's two sweeps.
    """
    return {
        "the paper's": config,
        "best t* by the worst case": replace(config, t_star=best(times, "worst")),
        "best λ by the worst case": replace(config, guidance_weight=best(weights, "worst")),
    }


def confirm(chosen: Mapping[str, Config], config: Config) -> dict[str, tuple[Config, Row]]:
    """The same settings on the images and with the budget of `config`."""
    plan, found = Plan([1.0] * len(chosen), verbose=True), {}
    for label, setting in chosen.items():
        here = replace(config, t_star=setting.t_star, guidance_weight=setting.guidance_weight)
        plan.start(label)
        found[label] = here, measure(here)
    return found


def confirmation_table(confirmed: Mapping[str, tuple[Config, Row]]) -> pd.DataFrame:
    """Accuracies of the settings, and the paired differences from the first one, the paper's."""
    (reference_config, reference), *_ = confirmed.values()
    labels = tables.column_names({"coup": reference}, reference_config)
    rows = {}
    for label, (config, row) in confirmed.items():
        cells = {"t*": f"{config.t_star:g}", "λ": f"{config.guidance_weight:g}", "n": str(config.n_images)}
        cells |= {text: str(Accuracy.of(row[name])) for name, text in labels.items() if name in SHOWN}
        for name in JUDGED:
            same = (config.t_star, config.guidance_weight) == (
                reference_config.t_star,
                reference_config.guidance_weight,
            )
            cells[f"Minus the paper's: {labels[name]}"] = (
                "–" if same else str(Difference.of(row[name], reference[name]))
            )
        rows[label] = cells
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Setting (accuracies in %)")


def confirmation_lines(confirmed: Mapping[str, tuple[Config, Row]]) -> str:
    """Markdown: whether what was chosen on validation is better than the paper's setting, per column."""
    (_, (paper_config, reference)), *others = confirmed.items()
    labels = tables.column_names({"coup": reference}, paper_config)
    lines = []
    for label, (config, row) in others:
        where = f"t* = {config.t_star:g}, λ = {config.guidance_weight:g} ({label})"
        if (config.t_star, config.guidance_weight) == (paper_config.t_star, paper_config.guidance_weight):
            lines.append(f"- {where} is the paper's own setting.")
            continue
        says = [
            f"{labels[name]}: **{difference.verdict}** ({difference})"
            for name in JUDGED
            for difference in [Difference.of(row[name], reference[name])]
        ]
        without = " That is no guidance at all." if config.guidance_weight == 0 else ""
        lines.append(f"- *Better than the paper's setting*: {where}. {'; '.join(says)}.{without}")
    return "\n".join(lines)


# --- tables and figure ---


def sweep_table(found: Sweep, config: Config, name: str) -> pd.DataFrame:
    """One row per value, "accuracy [95 % interval]" in percent per column."""
    labels = tables.column_names({"coup": next(iter(found.values()))}, config)
    rows = {
        _label(at(config, name, value), name): {
            text: str(Accuracy.of(row[key])) for key, text in labels.items()
        }
        for value, row in found.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Purifier (%)")


def _label(config: Config, name: str) -> str:
    defence = LABELS["coup" if config.guidance_weight else "reverse"]
    return f"{defence}, {SYMBOLS[name]} = {getattr(config, name):g}"


def numbers(found: Sweep, config: Config, name: str) -> pd.DataFrame:
    """The same in long form for a CSV, with t* and λ of each row."""
    frames = []
    for value, row in found.items():
        here = at(config, name, value)
        defence = "coup" if here.guidance_weight else "reverse"
        frame = tables.numbers({defence: row}, here, split=here.split)
        frames.append(frame.assign(t_star=here.t_star, guidance_weight=here.guidance_weight))
    return pd.concat(frames, ignore_index=True)


def figure(times: Sweep, unguided: Sweep, weights: Sweep, config: Config) -> Figure:
    """Fig. 4: (a) along t*, with the worst case of reverse-only beside; (b) along λ."""
    whole, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    labels = {name: label.format(gradient=config.gradient.replace("_", "-")) for name, label in SHOWN.items()}
    ends = _lines(left, times, labels, plots.COLOURS["coup"])
    ends += _lines(left, unguided, {"worst": "w/o guidance, worst"}, plots.COLOURS["reverse"])
    _name(left, ends, len(times))
    _name(right, _lines(right, weights, labels, plots.COLOURS["coup"]), len(weights))
    for axes, found in ((left, times), (right, weights)):
        _ring_best(axes, found)
    _axis(left, list(times), config.t_star, "purification time t*")
    _axis(right, list(weights), config.guidance_weight, "guidance weight λ (0: COUP w/o guidance)")
    left.set(ylim=(0, 103), ylabel=f"accuracy (%), n = {config.n_images}, 95 % interval")
    left.set_title(f"(a) COUP, λ = {config.guidance_weight:g}", loc="left", fontsize="medium")
    right.set_title(f"(b) COUP, t* = {config.t_star:g}", loc="left", fontsize="medium")
    return whole


def _shifts(n: int) -> np.ndarray:
    """Sideways, so that the error bars of n lines do not lie on each other."""
    return np.linspace(-0.12, 0.12, n) if n > 1 else np.array([0.18])


def _lines(axes: Axes, found: Sweep, labels: Mapping[str, str], colour: Any) -> list[tuple[str, float, Any]]:
    """One line per column against the place of the value; returns label, last height and colour of each."""
    ends = []
    for column, shift in zip(labels, _shifts(len(labels)), strict=True):
        heights, errors = plots.bars([row[column] for row in found.values()])
        marker, line, fill = STYLES[column]
        axes.errorbar(
            np.arange(len(found)) + shift,
            heights,
            errors,
            fmt=marker + line,
            color=colour,
            markerfacecolor=colour if fill else "white",
            markersize=5,
            linewidth=1.3,
            elinewidth=0.7,
            capsize=1.5,
        )
        ends.append((labels[column], float(heights[-1]), colour))
    return ends


def _name(axes: Axes, ends: Sequence[tuple[str, float, Any]], n: int) -> None:
    """The lines' labels, right of the n-th place, moved apart where they would lie on each other."""
    heights = spread([height for _, height, _ in ends], 5.5)
    for (label, _, colour), height in zip(ends, heights, strict=True):
        where = (n - 0.72, height)
        axes.annotate(label, where, color=colour, va="center", fontsize="small", annotation_clip=False)


def _ring_best(axes: Axes, found: Sweep) -> None:
    """A ring around the best value of every judged column."""
    for column, shift in zip(SHOWN, _shifts(len(SHOWN)), strict=True):
        if column in JUDGED:
            value = best(found, column)
            height = 100 * float(found[value][column].mean())
            place = list(found).index(value) + shift
            axes.scatter(place, height, s=120, facecolors="none", edgecolors="black", zorder=3)


def _axis(axes: Axes, values: Sequence[float], papers: float, label: str) -> None:
    """Values at equal distances, and a line where the paper's choice is."""
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_xlabel(label)
    axes.axvline(values.index(papers), color="0.75", linewidth=5, alpha=0.5, zorder=0)
    axes.annotate(
        "the paper's",
        (values.index(papers), 1.01),
        xycoords=("data", "axes fraction"),
        ha="center",
        color="0.4",
        fontsize="small",
    )


def figure_caption(times: Sweep, weights: Sweep, config: Config) -> str:
    """Markdown: what the figure shows, with the best values named."""
    labels = tables.column_names({"coup": times[config.t_star]}, config)
    peaks = "; ".join(
        f"{labels[column]}: t* = {best(times, column):g} and λ = {best(weights, column):g}"
        for column in JUDGED
    )
    gradient = config.gradient.replace("_", "-")
    return (
        f"Accuracy of COUP on the {config.split} split along t* (a) and λ (b). Ringed is the best of a line "
        f"({peaks}); the grey bar marks the paper's choice. “{gradient}” and “first-order” are the gradients "
        "that APGD-ce follows. In (a) also reverse-only at the same t*. Every λ faces what is made against "
        f"λ = 0 and λ = {config.sizes.guidance_weight:g}, too."
    )
