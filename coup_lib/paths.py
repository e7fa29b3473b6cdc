"""Where things lie, the same whatever folder a notebook is run from."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_checkout = PACKAGE.parent
# An installed package has no checkout around it: results and figures then belong to the caller's folder.
ROOT = _checkout if (_checkout / "notebooks").is_dir() else Path.cwd()

SMOKE_VARIABLE = "COUP_SMOKE"


def is_smoke() -> bool:
    """Whether COUP_SMOKE asks for the smallest sizes (the tests set it: the same code, a few images)."""
    return os.environ.get(SMOKE_VARIABLE, "") not in ("", "0")


# What a smoke run writes means nothing and must not take the place of real results.
_outputs = ROOT / "build" / "smoke" if is_smoke() else ROOT
WEIGHTS = PACKAGE / "weights"
FIGURES = Path(os.environ.get("COUP_FIGURES", _outputs / "figures")).absolute()
RESULTS = Path(os.environ.get("COUP_RESULTS", _outputs / "results")).absolute()
