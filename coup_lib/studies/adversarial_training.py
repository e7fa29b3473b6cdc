"""Fig. 2c: adversarially trained classifiers, alone and purified, attacked in their norm and in the other."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from coup_lib.defences import LABELS
from coup_lib.evaluation.config import NORM_NAMES, Config, radius
from coup_lib.evaluation.protocol import Evaluation, paper_attacks
from coup_lib.reporting import plots, tables
from coup_lib.reporting.tables import PerImage, Right, Row

DEFENCES = ("none", "reverse", "coup")
JUDGED = ("adaptive", "recorded")
OFFSETS = (-0.3, -0.2, -0.05, 0.05, 0.2, 0.3)  # of each defence under each of these
ALONE = "Classifier alone"

Panels = dict[str, dict[str, PerImage]]  # norm of the attack → classifier → defence → column → (n,)


def classifiers(config: Config) -> dict[str, str]:
    """Training → name of the classifier: "linf" and "l2" (adversarial), "standard"; one architecture."""
    return config.setup.robust_classifiers | {"standard": config.classifier}


def title(training: str) -> str:
    """A training in words."""
    return f"trained for {NORM_NAMES[training]}" if training in NORM_NAMES else "trained as usual"


def measure(configs: Mapping[str, Config]) -> Panels:
    """Every classifier alone, behind the reverse SDE and behind COUP, under attack in every norm."""
    return {
        norm: {
            training: tables.measured(Evaluation(config, name), paper_attacks(DEFENCES, config))
            for training, name in classifiers(config).items()
        }
        for norm, config in configs.items()
    }


# --- what is shown ---


def rows(found: Panels, configs: Mapping[str, Config]) -> list[Row]:
    """A row of a table per norm of the attack, classifier and defence."""
    result: list[Row] = []
    for norm, panel in found.items():
        config = configs[norm]
        for training, results in panel.items():
            attack = f"{NORM_NAMES[norm]}, {radius(config.eps)}"
            shown = {"Classifier": title(training), "Attack": attack}
            keys = {"training": training, "classifier": classifiers(config)[training]}
            result += tables.rows(results, config, shown, **keys)
    return [replace(row, label=ALONE) if row.keys["defence"] == "none" else row for row in result]


def cross_claims(found: Panels) -> dict[str, tuple[Right, Right]]:
    """For `tables.claims`: under one attack, the one trained for its norm beats the other, both alone."""
    norms = list(found)
    return {
        f"attacked in {NORM_NAMES[norm]}: {title(norm)} beats {title(other)}": (
            found[norm][norm]["none"],
            found[norm][other]["none"],
        )
        for norm, other in zip(norms, norms[::-1], strict=True)
    }


def combination_claims(found: Panels, configs: Mapping[str, Config]) -> dict[str, tuple[Right, Right]]:
    """For `tables.claims`: what COUP and the reverse SDE add to each classifier, and guidance to that."""
    names = {"none": "alone", "reverse": LABELS["reverse"], "coup": LABELS["coup"]}
    return {
        f"{title(training)}, attacked in {NORM_NAMES[norm]}: {names[better]} beats {names[than]}": (
            panel[training][better],
            panel[training][than],
        )
        for training in classifiers(next(iter(configs.values())))
        for norm, panel in found.items()
        for better, than in (("coup", "none"), ("reverse", "none"), ("coup", "reverse"))
    }


def figure(found: Panels, configs: Mapping[str, Config]) -> Figure:
    """Fig. 2c: one panel per norm of the attack; filled is the adaptive attack, open the worst case."""
    whole, panels = plt.subplots(1, len(found), figsize=(9.5, 4.5), sharey=True)
    for axes, (norm, rows) in zip(panels, found.items(), strict=True):
        columns = tables.headings(JUDGED, configs[norm])
        for offset, (defence, column) in zip(OFFSETS, product(DEFENCES, columns), strict=True):
            colour, heading = plots.COLOURS[defence], columns[column]
            plots.points(
                axes,
                np.arange(len(rows)) + offset,
                [results[defence][column] for results in rows.values()],
                fmt=plots.MARKERS[defence],
                color=colour,
                markerfacecolor="white" if column == "recorded" else colour,
                label=f"{ALONE if defence == 'none' else LABELS[defence]}: {heading}",
            )
        plots.groups(axes, [title(training).replace(" ", "\n", 1) for training in rows])
    names = [f"attacked in {NORM_NAMES[norm]}, ε = {radius(one.eps)}" for norm, one in configs.items()]
    plots.titles(panels, names)
    n_images = next(iter(configs.values())).n_images
    panels[0].set_ylabel(f"accuracy (%), n = {n_images}, 95 % interval")
    handles = panels[0].get_legend_handles_labels()
    whole.legend(*handles, loc="outside lower center", ncols=len(DEFENCES), fontsize="small")
    return whole
