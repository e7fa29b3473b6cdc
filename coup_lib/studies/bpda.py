"""Table 3: BPDA + EOT, decided in several ways, with the exact gradient beside it."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from coup_lib.checks import count
from coup_lib.defences import LABELS
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import NORM_NAMES, Config, radius
from coup_lib.evaluation.outcomes import Accuracy, Difference, Score
from coup_lib.evaluation.specs import CLEAN, AttackSpec
from coup_lib.reporting import paper, plots, tables
from coup_lib.reporting.tables import Shares

N_ITER = 20  # PGD-20
# Purifications behind a mean of logits or a majority: 150 is DiffPure's rule against BPDA. The quick run
# affords fewer, which blurs the mean of logits a little and changes no attack.
PURIFICATIONS = {"smoke": 4, "quick": 20, "full": 150}
RULES = {"single": "a single draw", "averaged": "mean logits of {}", "majority": "majority of {}"}


def checked_counts(eot_counts: Sequence[int] | None, config: Config) -> list[int]:
    """The EOT counts in order, each once; None means those of the configuration's budget.

    Raises:
        ValueError: unless they are a list of whole numbers.
    """
    if eot_counts is None:
        eot_counts = config.sizes.budgets[config.purpose][config.budget].bpda_eot
    if not isinstance(eot_counts, Sequence) or isinstance(eot_counts, str) or not eot_counts:
        raise ValueError(f"eot_counts: expected a list of whole numbers; got {eot_counts!r}")
    return sorted({count("eot_counts", value) for value in eot_counts})


def sources(defence: str, eot_counts: Sequence[int], exact_eot: int) -> dict[str, AttackSpec]:
    """Clean images, PGD-20 with BPDA for each number of EOT draws, and PGD-20 with the exact gradient."""
    bpda = {column(eot): against("pgd", defence, "bpda", n_iter=N_ITER, eot=eot) for eot in eot_counts}
    return {"clean": CLEAN} | bpda | {"exact": against("pgd", defence, n_iter=N_ITER, eot=exact_eot)}


def column(eot: int) -> str:
    """The name of BPDA's column."""
    return f"bpda-{eot}"


def columns(eot_counts: Sequence[int], exact_eot: int) -> dict[str, str]:
    """Column → heading."""
    bpda = {column(eot): f"BPDA, EOT {eot}" for eot in eot_counts}
    return {"clean": "Clean"} | bpda | {"exact": f"Exact gradient, EOT {exact_eot}"}


def rules(purifications: int) -> dict[str, str]:
    """Rule → how it decides, in words."""
    return {rule: text.format(purifications) for rule, text in RULES.items()}


def decided(score: Score, rule: str) -> np.ndarray:
    """The share of right decisions per image, (n,): of single draws, or 0 or 1 where all draws decide."""
    return {
        "single": score.right,
        "averaged": score.average_right,
        "majority": score.majority_right,
    }[rule]


def by_rule(scores: Mapping[str, Mapping[str, Score]]) -> dict[str, Shares]:
    """Rule → defence → column → share of right decisions per image, (n,)."""
    return {
        rule: {
            defence: {name: decided(score, rule) for name, score in row.items()}
            for defence, row in scores.items()
        }
        for rule in RULES
    }


# --- what is shown ---


def figure(results: Mapping[str, Shares], headings: Mapping[str, str], config: Config) -> Figure:
    """One panel per rule: every defence under BPDA with each number of EOT draws, and the exact gradient."""
    whole, panels = plt.subplots(1, len(results), figsize=(11, 3.9), sharey=True)
    short = {name: text.replace(" gradient", "") for name, text in headings.items()}
    for letter, axes, (rule, text) in zip("abc", panels, rules(config.n_draws).items(), strict=True):
        plots.robustness_panel(axes, results[rule], short, width=7)
        axes.set_title(f"({letter}) {text}", loc="left", fontsize="medium")
    panels[0].set_ylabel(f"accuracy (%), n = {config.n_images}, 95 % interval")
    handles, labels = panels[0].get_legend_handles_labels()
    whole.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return whole


