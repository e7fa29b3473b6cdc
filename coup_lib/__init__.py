"""The executable version of COUP (arXiv 2408.05900): purifiers, their exact gradients, their evaluation."""

from coup_lib.attacks import Attack
from coup_lib.guidance import Guided
from coup_lib.networks.zoo import load_classifier, load_score
from coup_lib.purify import Purified, coup, diffpure, reverse_only
from coup_lib.score import NoiseScore
from coup_lib.sde import VPSDE

__all__ = [
    "VPSDE",
    "Attack",
    "Guided",
    "NoiseScore",
    "Purified",
    "coup",
    "diffpure",
    "load_classifier",
    "load_score",
    "reverse_only",
]
