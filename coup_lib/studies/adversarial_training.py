"""Fig. 2c: adversarially trained classifiers, alone and purified, attacked in their norm and in the other."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from coup_lib.defences import LABELS
from coup_lib.evaluation.config import NORM_NAMES, Config, radius
from coup_lib.evaluation.outcomes import Accuracy, Difference
from coup_lib.evaluation.progress import Plan
from coup_lib.evaluation.protocol import Evaluation
from coup_lib.reporting import paper, plots, tables
from coup_lib.reporting.tables import Shares

DEFENCES = ("none", "reverse", "coup")
JUDGED = ("adaptive", "recorded")
ALONE = "Classifier alone"

Panels = dict[str, dict[str, Shares]]  # norm of the attack → classifier → defence → column → (n,)


def classifiers(config: Config) -> dict[str, str]:
    """Training → name of the classifier: "linf" and "l2" (adversarial), "standard"; one architecture."""
    return config.sizes.robust_classifiers | {"standard": config.classifier}


def title(training: str) -> str:
    """A training in words."""
    return f"trained for {NORM_NAMES[training]}" if training in NORM_NAMES else "trained as usual"


def measure(configs: Mapping[str, Config]) -> Panels:
    """Every classifier alone, behind reverse-only and behind COUP, under attack in every norm."""
    found: Panels = {}
    plan = Plan([1.0] * sum(len(classifiers(config)) for config in configs.values()), verbose=True)
    for norm, config in configs.items():
        found[norm] = {}
        for training, name in classifiers(config).items():
            plan.start(f"{title(training)}, attacked in {NORM_NAMES[norm]}")
            evaluation = Evaluation(config, name, verbose=False)
            columns = evaluation.columns(DEFENCES)
            found[norm][training] = tables.shares(columns, evaluation.recorded(columns))
    return found


# --- what is shown ---


def figure(found: Panels, configs: Mapping[str, Config]) -> Figure:
    """Fig. 2c: one panel per norm of the attack; filled is the adaptive attack, open the worst case."""
    whole, panels = plt.subplots(1, len(found), figsize=(9.5, 4.3), sharey=True)
    for letter, axes, (norm, rows) in zip("ab", panels, found.items(), strict=True):
        config = configs[norm]
        for place, row in enumerate(rows.values()):
            for offset, (defence, shares) in zip((-0.25, 0, 0.25), row.items(), strict=True):
                for column, shift in zip(JUDGED, (-0.05, 0.05), strict=True):
                    height, errors = plots.bars([shares[column]])
                    axes.errorbar(
                        place + offset + shift,
                        height,
                        errors,
                        fmt=plots.MARKERS[defence],
                        color=plots.COLOURS[defence],
                        markerfacecolor="white" if column == "recorded" else plots.COLOURS[defence],
                        markersize=5.5,
                        capsize=2,
                        linewidth=1.1,
                    )
        for edge in range(1, len(rows)):
            axes.axvline(edge - 0.5, color="0.88", linewidth=0.8, zorder=0)
        names = {"linf": "trained\nfor L∞", "l2": "trained\nfor L2", "standard": "trained\nas usual"}
        axes.set_xticks(range(len(rows)), [names[training] for training in rows])
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set(xlim=(-0.5, len(rows) - 0.5), ylim=(0, 102))
        what = f"({letter}) attacked in {NORM_NAMES[norm]}, ε = {radius(config.eps)}"
        axes.set_title(what, loc="left", fontsize="medium")
    panels[0].set_ylabel(f"accuracy (%), n = {config.n_images}, 95 % interval")
    gradient = config.gradient.replace("_", "-")
    handles = [
        Line2D(
            [], [], marker=plots.MARKERS[name], color=plots.COLOURS[name], linestyle="", label=_label(name)
        )
        for name in DEFENCES
    ]
    for label, face in ((f"APGD-ce, {gradient}", "0.3"), ("worst case on record, per image", "white")):
        handles.append(
            Line2D([], [], marker="o", color="0.3", markerfacecolor=face, linestyle="", label=label)
        )
    whole.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    return whole


def table(found: Panels, configs: Mapping[str, Config]) -> pd.DataFrame:
    """One row per attack norm, classifier and defence, "accuracy [95 % interval]" in percent per column."""
    frames = [
        tables.robustness_table(
            rows,
            configs[norm],
            Classifier=title(training),
            Attack=f"{NORM_NAMES[norm]}, {radius(configs[norm].eps)}",
        )
        for norm, panel in found.items()
        for training, rows in panel.items()
    ]
    return pd.concat(frames).rename(index={LABELS["none"]: ALONE})


def numbers(found: Panels, configs: Mapping[str, Config]) -> pd.DataFrame:
    """The same in long form for a CSV."""
    frames = [
        tables.numbers(
            rows, configs[norm], training=training, classifier=classifiers(configs[norm])[training]
        )
        for norm, panel in found.items()
        for training, rows in panel.items()
    ]
    return pd.concat(frames)


def caption(configs: Mapping[str, Config]) -> str:
    """What stands behind the numbers, once for both norms."""
    config = next(iter(configs.values()))
    threats = " and ".join(
        f"{NORM_NAMES[norm]} with eps = {radius(each.eps)}, t* = {each.t_star:g}"
        for norm, each in configs.items()
    )
    return (
        f"{config.profile}, {config.split} split; attacked in {threats}; N = {config.n_steps}, "
        f"λ = {config.guidance_weight:g}; {config.n_images} images, {config.n_iter} iterations, "
        f"{config.eot} EOT draws; {config.seed_label}. Accuracies in % with 95 % interval, "
        f"averaged over {config.n_draws} fresh noise draws per image."
    )


def cross_lines(found: Panels, configs: Mapping[str, Config]) -> str:
    """Markdown: the classifiers alone, attacked in the norm that they were not trained for."""
    lines = [
        '*An adversarially trained classifier does badly in the cross setting* (the paper: "a severe '
        'robustness drop"). Under one attack, the classifier trained for its norm minus the one trained for '
        "the other, both alone:",
        "",
    ]
    for norm, panel in found.items():
        (other,) = set(found) - {norm}
        for column, label in _judged(configs[norm]).items():
            own, crossed = (panel[training]["none"][column] for training in (norm, other))
            difference = Difference.of(own, crossed)
            lines.append(
                f"- attacked in {NORM_NAMES[norm]}, {label}: **{difference.verdict}** ({difference}: "
                f"{Accuracy.of(own)} % against {Accuracy.of(crossed)} %)"
            )
    return "\n".join(lines)


def combination_lines(found: Panels, configs: Mapping[str, Config]) -> str:
    """Markdown: what COUP and reverse-only add to each classifier, and what guidance adds to that."""
    config = next(iter(configs.values()))
    labels = list(_judged(config).values())
    lines = [
        "| Classifier | Attack | Difference | " + " | ".join(labels) + " |",
        "|---" * (3 + len(labels)) + "|",
    ]
    for training in classifiers(config):
        for norm, panel in found.items():
            for better, than in (("coup", "none"), ("reverse", "none"), ("coup", "reverse")):
                row = panel[training]
                cells = [_gain(row[better][column], row[than][column]) for column in JUDGED]
                what = f"{_label(better)} − {_label(than)}"
                lines.append(
                    f"| {title(training)} | {NORM_NAMES[norm]} | {what} | " + " | ".join(cells) + " |"
                )
    return "\n".join(lines)


def claim_lines(found: Panels, configs: Mapping[str, Config]) -> str:
    """Markdown: the paper's claim on the combination, and the published objection, counted over settings."""
    alone, behind = paper.TRAINED_THEN_COUP
    lines = [
        f"The paper's one pair of numbers, {alone:.2f} → {behind:.2f} % ({behind - alone:+.2f}), follows a "
        f"sentence on either training (clean accuracy {paper.TRAINED_CLEAN['l2']:.2f} % for L2, "
        f"{paper.TRAINED_CLEAN['linf']:.2f} % for L∞); which one it belongs to, and under which attack, is "
        "not said. Here are both trainings under both attacks:",
        "",
    ]
    claims = {
        "coup": "COUP makes the adversarially trained classifier more robust",
        "reverse": "so does purification without guidance",
    }
    lowered = {}
    for column, label in _judged(next(iter(configs.values()))).items():
        for better, claim in claims.items():
            gains = [
                Difference.of(panel[training][better][column], panel[training]["none"][column])
                for panel in found.values()
                for training in found
            ]
            lines.append(f"- {label}: *{claim}* {_count(gains)}.")
            lowered[column, better] = sum(gain.high < 0 for gain in gains), len(gains)
    below, settings = (
        sum(pair) for pair in zip(*(lowered["recorded", name] for name in claims), strict=True)
    )
    lines += [
        "",
        "DiffHammer (2024) reports that purification usually *lowers* the robustness of such "
        f"classifiers. Here the worst case shows that in {below} of {settings} comparisons.",
    ]
    return "\n".join(lines)


def _label(defence: str) -> str:
    return ALONE if defence == "none" else LABELS[defence]


def _count(differences: list[Difference]) -> str:
    verdicts = [difference.verdict for difference in differences]
    parts = [
        f"**{verdict}** in {verdicts.count(verdict)}"
        for verdict in ("holds", "does not hold", "is not decided")
        if verdict in verdicts
    ]
    return f"{', '.join(parts)} of {len(verdicts)} settings"


def _gain(right: np.ndarray, reference: np.ndarray) -> str:
    """A difference that says by itself whether it helps."""
    difference = Difference.of(right, reference)
    word = {"holds": "more", "does not hold": "**less**", "is not decided": "undecided"}[difference.verdict]
    return f"{difference}: {word}"


def _judged(config: Config) -> dict[str, str]:
    return {name: tables.COLUMNS[name].format(gradient=config.gradient.replace("_", "-")) for name in JUDGED}
