"""Fig. 4: accuracy and robustness along t* and λ; chosen on validation, confirmed once on the test split."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coup_lib.checks import in_one_line, number
from coup_lib.defences import LABELS
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Difference, Transfer, joint
from coup_lib.evaluation.protocol import Evaluation, paper_attacks
from coup_lib.evaluation.specs import AttackSpec
from coup_lib.evaluation.stats import LEVEL
from coup_lib.reporting import plots, tables

Right = dict[str, np.ndarray]  # column → share of right draws of each image, (n,)
Sweep = dict[float, Right]  # value of t* or λ → columns

T_STARS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
WEIGHTS = (0, 0.25, 0.5, 1, 2, 4, 8)
SYMBOLS = {"t_star": "t*", "guidance_weight": "λ"}
SHOWN = {"clean": "clean", "adaptive": "{gradient}", "first_order": "first-order", "worst": "worst of these"}
STYLES = {"clean": "^:", "adaptive": "D-", "first_order": "v--", "worst": "o-"}
JUDGED = ("adaptive", "worst")  # what the paper looks at, and what a claim has to stand on


@in_one_line()
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


def attacks(config: Config) -> dict[str, dict[Any, AttackSpec]]:
    """What COUP faces; without guidance it is the reverse SDE, whose records serve more than one notebook.

    Every λ faces what is made against λ = 0 (a column) and against the paper's λ (transferred) at the same
    t*. Values are compared by "worst", the worst of these attacks: on record, the paper's λ faces more.
    """
    defence, papers = "coup" if config.guidance_weight else "reverse", config.setup.guidance_weight
    faced = paper_attacks((defence,), config)
    if config.guidance_weight != papers:
        for name, gradient in {"adaptive": config.gradient, "first_order": "first_order"}.items():
            spec = against("apgd-ce", "coup", gradient, guidance_weight=papers)
            faced[defence][Transfer("coup", name)] = spec
    return faced


def measure(config: Config) -> Right:
    """The columns of `attacks` and the worst cases: column → share of right draws, (n,)."""
    evaluation = Evaluation(config)
    scores = evaluation.predictions(attacks(config))
    ((defence, found),) = tables.per_image_accuracy(scores).items()
    return found | {"recorded": evaluation.recorded(scores)[defence].right}


def sweep(config: Config, name: str, values: Sequence[float]) -> Sweep:
    """COUP's columns for every value of "t_star" or "guidance_weight", all else as in `config`."""
    return {value: measure(at(config, name, value)) for value in values}


def best(found: Sweep, column: str) -> float:
    """The value with the highest mean in this column; of equal ones the smallest."""
    return max(found, key=lambda value: (float(found[value][column].mean()), -value))


# --- claims ---


def simultaneous(right: np.ndarray, reference: np.ndarray, comparisons: int) -> Difference:
    """The paired difference with an interval that holds for this many comparisons at once (Bonferroni).

    Whoever looks at many differences and reports the most striking one needs wider intervals.
    """
    return Difference.of(right, reference, 1 - (1 - LEVEL) / comparisons)


def falls(found: Sweep) -> tuple[str, str]:
    """(verdict, evidence) on: clean accuracy falls from the first value to the last and never rises."""
    values, clean = list(found), [right["clean"] for right in found.values()]
    steps = [simultaneous(after, before, len(values) - 1) for before, after in pairwise(clean)]
    verdict, evidence = is_above(found, "clean", values[0], values[-1])
    return "does not hold" if any(step.low > 0 for step in steps) else verdict, evidence


def is_above(found: Sweep, column: str, value: float, other: float) -> tuple[str, str]:
    """(verdict, evidence) on: `value` is better than `other`."""
    difference = Difference.of(found[value][column], found[other][column])
    return difference.verdict, f"{value:g} minus {other:g}: {difference}"


def peaks_inside(found: Sweep, column: str) -> tuple[str, str]:
    """(verdict, evidence) on: both the smallest and the largest value are worse than some value between."""
    first, *between, last = found
    peak = best({value: found[value] for value in between}, column)
    # The peak was chosen among as many as lie between, and is compared with two ends.
    ends = {
        end: simultaneous(found[peak][column], found[end][column], 2 * len(between)) for end in (first, last)
    }
    evidence = [f"{peak:g} minus {end:g}: {difference}" for end, difference in ends.items()]
    return joint(ends.values()), "; ".join(evidence)


def is_best(found: Sweep, column: str, value: float) -> tuple[str, str]:
    """(verdict, evidence) on: `value` is better than every other one; the evidence is its strongest rival."""
    others = [other for other in found if other != value]
    rivals = {
        other: simultaneous(found[value][column], found[other][column], len(others)) for other in others
    }
    closest = min(rivals, key=lambda other: rivals[other].high)
    evidence = f"{value:g} minus its strongest rival, {closest:g}: {rivals[closest]}"
    return joint(rivals.values()), evidence


