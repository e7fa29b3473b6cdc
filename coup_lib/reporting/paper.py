"""What the paper reports, to be set beside what is measured here. Accuracies in percent."""

import math
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
    "bpda": "Table 3: BPDA + EOT, L∞, 8/255, CIFAR-10, WRN-28-10",
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

# Table 3: its rows that this project measures too, by our name of the defence, and the ones that it quotes.
BPDA = {
    "none": Reported("No defence", 96.09, 0.00),
    "diffpure": Reported("DiffPure", 89.02, 81.40),
    "coup": Reported("COUP", 90.04, 83.20),
}
BPDA_LITERATURE = (
    Reported("PixelDefend (Song et al. 2017)", 95.00, 9.00),
    Reported("ME-Net (Yang et al. 2019)", 94.00, 15.00),
    Reported("Purification-EBM (Hill et al. 2020)", 84.12, 54.90),
    Reported("ADP (Yoon et al. 2021)", 86.14, 70.01),
    Reported("GDMP (Wang et al. 2022)", 93.50, 76.22),
)

# Sec. 5.2.1, CIFAR-100, L∞, 8/255, APGD-ce; no accuracy is given.
LIKELIHOOD = {
    "likelihood": Reported("Likelihood maximisation (Chen et al.), CIFAR-100", math.nan, 38.67),
    "guided-likelihood": Reported("COUP in likelihood maximisation, CIFAR-100", math.nan, 40.55),
}

# Fig. 2c has bars without numbers. Of adversarially trained classifiers Sec. 5.4.1 gives one pair: alone, and
# behind COUP. "In that case", it says of the pair, after a sentence on either norm: which training and which
# attack are meant stays open.
TRAINED_THEN_COUP = (70.90, 77.15)
