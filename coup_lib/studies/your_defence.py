"""What notebook 10 is asked for: an audit of a defence that is made in the notebook itself."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coup_lib import paths
from coup_lib.ascent import largest_radius
from coup_lib.attacks import NORMS
from coup_lib.checks import choice, count, number
from coup_lib.data import SHAPES, split_size
from coup_lib.evaluation.profiles import BUDGETS

SMOKE_IMAGES = 6


@dataclass(frozen=True)
class Parameters:
    """The parameters of the audit. COUP_SMOKE takes the smallest budget and at most `SMOKE_IMAGES` images.

    Raises:
        ValueError: naming what was expected and what came, before anything is trained.
    """

    norm: str = "linf"
    eps: Any = "0.15"
    budget: str = "quick"
    n_images: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        fill = partial(object.__setattr__, self)
        fill("norm", choice("norm", str(self.norm).lower(), NORMS))
        fill("eps", number("eps", self.eps, 0, largest_radius(self.norm, SHAPES["digits"])))
        choice("budget", self.budget, BUDGETS)
        available = split_size("digits", "test")
        fill("n_images", count("n_images of the test split", self.n_images, available, low=2))
        fill("seed", count("seed", self.seed, 2**31 - 9, low=0))
        if paths.is_smoke():
            fill("budget", "smoke")
            fill("n_images", min(self.n_images, SMOKE_IMAGES))

    @property
    def folder(self) -> Path:
        """Of the audit's records and of its page: beside the results, never among them."""
        return paths.RESULTS.parent / "audit" / "your_defence"