def claims(times: Sweep, weights: Sweep, config: Config) -> pd.DataFrame:
    """The paper's claims of Sec. 5.4, and that more guidance is better: verdicts, and what they rest on."""
    names, ends = tables.headings(times[config.t_star], config), (max(weights), min(weights))
    t_star, weight = config.t_star, config.guidance_weight
    judged = [("accuracy falls as t* grows", "clean", falls(times))]
    for column in JUDGED:
        judged += [
            ("too short and too long t* are both worse", column, peaks_inside(times, column)),
            (f"t* = {t_star:g} is best", column, is_best(times, column, t_star)),
            (f"λ = {weight:g} is best", column, is_best(weights, column, weight)),
            ("the more guidance the better", column, is_above(weights, column, *ends)),
        ]
    lines = [[claim, names[column], f"**{verdict}**", why] for claim, column, (verdict, why) in judged]
    head = ["Claim (Sec. 5.4)", "Measured as", "Verdict", "Evidence (points)"]
    return pd.DataFrame(lines, columns=head).set_index(head[0])


# --- choice and confirmation ---


def confirm(times: Sweep, weights: Sweep, config: Config) -> list[tables.Row]:
    """The paper's setting, and the best t* and the best λ of the sweeps, on the images of `config`.

    Best is what has the highest accuracy under the worst of these attacks; each of the two is chosen with the
    other at the paper's value.
    """
    changes: dict[str, dict[str, Any]] = {
        "the paper's": {},
        "best t* by the worst case": {"t_star": best(times, "worst")},
        "best λ by the worst case": {"guidance_weight": best(weights, "worst")},
    }
    found = []
    for label, changed in changes.items():
        here = replace(config, **changed)
        shown = {"t*": f"{here.t_star:g}", "λ": f"{here.guidance_weight:g}", "n": str(here.n_images)}
        found.append(tables.Row(label, measure(here), here, {}, shown))
    return found


def confirmation_table(confirmed: Sequence[tables.Row]) -> pd.DataFrame:
    """Accuracies of the settings, and the paired differences from the first one, the paper's."""
    papers, names = confirmed[0], tables.headings(SHOWN, confirmed[0].config)
    frame = tables.accuracies(confirmed, names, "Setting (accuracies in %)")
    for name in JUDGED:
        frame[f"Minus the paper's: {names[name]}"] = [
            "–" if row.config == papers.config else str(Difference.of(row.right[name], papers.right[name]))
            for row in confirmed
        ]
    return frame


# --- table and figure ---


def rows(found: Sweep, config: Config, name: str) -> list[tables.Row]:
    """One row of a table per value of t* or λ, with both in the keys of the CSV file."""
    result = []
    for value, right in found.items():
        here = at(config, name, value)
        defence = "coup" if here.guidance_weight else "reverse"
        keys = {"split": here.split, "defence": defence}
        keys |= {"t_star": here.t_star, "guidance_weight": here.guidance_weight}
        result.append(tables.Row(f"{LABELS[defence]}, {SYMBOLS[name]} = {value:g}", right, here, keys))
    return result


def figure(times: Sweep, unguided: Sweep, weights: Sweep, config: Config) -> Figure:
    """Fig. 4: (a) along t*, with the reverse SDE beside; (b) along λ. The best is ringed."""
    whole, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True)
    gradient, green = config.gradient.replace("_", "-"), plots.COLOURS["coup"]
    for axes, found, papers in ((left, times, config.t_star), (right, weights, config.guidance_weight)):
        for shift, (column, label) in zip((-0.16, -0.08, 0, 0.08), SHOWN.items(), strict=True):
            places = _line(axes, found, column, shift, green, f"COUP, {label.format(gradient=gradient)}")
            if column in JUDGED:
                peak = best(found, column)
                where = places[list(found).index(peak)], 100 * found[peak][column].mean()
                look = {"s": 120, "facecolors": "none", "edgecolors": "black", "zorder": 3}
                axes.scatter(*where, **look, label="best of its line" if column == JUDGED[0] else None)
        axes.set_xticks(range(len(found)), [f"{value:g}" for value in found])
        bar = {"color": "0.75", "linewidth": 5, "alpha": 0.5, "zorder": 0}
        axes.axvline(list(found).index(papers), label="the paper's", **bar)
    _line(left, unguided, "worst", 0.16, plots.COLOURS["reverse"], f"{LABELS['reverse']}, worst of these")
    left.set(ylim=(0, 103), ylabel=f"accuracy (%), n = {config.n_images}, 95 % interval")
    left.set_xlabel("purification time t*")
    right.set_xlabel(f"guidance weight λ (0: {LABELS['reverse']})")
    plots.titles((left, right), (f"COUP, λ = {config.guidance_weight:g}", f"COUP, t* = {config.t_star:g}"))
    whole.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return whole


def _line(axes: Axes, found: Sweep, column: str, shift: float, colour: Any, label: str) -> np.ndarray:
    """One column against the place of the value, moved sideways off the others; returns the places."""
    places, shares = np.arange(len(found)) + shift, [right[column] for right in found.values()]
    look = {"fmt": STYLES[column], "color": colour, "label": label}
    plots.points(axes, places, shares, markerfacecolor="white" if column == "worst" else colour, **look)
    return places
