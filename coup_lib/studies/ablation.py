"""What purification costs: clean accuracy, of all and of what the classifier is right on alone.

Without an attack many images can be had, so the interval is narrow.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from coup_lib.checks import count, in_one_line
from coup_lib.data import split_size
from coup_lib.defences import LABELS
from coup_lib.evaluation.config import Config
from coup_lib.evaluation.outcomes import Accuracy
from coup_lib.evaluation.protocol import Experiment
from coup_lib.evaluation.specs import CLEAN
from coup_lib.reporting import paper

PURIFIERS = ("diffpure", "reverse", "coup")
ALONE = "none"
CLEAN_IMAGES = {defence: {"clean": CLEAN} for defence in (ALONE, *PURIFIERS)}


@in_one_line()
def sized(config: Config, n_clean: Any) -> Config:
    """The configuration for n_clean images, unless that is None. ValueError for more than the split has."""
    if n_clean is None:
        return config
    most = split_size(config.setup.dataset, config.split, config.subset)
    return replace(config, n_images=count("n_clean", n_clean, most))


def measure(config: Config, classifier: str) -> dict[str, np.ndarray]:
    """Defence → share of right draws on clean images (n,): `ALONE`, then `PURIFIERS`."""
    scores = Experiment(config, CLEAN_IMAGES, classifier).predictions()
    return {defence: row["clean"].right for defence, row in scores.items()}


def reported(config: Config, defence: str) -> float | None:
    """The paper's accuracy in % of its classifier's own, by Table 1 or 2; None where it gives none."""
    rows = paper.PURIFIERS[config.norm]
    return 100 * rows[defence].accuracy / rows[ALONE].accuracy if defence in rows else None


def table(results: dict[str, dict[str, np.ndarray]], config: Config) -> pd.DataFrame:
    """One row per classifier and defence: its accuracy, and that in % of the classifier's own."""
    rows = []
    for classifier, shares in results.items():
        for defence, right in shares.items():
            kept = defence != ALONE and shares[ALONE].any()
            papers = reported(config, defence)
            rows.append(
                {
                    "Defence (%)": LABELS[defence],
                    "Classifier": classifier,
                    "Clean accuracy": str(Accuracy.of(right)),
                    "Of the classifier's own": str(Accuracy.kept(right, shares[ALONE])) if kept else "–",
                    "The paper's, of its WRN-28-10's own": f"{papers:.2f}" if kept and papers else "–",
                }
            )
    return pd.DataFrame(rows).set_index("Defence (%)")
