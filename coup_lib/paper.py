"""What the paper reports, to be set beside what is measured here. Accuracies in percent."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """One row of a table of arXiv 2408.05900."""

    defence: str
    accuracy: float
    robustness: float


TITLES = {
    "linf": "Table 1: AutoAttack, L∞, 8/255, CIFAR-10, WRN-28-10",
    "l2": "Table 2: AutoAttack, L2, 0.5, CIFAR-10, WRN-28-10",
}

# Rows that this project measures too, by our name of the defence. The paper shows COUP w/o guidance in
# Fig. 2b only, as a bar without a number.
PURIFIERS = {
    "linf": {
        "none": Reported("No defence", 96.09, 0.00),
        "diffpure": Reported("DiffPure", 89.02, 70.64),
        "coup": Reported("COUP", 90.04, 73.05),
    },
    "l2": {
        "none": Reported("No defence", 96.09, 0.00),
        "diffpure": Reported("DiffPure", 91.03, 78.58),
        "coup": Reported("COUP", 92.58, 83.13),
    },
}

# Adversarially trained classifiers that the paper quotes from RobustBench.
LITERATURE = {
    "linf": (
        Reported("AWP - w/o Aug (Wu et al. 2020)", 85.36, 59.18),
        Reported("GAIRAT (Zhang et al. 2020)", 89.36, 59.96),
        Reported("Adv. Train - Aug (Rebuffi et al. 2021)", 87.33, 61.72),
        Reported("AWP - Aug (Wu et al. 2020)", 88.25, 62.11),
        Reported("Adv. Train - Tricks (Gowal et al. 2020)", 89.48, 62.70),
        Reported("Adv. Train - Aug (Gowal et al. 2021)", 87.50, 65.24),
    ),
    "l2": (
        Reported("Adv. Train - DDN (Rony et al. 2019)", 89.05, 66.41),
        Reported("Adv. Train - MMA (Ding et al. 2018)", 88.02, 67.77),
        Reported("AWP (Wu et al. 2020)", 88.51, 72.85),
        Reported("PORT (Sehwag et al. 2021)", 90.31, 75.39),
        Reported("RATIO (Augustin et al. 2020)", 92.23, 77.93),
        Reported("Adv. Train - Aug (Rebuffi et al. 2021)", 91.79, 78.32),
    ),
}