def paper_table(results: Mapping[str, Shares], eot: int, config: Config) -> pd.DataFrame:
    """The rows of the paper's Table 3, then ours: one draw and the mean of logits, BPDA with `eot` draws."""
    says = rules(config.n_draws)
    rows = [
        {
            "Defence": LABELS[defence],
            "Accuracy (%)": str(Accuracy.of(row["clean"])),
            "Robustness (%)": str(Accuracy.of(row[column(eot)])),
            "AttackSpec": f"measured here, {config.profile}, n = {config.n_images}, {says[rule]}",
        }
        for rule in ("single", "averaged")
        for defence, row in results[rule].items()
    ]
    quoted = tables.reported_rows(paper.BPDA_LITERATURE, list(paper.BPDA.values()))
    return pd.concat([quoted, pd.DataFrame(rows).set_index("Defence")])


def whole_table(results: Mapping[str, Shares], headings: Mapping[str, str], config: Config) -> pd.DataFrame:
    """One row per defence and rule, "accuracy [95 % interval]" in percent per column."""
    says = rules(config.n_draws)
    rows = {
        f"{LABELS[defence]}, {says[rule]}": {
            text: str(Accuracy.of(row[name])) for name, text in headings.items()
        }
        for defence in next(iter(results.values()))
        for rule in results
        for row in [results[rule][defence]]
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("Defence, decided by (%)")


def numbers(results: Mapping[str, Shares], headings: Mapping[str, str], config: Config) -> pd.DataFrame:
    """The same in long form for a CSV."""
    rows = [
        {"defence": defence, "rule": rule, "draws": config.n_draws, "column": name, "label": text}
        | vars(Accuracy.of(row[name]))
        | {"norm": config.norm, "eps": config.eps, "budget": config.budget}
        for rule, shares in results.items()
        for defence, row in shares.items()
        for name, text in headings.items()
    ]
    return pd.DataFrame(rows)


def caption(eot: int, config: Config) -> str:
    """What stands behind the numbers."""
    return (
        f"{config.profile}, {config.split} split, {config.classifier}; {NORM_NAMES[config.norm]}, "
        f"eps = {radius(config.eps)}; t* = {config.t_star:g}, N = {config.n_steps}, "
        f"λ = {config.guidance_weight:g}; PGD-{N_ITER} with the paper's ratio of step to eps, "
        f"BPDA with {eot} EOT draws where nothing else is said; n = {config.n_images}, {config.seed_label}. "
        f"Accuracies in % with 95 % interval, on fresh noise: a single draw is the average over "
        f"{config.n_draws} draws per image, which also stand behind the mean of logits and the majority."
    )


def claim_lines(results: Mapping[str, Shares], eot: int, config: Config) -> str:
    """Markdown: the verdicts on COUP's lead under BPDA, and on BPDA as an attack."""
    headings, says = columns([eot], config.eot), rules(config.n_draws)
    reported = paper.BPDA["coup"].robustness - paper.BPDA["diffpure"].robustness
    remarks = {"diffpure": f" (the paper reports {reported:+.2f})", "reverse": ""}
    lines = ["| Claim | Decided by | " + " | ".join(text for name, text in headings.items()) + " |"]
    lines.append("|---" * (2 + len(headings)) + "|")
    for rival, remark in remarks.items():
        for rule, shares in results.items():
            found = {name: Difference.of(shares["coup"][name], shares[rival][name]) for name in headings}
            cells = " | ".join(f"**{each.verdict}** ({each})" for each in found.values())
            lines.append(f"| COUP above {LABELS[rival]}{remark} | {says[rule]} | {cells} |")
    return "\n".join(lines)


def attack_lines(results: Mapping[str, Shares], eot: int, config: Config) -> str:
    """Markdown: per purifier, what BPDA leaves more than the exact gradient does."""
    lines = [
        f"*BPDA (EOT {eot}) is the weaker attack*: accuracy under BPDA minus accuracy under the exact "
        f"gradient (EOT {config.eot}), same PGD steps, a single draw, n = {config.n_images}:",
        "",
    ]
    for defence, row in results["single"].items():
        if defence != "none":  # it has one gradient only
            difference = Difference.of(row[column(eot)], row["exact"])
            lines.append(f"- {LABELS[defence]}: {difference}: {difference.verdict}")
    return "\n".join(lines)
