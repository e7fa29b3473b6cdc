"""Every attack the field has thought of, and its sanity checks (notebook 07)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coup_lib.defences import LABELS, PAPER
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import NORM_NAMES, Config, radius
from coup_lib.evaluation.outcomes import Accuracy, Difference, Score, WorstCase, worst_of
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.evaluation.specs import OF, AttackSpec, with_transfers
from coup_lib.evaluation.stats import student
from coup_lib.reporting.plots import COLOURS, MARKERS, bars
from coup_lib.studies.mechanism import LANDSCAPE, eot_counts, halved, landscape

Columns = dict[str, dict[str, Score]]

PGD_FACTOR = 4  # PGD takes this many times APGD's iterations: 200 at the full size
EPS_FACTORS = {"linf": (0.5, 1.0, 2.0, 4.0), "l2": (0.5, 1.0, 2.0, 4.0, 8.0)}
TOLERANCE = 2.0  # points that a larger effort may still win
NOISE_TOLERANCE = 5.0  # points that random noise of size eps may cost

# The order of the figure: what sees less of the defence comes last.
SOURCE_LABELS = {
    "exact": "APGD-ce, exact (paper's protocol)",
    "first_order": "APGD-ce, first-order",
    "adjoint": "APGD-ce, adjoint",
    "bpda": "APGD-ce, BPDA",
    "coarse": "APGD-ce through half of the steps",
    "restart": "APGD-ce, exact, another seed",
    "eot_1": "APGD-ce, exact, EOT {eot_1}",
    "eot_2": "APGD-ce, exact, EOT {eot_2}",
    "eot_3": "APGD-ce, exact, EOT {eot_3}",
    "eot_4": "APGD-ce, exact, EOT {eot_4}",
    "eot_first_order": "APGD-ce, first-order, EOT {most}",
    "dlr": "APGD-dlr, exact",
    "margin": "APGD-margin, exact",
    "pgd": "PGD-{pgd}, exact",
    "pgd_first_order": "PGD-{pgd}, first-order",
    "warm_none": "warm start from undefended",
    "warm_reverse": "warm start from reverse-only",
    "fixed": "fixed noise, fresh noise at the test",
    "fixed_own": "fixed noise, the same at the test",
    "from_none": "transfer from undefended",
    "from_reverse": "transfer from reverse-only",
    "from_diffpure": "transfer from DiffPure",
    "lent": "the others' attacks, all of them",
    "square": "Square (black box)",
    "fgsm": "FGSM (one step)",
    "noise": "random noise",
    "clean": "clean images",
}

# What is tried on the other defences, too: what spent the whole number of iterations, and other losses.
LENT = ("exact", "first_order", "restart", "dlr", "margin", "pgd", "pgd_first_order")
SERIES = ("eot_1", "eot_2", "eot_3", "eot_4")  # a small budget has fewer


def sources(config: Config, target: str) -> dict[str, AttackSpec]:
    """Name → source of everything that this target faces.

    Own attacks that a target has no use for (an undefended classifier has one gradient and no noise) are left
    out. PGD takes `PGD_FACTOR` times the config's iterations; exact, first-order, the restart and the fixed
    noise take all of them, the rest of APGD half: the convergence check shows what that half is worth.
    """
    half, quarter = halved(config).n_iter, max(1, config.n_iter // 4)
    found = {
        "clean": against("clean", "none"),
        "noise": against("noise", "none"),
        "fgsm": against("fgsm", target),
        "exact": against("apgd-ce", target),
        "short": against("apgd-ce", target, n_iter=half),
        "quarter": against("apgd-ce", target, n_iter=quarter),
        "restart": against("apgd-ce", target, seed=config.seed + 1),
        "dlr": against("apgd-dlr", target, n_iter=half),
        "margin": against("apgd-margin", target, n_iter=half),
        "pgd": against("pgd", target, n_iter=PGD_FACTOR * config.n_iter),
        "square": against("square", target),
    }
    found |= {f"from_{name}": against("apgd-ce", name) for name in ("none", "reverse", "diffpure")}
    if target == "none":
        return found
    found["first_order"] = against("apgd-ce", target, "first_order")
    found |= {kind: against("apgd-ce", target, kind, n_iter=half) for kind in ("adjoint", "bpda")}
    found["coarse"] = against("apgd-ce", target, n_iter=half, n_steps=max(1, config.n_steps // 2))
    found["fixed"] = against("apgd-ce", target, eot=1, fixed_noise=True)
    counts = eot_counts(config)
    for place, eot in enumerate(counts, start=1):
        found[f"eot_{place}"] = against("apgd-ce", target, n_iter=half, eot=eot)
    found["eot_first_order"] = against("apgd-ce", target, "first_order", n_iter=half, eot=counts[-1])
    found["pgd_first_order"] = against("pgd", target, "first_order", n_iter=PGD_FACTOR * config.n_iter)
    for name in ("none", "reverse"):
        found[f"warm_{name}"] = against("apgd-ce", target, n_iter=half, start=against("apgd-ce", name))
    return found


def labels(config: Config) -> dict[str, str]:
    """Name → what the source is called in the figure and the table, with this budget's numbers."""
    numbers = {f"eot_{place}": eot for place, eot in enumerate(eot_counts(config), start=1)}
    numbers |= {"pgd": PGD_FACTOR * config.n_iter, "most": max(eot_counts(config))}
    return {  # the shorter runs of the convergence check have no row of their own
        name: label.format(**numbers)
        for name, label in SOURCE_LABELS.items()
        if name not in SERIES or name in numbers
    }


