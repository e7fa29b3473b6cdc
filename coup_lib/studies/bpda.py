"""Table 3: BPDA + EOT, decided in several ways, with the exact gradient beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from coup_lib.checks import count, in_one_line
from coup_lib.defences import PAPER
from coup_lib.evaluation.bench import against
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Predictions
from coup_lib.evaluation.protocol import Experiment
from coup_lib.evaluation.specs import CLEAN
from coup_lib.reporting import plots, tables
from coup_lib.reporting.tables import PerImage, Row

N_ITER = 20  # PGD-20
# Purifications behind a mean of logits or a majority: 150 is DiffPure's rule against BPDA. The quick run
# affords fewer, which blurs the mean of logits a little and changes no attack.
PURIFICATIONS = {"smoke": 4, "quick": 20, "full": 150}
RULES = {"single": "a single draw", "averaged": "mean logits of {}", "majority": "majority of {}"}


@in_one_line()
def checked_counts(eot_counts: Sequence[int] | None, config: Config) -> list[int]:
    """The EOT counts in order, each once; None means those of the configuration's budget.

    Raises:
        ValueError: unless they are a list of whole numbers.
    """
    if eot_counts is None:
        eot_counts = config.setup.budgets[config.purpose][config.budget].bpda_eot
    if not isinstance(eot_counts, Sequence) or isinstance(eot_counts, str) or not eot_counts:
        raise ValueError(f"eot_counts: expected a list of whole numbers; got {eot_counts!r}")
    return sorted({count("eot_counts", value) for value in eot_counts})


def experiment(
    config: Config, eot_counts: Sequence[int] | None = None, purifications: int | None = None
) -> Experiment:
    """What the paper's four defences face, and on how many draws each is judged.

    Clean images, PGD-20 with BPDA for each number of EOT draws, and PGD-20 with the exact gradient.

    Args:
        eot_counts: see `checked_counts`.
        purifications: draws behind a mean of logits or a majority; None means the budget's own.
    """
    counts, rows = checked_counts(eot_counts, config), {}
    for defence in PAPER:
        bpda = {column(eot): against("pgd", defence, "bpda", n_iter=N_ITER, eot=eot) for eot in counts}
        exact = against("pgd", defence, n_iter=N_ITER, eot=config.eot)
        rows[defence] = {"clean": CLEAN} | bpda | {"exact": exact}
    if purifications is None:
        purifications = PURIFICATIONS[config.budget]
    return Experiment(replace(config, n_draws=count("purifications", purifications)), rows)


def column(eot: int) -> str:
    """The name of BPDA's column."""
    return f"bpda-{eot}"


def headings(eot_counts: Sequence[int], exact_eot: int) -> dict[str, str]:
    """Column → heading."""
    bpda = {column(eot): f"BPDA, EOT {eot}" for eot in eot_counts}
    return {"clean": "Clean"} | bpda | {"exact": f"Exact gradient, EOT {exact_eot}"}


def by_rule(scores: Mapping[str, Mapping[str, Predictions]]) -> dict[str, PerImage]:
    """Rule → defence → column → share of right decisions per image, (n,)."""
    found: dict[str, PerImage] = {rule: {} for rule in RULES}
    for rule, (defence, row) in product(RULES, scores.items()):
        found[rule][defence] = {name: score.decided(rule) for name, score in row.items()}
    return found


def rows(results: Mapping[str, PerImage], config: Config) -> dict[str, list[Row]]:
    """Rule → rows of a table, one per defence."""
    found = {}
    for rule, shares in results.items():
        shown = {"Decided by": RULES[rule].format(config.n_draws)}
        found[rule] = tables.rows(shares, config, shown, rule=rule, draws=config.n_draws)
    return found


def figure(found: Mapping[str, Sequence[Row]], names: Mapping[str, str]) -> Figure:
    """One panel per rule: every defence under BPDA with each number of EOT draws, and the exact gradient."""
    whole, panels = plt.subplots(1, len(found), figsize=(11, 3.9), sharey=True)
    short = {name: text.replace(" gradient", "") for name, text in names.items()}
    for axes, rows in zip(panels, found.values(), strict=True):
        plots.robustness_panel(axes, rows, short, width=7)
    plots.titles(panels, [rows[0].shown["Decided by"] for rows in found.values()])
    handles, labels = panels[0].get_legend_handles_labels()
    whole.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return whole