def columns(evaluation: Evaluation, defences: Sequence[str] = PAPER) -> Columns:
    """Every source on every defence, and those of `LENT` on all others: defence → name → score."""
    rows = with_transfers({defence: sources(evaluation.config, defence) for defence in defences}, LENT)
    return evaluation.scores(rows)


def shares(columns: Columns, recorded: Mapping[str, WorstCase]) -> dict[str, dict[str, np.ndarray]]:
    """Defence → name → share of right draws of each image, (n,).

    Added are "recorded", the worst case on record per image; "lent", the worst of the sources that another
    defence lends; "two_runs", the worse of the exact attack and its restart; and "fixed_own", the fixed-noise
    attack judged on the very noise that it was made for.
    """
    found = {}
    for defence, row in columns.items():
        found[defence] = {name: score.right for name, score in row.items()}
        if "fixed" in row:
            found[defence]["fixed_own"] = row["fixed"].counted
        found[defence]["two_runs"] = worst_of([row["exact"], row["restart"]])
        found[defence]["lent"] = worst_of([score for name, score in row.items() if OF in name])
        found[defence]["recorded"] = recorded[defence].right
    return found


# --- Tables and sentences ---------------------------------------------------------------------------------


def sources_table(results: Mapping[str, Mapping[str, np.ndarray]], config: Config) -> pd.DataFrame:
    """Sources × defences, "accuracy [95 % interval]" in percent of a single fresh draw."""
    rows = {
        label: {LABELS[d]: str(Accuracy.of(row[name])) if name in row else "–" for d, row in results.items()}
        for name, label in _rows(config).items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Accuracy under (%)")


def numbers(results: Mapping[str, Mapping[str, np.ndarray]], config: Config) -> pd.DataFrame:
    """The same in long form for a CSV."""
    return pd.DataFrame(
        [
            {"defence": defence, "source": name, "label": label}
            | vars(Accuracy.of(row[name]))
            | {"norm": config.norm, "eps": config.eps, "budget": config.budget}
            for defence, row in results.items()
            for name, label in _rows(config).items()
            if name in row
        ]
    )


def _rows(config: Config) -> dict[str, str]:
    return labels(config) | {"recorded": "Worst case on record, per image"}


def _single(row: Mapping[str, Any], config: Config) -> dict[str, str]:
    """Name → what the source is called, of all that this row has, the lent ones among them."""
    own = labels(config)
    lent = {name: name.split(OF) for name in row if OF in name}
    return {name: label for name, label in own.items() if name in row} | {
        name: f"{own[source]}, made against {LABELS[rival]}" for name, (source, rival) in lent.items()
    }


RULES = {
    "mean": "a single draw",
    "averaged": "the mean of the logits",
    "majority": "the majority of draws",
    "worst_draw": "all draws (the worst)",
}


def decisions_table(columns: Columns, config: Config) -> pd.DataFrame:
    """Defences × ways of deciding, each under the source that is worst for that defence and that way."""
    rows: dict[str, dict[str, str]] = {}
    for defence, row in columns.items():
        names = _single(row, config)
        rows[LABELS[defence]] = {}
        for rule, label in RULES.items():
            found = {name: getattr(row[name], rule) for name in names}
            worst = min(found, key=lambda name: found[name].value)
            rows[LABELS[defence]][f"Decided by {label}"] = f"{found[worst]}: {names[worst]}"
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(f"{config.n_draws} draws (%)")


def difference_table(
    results: Mapping[str, Mapping[str, np.ndarray]],
    config: Config,
    better: str = "coup",
    than: str = "reverse",
) -> pd.DataFrame:
    """The paired difference of two defences under every source, and what it says of the claim."""
    rows: dict[str, dict[str, str]] = {}
    for name, label in _rows(config).items():
        if name in results[better] and name in results[than]:
            difference = Difference.of(results[better][name], results[than][name])
            rows[label] = {
                f"{LABELS[better]} − {LABELS[than]}": str(difference),
                "The claim": difference.verdict,
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Under")


def caption(config: Config) -> str:
    """What stands behind the numbers."""
    full = config.sizes.budgets["probe"]["full"]
    spent = {"n_images": "images", "n_iter": "iterations", "eot": "EOT draws", "square_queries": "queries"}
    sizes = [f"{getattr(config, name)}/{getattr(full, name)} {what}" for name, what in spent.items()]
    return (
        f"{config.profile}, {config.split} split; {NORM_NAMES[config.norm]}, eps = {radius(config.eps)}; "
        f"t* = {config.t_star:g}, N = {config.n_steps}, λ = {config.guidance_weight:g}; spent of the full "
        f"size: {', '.join(sizes)}; the adjoint, BPDA, half of the steps, the margins, the warm starts and "
        f"the numbered EOT take {halved(config).n_iter} iterations; {config.seed_label}. Accuracies in % "
        f"with 95 % interval, averaged over {config.n_draws} fresh noise draws per image. The worst case is "
        "over every attack in the store on these images, chosen on other draws than it is reported on."
    )


def claim_lines(results: Mapping[str, Mapping[str, np.ndarray]], config: Config) -> str:
    """Markdown: does the paper's claim survive, and which source is each defence's worst?"""
    lines = []
    for rival in ("reverse", "diffpure"):
        exact, worst = (
            Difference.of(results["coup"][name], results[rival][name]) for name in ("exact", "recorded")
        )
        lines.append(
            f"*COUP is more robust than {LABELS[rival]}* (n = {config.n_images}, paired 95 % intervals): "
            f"under the paper's protocol, APGD-ce with the exact gradient, this **{exact.verdict}** "
            f"({exact}); in the worst case on record per image it **{worst.verdict}** ({worst})."
        )
    found = []
    for defence, row in results.items():
        names = _single(row, config)
        single = {name: row[name].mean() for name in names if name not in ("fixed_own", "lent")}
        worst_name = min(single, key=lambda name: single[name])
        found.append(
            f"{LABELS[defence]}: {Accuracy.of(row['exact'])} under its own exact gradient, "
            f"{Accuracy.of(row[worst_name])} under its worst single source ({names[worst_name]}), "
            f"{Accuracy.of(row['recorded'])} in the worst case"
        )
    return "\n\n".join([*lines, "\n".join(f"- {line}." for line in found)])


# --- The sanity checks of the field -----------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One check on one defence: does it hold, and by which numbers?"""

    name: str
    target: str
    holds: bool
    numbers: str


CHECKS = {
    "eps": "accuracy falls with eps, to chance or below",
    "one_step": "iterative beats one-step",
    "black_box": "white-box beats black-box",
    "cheaper": "no cheaper or borrowed attack is stronger",
    "iterations": "more iterations converge",
    "restarts": "more restarts converge",
    "loss": "loss rises along the gradient",
    "noise": "random noise does little",
}
MEANINGS = {
    "eps": "a large enough ball contains images of every class, so an attack that leaves images standing "
    "there cannot find what exists",
    "one_step": "many small steps find less than one large one, so the gradient close to the image misleads",
    "black_box": "the gradient is worth less than none at all",
    "cheaper": "the attack that knows most is not the strongest, so its gradient is masked, and the accuracy "
    "under it overstates the robustness",
    "iterations": "the accuracy is still falling, and is an upper bound only",
    "restarts": "chance decides which images fall, and the accuracy is an upper bound only",
    "loss": "the gradient does not point uphill",
    "noise": "the defence is not even robust to noise",
}


def eps_series(config: Config, *, verbose: bool = True) -> dict[str, dict[float, np.ndarray]]:
    """Defence → factor of eps → share of right draws (n,), under APGD-ce with the exact gradient.

    Half of the images and half of the iterations; factor 0 is the clean images.
    """
    small = replace(halved(config), n_images=max(2, config.n_images // 2))
    found: dict[str, dict[float, np.ndarray]] = {name: {} for name in PAPER}
    for factor in (0.0, *EPS_FACTORS[config.norm]):
        evaluation = Evaluation(replace(small, eps=(factor or 1.0) * config.eps), verbose=verbose)
        rows = {name: {"it": against("apgd-ce" if factor else "clean", name)} for name in PAPER}
        for name, row in evaluation.scores(rows).items():
            found[name][factor] = row["it"].right
    return found


def clean_landscapes(config: Config) -> dict[str, np.ndarray]:
    """Defence → mean loss (S, n) from the clean image along its own exact gradient."""
    return {name: landscape(config, name, "clean", kinds=("exact",))["exact"] for name in PAPER}


def checks(
    columns: Columns, eps: Mapping[str, Mapping[float, np.ndarray]], losses: Mapping[str, np.ndarray]
) -> list[Check]:
    """Every check on every defence; orders are judged within noise, by paired 95 % intervals."""
    found = []
    for target, row in columns.items():
        right = {name: score.right for name, score in row.items()}
        chance = 1 / len(np.unique(row["clean"].labels))
        verdicts = {
            "eps": _falls(eps[target], chance),
            "one_step": _ordered(right["fgsm"], right["exact"]),
            "black_box": _ordered(right["square"], right["exact"]),
            "cheaper": _strongest(right),
            "iterations": _converged(right["short"], right["exact"], right["pgd"]),
            "restarts": _converged(right["exact"], worst_of([row["exact"], row["restart"]])),
            "loss": _rises(losses[target]),
            "noise": _little(right["clean"], right["noise"]),
        }
        found += [Check(name, target, *verdict) for name, verdict in verdicts.items()]
    return found


def _falls(series: Mapping[float, np.ndarray], chance: float) -> tuple[bool, str]:
    shares = [series[factor] for factor in sorted(series)]
    ordered = all(_ordered(a, b)[0] for a, b in pairwise(shares))
    last = float(shares[-1].mean())
    return ordered and last <= chance, f"{100 * last:.1f} % at {max(series):g} eps"


def _ordered(weaker: np.ndarray, stronger: np.ndarray) -> tuple[bool, str]:
    """The stronger attack leaves no more than the weaker, unless by what noise explains."""
    excess = Difference.of(stronger, weaker)
    return excess.low <= 0, f"{100 * weaker.mean():.1f} → {100 * stronger.mean():.1f} %"


CHEAPER = ("first_order", "adjoint", "bpda", "coarse", "from_none", "from_reverse", "from_diffpure")


def _strongest(right: Mapping[str, np.ndarray]) -> tuple[bool, str]:
    cheaper = {name: right[name] for name in CHEAPER if name in right}
    worst = min(cheaper, key=lambda name: float(cheaper[name].mean()))
    holds = all(_ordered(shares, right["exact"])[0] for shares in cheaper.values())
    exact, other = 100 * right["exact"].mean(), 100 * cheaper[worst].mean()
    return holds, f"exact {exact:.1f}, {SOURCE_LABELS[worst].removeprefix('APGD-ce, ')} {other:.1f} %"


def _converged(*efforts: np.ndarray) -> tuple[bool, str]:
    """Each larger effort wins no more than `TOLERANCE` points, or what noise explains."""
    gains = [Difference.of(before, after) for before, after in pairwise(efforts)]
    holds = all(gain.value <= TOLERANCE or gain.low <= 0 for gain in gains)
    return holds, " → ".join(f"{100 * right.mean():.1f}" for right in efforts) + " %"


def _rises(losses: np.ndarray) -> tuple[bool, str]:
    mean = losses.mean(1)
    return bool((np.diff(mean) > 0).all()), f"{mean[0]:.2f} → {mean[-1]:.2f}"


def _little(clean: np.ndarray, noise: np.ndarray) -> tuple[bool, str]:
    cost = Difference.of(clean, noise)
    holds = cost.value <= NOISE_TOLERANCE or cost.low <= 0
    return holds, f"{100 * clean.mean():.1f} → {100 * noise.mean():.1f} %"


def check_lines(found: Sequence[Check]) -> str:
    """Markdown: which checks fail, for which defences, and what that means."""
    failed = [check for check in found if not check.holds]
    if not failed:
        return f"All {len(CHECKS)} checks hold for every defence."
    lines = [
        f"{len(found) - len(failed)} of {len(found)} checks hold. What a failed one means for the attack "
        "with the exact gradient, not for the defence's favour:",
        "",
    ]
    for name, label in CHECKS.items():
        where = [f"{LABELS[check.target]} ({check.numbers})" for check in failed if check.name == name]
        if where:
            lines.append(f"- *{label}* fails for {'; '.join(where)}: {MEANINGS[name]}.")
    masked = [LABELS[check.target] for check in failed if check.name in ("cheaper", "black_box", "one_step")]
    if masked:
        names = ", ".join(dict.fromkeys(masked))
        lines += ["", f"This is **gradient masking** in {names}; the mechanism below looks for the reason."]
    return "\n".join(lines)


# --- Figures ----------------------------------------------------------------------------------------------


def sources_panel(
    axes: Axes, results: Mapping[str, Mapping[str, np.ndarray]], config: Config, defences: Sequence[str]
) -> None:
    """Sources from top to bottom, accuracy to the right, one marker per defence with its 95 % interval.

    The dashed lines stand at each defence's worst case on record; the last row is their value.
    """
    rows = _rows(config)
    offsets = np.linspace(-0.26, 0.26, len(defences))
    for offset, defence in zip(offsets, defences, strict=True):
        shares = results[defence]
        places = [place for place, name in enumerate(rows) if name in shares]
        values, errors = bars([shares[name] for name in rows if name in shares])
        axes.errorbar(
            values,
            np.array(places) + offset,
            xerr=errors,
            fmt=MARKERS[defence],
            color=COLOURS[defence],
            label=LABELS[defence],
            markersize=4.5,
            linewidth=1.1,
            capsize=1.8,
        )
        axes.axvline(values[-1], color=COLOURS[defence], linestyle="--", linewidth=1, alpha=0.7, zorder=0)
    for place in range(0, len(rows), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="0.96", zorder=-1)
    axes.axhspan(len(rows) - 1.5, len(rows) - 0.5, color="#fff3c4", zorder=-1)
    axes.set_yticks(range(len(rows)), list(rows.values()))
    axes.get_yticklabels()[-1].set_fontweight("bold")
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 102))
    axes.set_xlabel(f"accuracy of a single draw (%), n = {config.n_images}, 95 % interval")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def points_panel(
    axes: Axes,
    results: Mapping[str, Mapping[Any, np.ndarray]],
    keys: Sequence[Any],
    places: Sequence[float] | None = None,
    *,
    style: str = "-",
) -> None:
    """One line per defence through the accuracies at `keys`, with 95 % intervals, dodged a little."""
    at = np.array(range(len(keys)) if places is None else places, dtype=float)
    widths = np.diff(at, append=at[-1] + (at[-1] - at[-2] if len(at) > 1 else 1))
    for number, (defence, row) in enumerate(results.items()):
        axes.errorbar(
            at + 0.07 * (number - (len(results) - 1) / 2) * widths.min(),
            *bars([row[key] for key in keys]),
            fmt=MARKERS[defence] + style,
            color=COLOURS[defence],
            label=LABELS[defence],
            markersize=4,
            linewidth=1.1,
            capsize=1.8,
        )
    axes.set(ylim=(-2, 103))


def losses_panel(axes: Axes, losses: Mapping[str, np.ndarray]) -> None:
    """Mean loss against the distance along the exact gradient, one line per defence, with 95 % intervals."""
    for defence, values in losses.items():
        axes.fill_between(LANDSCAPE, *student(values), color=COLOURS[defence], alpha=0.15, linewidth=0)
        axes.plot(LANDSCAPE, values.mean(1), MARKERS[defence] + "-", color=COLOURS[defence], markersize=4)


def verdicts_panel(axes: Axes, found: Sequence[Check]) -> None:
    """A tick or a cross for every check and defence."""
    targets = list(dict.fromkeys(check.target for check in found))
    for check in found:
        place = (targets.index(check.target), list(CHECKS).index(check.name))
        text, colour = ("✓", "#1b7837") if check.holds else ("✗", "#b2182b")
        axes.text(*place, text, color=colour, ha="center", va="center", fontsize=13, fontweight="bold")
    axes.set_xticks(range(len(targets)), [fill(LABELS[name], 9) for name in targets])
    axes.set_yticks(
        range(len(CHECKS)), [fill(label, 22, break_on_hyphens=False) for label in CHECKS.values()]
    )
    axes.set(xlim=(-0.5, len(targets) - 0.5), ylim=(len(CHECKS) - 0.5, -0.5))
    axes.tick_params(length=0, labelsize="small")
    axes.grid(visible=False)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    for edge in range(1, len(CHECKS)):
        axes.axhline(edge - 0.5, color="0.9", linewidth=0.8)


def sanity_figure(
    results: Mapping[str, Mapping[str, np.ndarray]],
    config: Config,
    eps: Mapping[str, Mapping[float, np.ndarray]],
    losses: Mapping[str, np.ndarray],
    found: Sequence[Check],
) -> Figure:
    """Four panels with the numbers, (a) to (d), and the verdicts beside them, (e)."""
    figure = plt.figure(figsize=(12, 6))
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    left, right = parts
    panels, verdicts = [*left.subplots(2, 2).flat], right.subplots()

    factors = (0.0, *EPS_FACTORS[config.norm])
    points_panel(panels[0], eps, factors, factors)
    panels[0].set(xlabel=f"radius (units of eps = {radius(config.eps)})", ylabel="accuracy (%)")

    threats = {"clean": "clean", "noise": "random\nnoise", "square": "Square"}
    threats |= {"fgsm": "FGSM", "exact": "APGD\nexact"}
    points_panel(panels[1], results, list(threats), style="")
    panels[1].set_xticks(range(len(threats)), list(threats.values()), fontsize="small")

    half, quarter = halved(config).n_iter, max(1, config.n_iter // 4)
    effort = {"quarter": quarter, "short": half, "exact": config.n_iter, "two_runs": f"2 × {config.n_iter}"}
    effort |= {"pgd": f"PGD\n{PGD_FACTOR * config.n_iter}"}
    points_panel(panels[2], results, list(effort))
    panels[2].set_xticks(range(len(effort)), [str(value) for value in effort.values()])
    panels[2].set(xlabel="runs × iterations of APGD, then PGD, exact", ylabel="accuracy (%)")

    losses_panel(panels[3], losses)
    panels[3].set(xlabel="step along the exact gradient (eps)", ylabel="mean cross-entropy")
    verdicts_panel(verdicts, found)
    titles = ("larger radius", "weaker attacks", "more effort", "loss along the gradient", "verdicts")
    for letter, axes, title in zip("abcde", [*panels, verdicts], titles, strict=True):
        axes.set_title(f"({letter}) {title}", loc="left", fontsize="medium")
    handles = panels[0].get_legend_handles_labels()
    left.legend(*handles, loc="outside upper center", ncols=len(results), fontsize="small")
    return figure
